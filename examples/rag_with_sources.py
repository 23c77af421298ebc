"""Retrieval with sources: which of the retrieved documents did the answer come from?

What one sees: the answer, and a table with each document's share of it. The documents stand in the
prompt as they would after a search; the shares are sums of token scores over each of them, so they
need no citation by the model, and one that it invents does not show up.

    python examples/rag_with_sources.py [--base-url URL] [--question TEXT]
"""

from __future__ import annotations

from connection import arguments, connect, run
from rich.console import Console
from rich.table import Table

from vllm_flashtrace import Attribution

DOCUMENTS = {
    "harbour.txt": "Ferries to Texel leave Den Helder every hour. Bicycles travel free of charge.",
    "museum.txt": "The maritime museum shows a submarine. Tickets cost 12 euros on weekdays.",
    "lighthouse.txt": "The Eierland lighthouse was built in 1864. It has 153 steps to the top.",
    "bakery.txt": "The bakery in De Koog sells almond rolls. It is closed on Tuesdays.",
}
QUESTION = "How many steps does the Eierland lighthouse have?"


def build_prompt(question: str) -> tuple[str, dict[str, tuple[int, int]]]:
    """The prompt, and the characters of each document in it."""
    prompt, spans = "Answer from these documents.\n\n", {}
    for name, text in DOCUMENTS.items():
        prompt += f"[{name}]\n"
        spans[name] = (len(prompt), len(prompt) + len(text))
        prompt += f"{text}\n\n"
    return prompt + question, spans


def main() -> None:
    """Asks, and prints the answer with its sources."""
    parser = arguments(__doc__)
    parser.add_argument("--question", default=QUESTION)
    options = parser.parse_args()
    client, model = connect(options)
    prompt, spans = build_prompt(options.question)
    response = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=48,
        extra_body={"flashtrace": {"top_k": None}},
    )
    attribution = Attribution.from_response(response.choices[0])
    shares = {name: attribution.share(start, end) for name, (start, end) in spans.items()}
    table = Table(title=f"Sources of: {attribution.text}")
    table.add_column("document")
    table.add_column("of the input", justify="right")
    table.add_column("among the documents", justify="right")
    total = sum(shares.values())
    for name, share in sorted(shares.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{share:.1%}", f"{share / total:.1%}")
    Console().print(table)


if __name__ == "__main__":
    run(main)
