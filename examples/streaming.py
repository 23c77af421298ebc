"""A stream: the text comes as fast as without a trace, and the attribution in one more chunk.

What one sees: the answer appears piece by piece; when it is complete, the tokens that it came from
follow. ``client.chat.completions.stream`` collects the additional chunk with the others, too.

    python examples/streaming.py [--base-url URL]
"""

from __future__ import annotations

from connection import arguments, connect, run

from vllm_flashtrace import Attribution

PROMPT = (
    "Ferries to Texel leave Den Helder every hour. Bicycles travel free of charge. The Eierland "
    "lighthouse was built in 1864. It has 153 steps to the top. "
    "How many steps does the Eierland lighthouse have?"
)


def main() -> None:
    """Prints the stream, then its attribution."""
    client, model = connect(arguments(__doc__).parse_args())
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": PROMPT}],
        temperature=0,
        max_tokens=32,
        stream=True,
        extra_body={"flashtrace": {"top_k": 8}},
    )
    traced = None
    for chunk in stream:
        delta = chunk.choices[0].delta
        print(delta.content or "", end="", flush=True)
        if hasattr(delta, "flashtrace"):  # One chunk per choice, after the one that ends it.
            traced = delta
    if traced is None:
        raise SystemExit("\nno attribution came: is this a server of vllm-flashtrace?")
    attribution = Attribution.from_response(traced)
    print(f"\n\nstatus: {attribution.status}")
    for score in attribution.top(8):
        where = "template" if score.message is None else f"characters {score.start}-{score.end}"
        print(f"{score.score:7.4f}  {score.token!r:12} {where}")
    print(f"{attribution.remaining_mass:7.4f}  not followed further than the last hop")


if __name__ == "__main__":
    run(main)
