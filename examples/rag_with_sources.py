"""Retrieval with sources: which of the retrieved documents did each sentence come from?

What one sees: the answer with a number behind each sentence that came from a document, as the
server's citations say, and a table with each document's share of the answer. The model is not
asked to cite anything, so a citation that it invents does not show up.

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


def build_prompt(question: str) -> str:
    """The documents, then the question."""
    documents = "\n\n".join(f"[{name}]\n{text}" for name, text in DOCUMENTS.items())
    return f"Answer from these documents.\n\n{documents}\n\n{question}"


def cited_text(answer: str, citations: list[dict]) -> str:
    """The answer with the numbers of its sources behind each part that has any."""
    for citation in sorted(citations, key=lambda each: -each["end"]):
        numbers = "".join(f"[{source['index'] + 1}]" for source in citation["sources"])
        answer = f"{answer[: citation['end']]} {numbers}{answer[citation['end'] :]}"
    return answer


def main() -> None:
    """Asks, and prints the answer with its sources."""
    parser = arguments(__doc__)
    parser.add_argument("--question", default=QUESTION)
    options = parser.parse_args()
    client, model = connect(options)
    response = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": build_prompt(options.question)}],
        temperature=0,
        max_tokens=48,
        extra_body={
            "flashtrace": {
                "citations": True,
                "sources": [{"id": name, "text": text} for name, text in DOCUMENTS.items()],
            }
        },
    )
    attribution = Attribution.from_response(response.choices[0])
    console = Console()
    answer = response.choices[0].message.content
    console.print(cited_text(answer, attribution.citations), markup=False)
    table = Table(title="Share of the answer")
    table.add_column("document")
    shares = [[source["score"] or 0 for source in t.sources] for t in attribution.targets]
    for number in range(1, len(shares) + 1):
        table.add_column(f"sentence {number}", justify="right")
    for index, name in enumerate(DOCUMENTS):
        row = (f"{of_target[index] / sum(of_target):.1%}" for of_target in shares)
        table.add_row(f"[{index + 1}] {name}", *row)
    console.print(table)


if __name__ == "__main__":
    run(main)
