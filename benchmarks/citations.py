"""Does a part of an answer get the citation that it should have?

Every example is a prompt with sources of very different lengths, one fact in each, and an answer
of four sentences: two state facts of two sources in other words, one is what everybody knows, and
one is a polite phrase. The answer is given, so that every model explains the same one. Printed
is how often the right source comes first, by the way in which the scores of its tokens are pooled,
and what the server's own rule cites: of the sentences with a source the share that cite it
(``recall``), of the sources cited the share that are right (``precision``), and of the sentences
without a source the share that cite one all the same (``false``).

    python -m benchmarks.citations [--model FOLDER] [--examples 30] [--longest 0 8 12]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.tables import citations as table
from benchmarks.tables import emit
from vllm_flashtrace.api.request import PRESETS

Pooling = Callable[[Sequence[float]], float]


def best(count: int) -> Pooling:
    """The mean of the highest scores."""

    def pool(scores: Sequence[float]) -> float:
        return statistics.fmean(sorted(scores, reverse=True)[:count])

    return pool


POOLINGS: dict[str, Pooling] = {
    "sum": sum,
    "mean": statistics.fmean,
    "best 1": max,
    "best 4": best(4),
    "best 8": best(8),
    "best 16": best(16),
}

_PEOPLE = (
    "Mira Kovac", "Jonas Brandt", "Leila Haddad", "Tomas Novak", "Ingrid Solberg", "Rafael Costa",
    "Aiko Mori", "Pavel Orlov", "Nadia Rahimi", "Erik Lund", "Sofia Greco", "Samuel Osei",
)  # fmt: skip
# A fact as a source writes it, the question for it, and the answer in other words.
_FACTS = (
    ("{who} is in charge of the {thing} since {year}.", "Who looks after the {thing}?",
     "{who} takes care of the {thing}."),
    ("The {thing} was sold to {who} for {price} euros.", "Who bought the {thing}?",
     "The {thing} now belongs to {who}."),
    ("In {year}, {who} repaired the {thing} within two days.", "Who mended the {thing}?",
     "It was {who} who fixed the {thing}."),
    ("{who} keeps the only key to the {thing}.", "Who can open the {thing}?",
     "Only {who} is able to open the {thing}."),
    ("The plans of the {thing} were drawn by {who} in {year}.", "Who designed the {thing}?",
     "{who} is the designer of the {thing}."),
)  # fmt: skip
_THINGS = (
    "lighthouse", "old mill", "ferry", "clock tower", "orchard", "observatory", "printing press",
    "stone bridge", "greenhouse", "boathouse", "chapel organ", "weather station",
)  # fmt: skip
_FILLER = (
    "The council meets on the first Monday of each month.",
    "Visitors usually come in summer, when the days are long.",
    "A small museum shows tools and photographs from the last century.",
    "The road along the coast is closed after heavy storms.",
    "Bread is baked before sunrise and sold at the market.",
    "Several families have lived in the valley for generations.",
    "The school has eighty pupils and four teachers.",
    "Fishing boats leave the harbour before dawn.",
    "In autumn the hills turn red and yellow.",
    "Concerts take place in the town hall on Fridays.",
    "The library lends books, maps and musical instruments.",
    "A bus connects the villages every two hours.",
)
_KNOWN = (
    "Water boils at one hundred degrees Celsius.",
    "The Earth goes around the Sun once a year.",
    "A week has seven days.",
    "Paris is the capital of France.",
)
_POLITE = (
    "Please let me know if there is anything else.",
    "I hope this helps.",
    "Feel free to ask further questions.",
)


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with sources, and an answer to it.

    Attributes:
        prompt: The user's message.
        sources: Texts of the sources.
        answer: The answer, a sentence per entry.
        truth: The source of each sentence, None where it has none.
    """

    prompt: str
    sources: list[str]
    answer: list[str]
    truth: list[int | None]


def example(number: int, count: int, longest: int = 8) -> Example:
    """An example, the same for the same number.

    Args:
        number: Of the example.
        count: Number of sources.
        longest: Most sentences beside the fact in a source.
    """
    draw = random.Random(number)
    people, things = draw.sample(_PEOPLE, count), draw.sample(_THINGS, count)
    facts = [
        tuple(
            text.format(who=who, thing=thing, year=draw.randint(1950, 2020), price=9 * number + 100)
            for text in draw.choice(_FACTS)
        )
        for who, thing in zip(people, things, strict=True)
    ]
    sources = []
    for fact, _, _ in facts:
        sentences = draw.sample(_FILLER, draw.choice([longest // 2**i for i in range(5)]))
        sentences.insert(draw.randint(0, len(sentences)), fact)
        sources.append(" ".join(sentences))
    asked = draw.sample(range(count), 2)
    questions = " ".join(facts[i][1] for i in asked)
    documents = "\n\n".join(f"Document {i + 1}:\n{text}" for i, text in enumerate(sources))
    prompt = f"{documents}\n\nAnswer from the documents. {questions}"
    answer = [*(facts[i][2] for i in asked), draw.choice(_KNOWN), draw.choice(_POLITE)]
    truth: list[int | None] = [*asked, None, None]
    order = draw.sample(range(4), 4)
    return Example(prompt, sources, [answer[i] for i in order], [truth[i] for i in order])


def explained(engine: Any, each: Example, more: Mapping[str, Any]) -> dict[str, Any]:
    """The attribution of the answer, with all scores of the prompt."""
    field = {
        "citations": True,
        "targets": "sentences",
        "sources": [{"id": str(i), "text": text} for i, text in enumerate(each.sources)],
        "top_k": None,
        **more,
    }
    prompt = [{"role": "user", "content": each.prompt}]
    data: dict[str, Any] = engine.attribute(prompt, " ".join(each.answer), field).to_dict()
    if data["status"] != "completed":
        raise RuntimeError(data["error"]["message"])
    return data


def token_scores(found: Mapping[str, Any]) -> list[list[float]]:
    """The scores of the tokens of each source, for one target."""
    spans = [(source["start"], source["end"]) for source in found["sources"]]
    scores: list[list[float]] = [[] for _ in spans]
    for row in found["scores"]:
        if "start" not in row:
            continue
        for own, (start, end) in zip(scores, spans, strict=True):
            if start <= row["end"] - 1 < end:
                own.append(row["score"])
    return scores


@dataclass(slots=True)
class Tally:
    """What was counted over the sentences of all examples."""

    first: dict[str, int]
    with_source: int = 0
    without: int = 0
    found: int = 0
    cited: int = 0
    right: int = 0
    false: int = 0

    def add(self, each: Example, data: Mapping[str, Any]) -> None:
        """Counts one example."""
        cited = {citation["text"]: citation["sources"] for citation in data["citations"]}
        for sentence, truth, found in zip(each.answer, each.truth, data["targets"], strict=True):
            numbers = [source["index"] for source in cited.get(sentence, [])]
            if truth is None:
                self.without += 1
                self.false += bool(numbers)
                continue
            self.with_source += 1
            self.found += truth in numbers
            self.cited += len(numbers)
            self.right += truth in numbers
            scores = token_scores(found)
            for name, pool in POOLINGS.items():
                pooled = [pool(own) for own in scores]
                self.first[name] += pooled.index(max(pooled)) == truth

    def row(self) -> dict[str, Any]:
        """The figures of the table's row."""
        return {
            "sentences": self.with_source,
            "first": {name: count / self.with_source for name, count in self.first.items()},
            "recall": self.found / self.with_source,
            "precision": self.right / max(1, self.cited),
            "false": self.false / max(1, self.without),
        }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a model; by default SmolLM2-135M-Instruct")
    parser.add_argument("--examples", type=int, default=30)
    parser.add_argument("--sources", type=int, default=5)
    parser.add_argument(
        "--longest", type=int, nargs="+", default=[8], help="most sentences beside a fact"
    )
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--weighting", choices=("equal", "surprise"), default="equal")
    parser.add_argument("--raw", type=Path, help="write every attribution there")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    from vllm_flashtrace import FlashTrace
    from vllm_flashtrace.models.smollm2 import prepare_smollm2

    model = args.model or str(prepare_smollm2())
    rows = []
    raw: list[dict[str, Any]] = []
    with FlashTrace(
        model,
        max_model_len=2048,
        enforce_eager=True,
        dtype="float32",
        kv_cache_memory_bytes=1 << 30,
    ) as engine:
        for longest, preset in product(args.longest, args.presets):
            more = {"preset": preset, "weighting": args.weighting}
            tally, tokens = Tally(dict.fromkeys(POOLINGS, 0)), []
            for number in range(args.examples):
                each = example(number, args.sources, longest)
                data = explained(engine, each, more)
                tally.add(each, data)
                tokens.append(data["prompt_tokens"])
                raw.append({**more, "longest": longest, "number": number, "data": data})
            length = round(statistics.fmean(tokens))
            rows.append({"model": Path(model).name, **more, "tokens": length, **tally.row()})
            print(table({"rows": rows[-1:]}), flush=True)
    if args.raw:
        args.raw.write_text(json.dumps(raw))
    result = {"rows": rows}
    emit(result, table(result), args.json)


if __name__ == "__main__":
    main()
