"""OpenAI's client: ask with a ``flashtrace`` field and read the attribution of the answer.

What one sees: the answer, the prompt in the colours of its heat-map with the strongest tokens below
it, and the share of the one sentence that the answer came from.

    python examples/openai_client.py [--base-url URL] [--html FILE]
"""

from __future__ import annotations

from connection import arguments, connect, run
from rich import print as show

from vllm_flashtrace import Attribution

FACT = "The secret access code for the Lisbon office is 7306."
PROMPT = (
    "The office in Oslo opens at nine. The lift is out of order until Friday. "
    f"{FACT} Visitors sign in at the desk. The canteen serves soup on Mondays. "
    "What is the secret access code for the Lisbon office? Answer with the code."
)


def main() -> None:
    """Asks once and prints what the answer came from."""
    parser = arguments(__doc__)
    parser.add_argument("--html", help="also write the heat-map as a page to this file")
    options = parser.parse_args()
    client, model = connect(options)
    response = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": PROMPT}],
        temperature=0,
        max_tokens=32,
        # top_k null: a score for every prompt token, so that passages can be summed.
        extra_body={"flashtrace": {"top_k": None}},
    )
    attribution = Attribution.from_response(response.choices[0])
    print(f"Answer: {attribution.text}\n")
    show(attribution)
    print(f"\n{attribution.share_of_text(FACT):.0%} of the input is in: {FACT}")
    if options.html:
        attribution.to_html(options.html)


if __name__ == "__main__":
    run(main)
