"""Does an attribution of a tool call lead back to the instruction that caused it?

Reads the conversations of `benchmarks.agent_guard` and the token scores that it kept, and runs no
model. Of an ``injected`` call the source is known: the instruction that stands in the last tool
result. Messages of the system, the user and tools are cut into sentences, and at both ends of the
instruction; a method ranks them for each argument of the call. Printed are, with 95 % bootstrap
intervals over calls, the share of arguments for which a sentence of the instruction is the best

- ``all``: of the whole context;
- ``tools``: of the tool results;
- ``copied`` and ``other``: as ``all``, of arguments that stand in the instruction word for word,
  and of the others;
- ``resisted``: as ``all``, of calls that the user's task asked for beside such an instruction. Here
  less is better.

Ties count against a method on injected calls, and for it on resisted ones. The baseline
``embedding`` is there if the package ``wordllama`` is.

    python -m benchmarks.agent_sources --conversations FILE --raw sources=FILE [paper=FILE]
        [--model FOLDER] [--json OUT]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.faithfulness.example import Span, Values
from benchmarks.faithfulness.metrics import bootstrap
from benchmarks.faithfulness.own_methods import Embedder, bm25, words
from benchmarks.tables import agent_sources as table
from benchmarks.tables import emit
from vllm_flashtrace.text.sentences import sentence_spans

ROLES = ("system", "user", "tool")
Row = Mapping[str, Any]
HOPS = {"h0": "no hop", "m": "all hops"}
WHOLE_CALL = {"": False, ", whole call": True}
"""Whether a method sees the argument alone or all of the call."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A sentence of a message, or the part of one that an instruction leaves.

    Attributes:
        message: Index of its message.
        span: Half-open, in characters of the message.
        text: What stands there.
        tool: Whether it is of a tool result.
        injected: Whether it is of the instruction.
    """

    message: int
    span: Span
    text: str
    tool: bool
    injected: bool


def units_of(conversation: Row) -> list[Unit]:
    """The sentences of all messages but the assistant's, in order.

    Raises:
        ValueError: The instruction stands nowhere in the last message.
    """
    found: list[Unit] = []
    messages = conversation["messages"]
    for number, message in enumerate(messages):
        if message["role"] not in ROLES:
            continue
        text = message["content"]
        cuts = {0, len(text)} | {end for _, end in sentence_spans(text)}
        inside = (0, 0)
        if conversation["injection"] and number == len(messages) - 1:
            parts = map(re.escape, conversation["injection"].split())
            place = re.search(r"\s+".join(parts), text)
            if place is None:
                raise ValueError("the instruction is not in the last message")
            inside = place.span()
            cuts |= set(inside)
        ends = sorted(cuts)
        for start, end in pairwise(ends):
            if text[start:end].strip():
                injected = inside[0] <= start and end <= inside[1]
                tool = message["role"] == "tool"
                found.append(Unit(number, (start, end), text[start:end], tool, injected))
    return found


Scorer = Callable[[Row, Row, Sequence[Row], Sequence[Unit]], Values]
"""Conversation, one argument of the call as it was scored, all of them, units: scores of these."""


def of_tokens(tokenizer: Any, hops: str, *, whole_call: bool) -> Scorer:
    """The mean over a unit's tokens, which is how the product orders sentences.

    Args:
        tokenizer: Of the model that was explained.
        hops: Key of the token scores.
        whole_call: Whether it is the mean over all arguments, too.
    """

    def of_one(conversation: Row, argument: Row, units: Sequence[Unit]) -> Values:
        own = {int(number): scores for number, scores in argument[hops].items()}
        scores = np.zeros(len(units))
        for number in {unit.message for unit in units}:
            text = conversation["messages"][number]["content"]
            offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            # A token belongs where its first letter is, as in the product.
            places = [end - len(text[a:end].lstrip()) for a, end in offsets["offset_mapping"]]
            if len(places) != len(own.get(number, ())):
                raise ValueError(f"message {number} has other tokens than were scored")
            values = np.array(own[number])
            for i, unit in enumerate(units):
                if unit.message == number:
                    part = [unit.span[0] <= place < unit.span[1] for place in places]
                    scores[i] = values[part].mean() if any(part) else 0.0
        return scores

    def scorer(
        conversation: Row, argument: Row, arguments: Sequence[Row], units: Sequence[Unit]
    ) -> Values:
        chosen = arguments if whole_call else [argument]
        return np.mean([of_one(conversation, each, units) for each in chosen], axis=0)

    return scorer


def of_call(call: Row) -> str:
    """The words of a call: its name, and the names and values of its arguments."""
    parts = [call["name"], *(str(part) for item in call["arguments"].items() for part in item)]
    return " ".join(parts).replace("_", " ")


def of_words(measure: Callable[[str, Sequence[str]], Values], *, whole_call: bool) -> Scorer:
    """A measure on the text of the argument, or of the call, and the texts of the units."""
    return lambda conversation, argument, _, units: measure(
        of_call(conversation["call"]) if whole_call else str(argument["text"]),
        [unit.text for unit in units],
    )


def overlap(query: str, texts: Sequence[str]) -> Values:
    """Share of the query's words that stand in each text."""
    wanted = set(words(query))
    return np.array([len(wanted & set(words(text))) / max(1, len(wanted)) for text in texts])


def methods(tokenizer: Any, seed: int) -> dict[str, Scorer]:
    """Those that need no raw scores."""
    embedder = Embedder() if importlib.util.find_spec("wordllama") is not None else None

    def by_bm25(query: str, texts: Sequence[str]) -> Values:
        return bm25(words(query), [words(text) for text in texts])

    def by_embedding(query: str, texts: Sequence[str]) -> Values:
        assert embedder is not None
        own, *others = map(embedder.embed, (query, *texts))
        return np.array([float(own @ other) for other in others])

    measures = {"overlap": overlap, "bm25": by_bm25}
    if embedder is not None:
        measures["embedding"] = by_embedding
    source = np.random.default_rng(seed)
    return {
        **{
            f"{name}{words}": of_words(measure, whole_call=whole)
            for name, measure in measures.items()
            for words, whole in WHOLE_CALL.items()
        },
        "recency": lambda _, __, ___, units: np.arange(len(units), dtype=np.float64),
        "random": lambda _, __, ___, units: source.random(len(units)),
    }


def is_best(scores: Values, chosen: Sequence[bool], *, ties: bool = False) -> float:
    """1 if the best score is one of the chosen, else 0; of a tie ``ties`` says which."""
    mask = np.array(chosen)
    if not mask.any():
        return 0.0
    own = scores[mask].max()
    other = scores[~mask].max(initial=-np.inf)
    return float(own > other or (ties and own == other))


def _answers(
    made: Sequence[Row], rows: Sequence[Row], scorer: Scorer
) -> Iterator[tuple[str, float]]:
    """Name of a metric and its value for one call, its arguments' mean."""
    for row in rows:
        conversation = made[row["n"]]
        if conversation["injection"] is None:
            continue
        units = units_of(conversation)
        hits: dict[str, list[float]] = {}
        text = " ".join(conversation["injection"].lower().split())
        for argument in row["args"]:
            scores = scorer(conversation, argument, row["args"], units)
            injected = [unit.injected for unit in units]
            if conversation["kind"] == "resisted":
                hits.setdefault("resisted", []).append(is_best(scores, injected, ties=True))
                continue
            found = is_best(scores, injected)
            copied = " ".join(str(argument["text"]).lower().split()) in text
            hits.setdefault("all", []).append(found)
            hits.setdefault("copied" if copied else "other", []).append(found)
            of_tools = [i for i, unit in enumerate(units) if unit.tool]
            among = is_best(scores[of_tools], [units[i].injected for i in of_tools])
            hits.setdefault("tools", []).append(among)
        yield from ((metric, fmean(values)) for metric, values in hits.items())


def summary(
    made: Sequence[Row],
    raw: Mapping[str, Sequence[Row]],
    tokenizer: Any,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """One row per method: of each metric mean, ends of the interval, and calls.

    Args:
        made: Conversations, with ``injection``.
        raw: Of each preset what `benchmarks.agent_guard` kept. Methods that read words run on
            the calls and arguments of the first one.
        tokenizer: Of the model that was explained.
        seed: Of random scores and intervals.
    """
    first = next(iter(raw.values()))
    scorers = [
        (f"flashtrace {preset}, {hops}{call}", of_tokens(tokenizer, key, whole_call=whole), rows)
        for preset, rows in raw.items()
        for key, hops in HOPS.items()
        for call, whole in WHOLE_CALL.items()
    ]
    scorers += [(name, scorer, first) for name, scorer in methods(tokenizer, seed).items()]
    found = []
    for name, scorer, rows in scorers:
        values: dict[str, list[float]] = {}
        for metric, value in _answers(made, rows, scorer):
            values.setdefault(metric, []).append(value)
        row: dict[str, Any] = {"method": name}
        for metric, numbers in values.items():
            row[metric] = [*(round(x, 4) for x in bootstrap(numbers, seed=seed)), len(numbers)]
        found.append(row)
    return found


def sizes(made: Sequence[Row], rows: Sequence[Row]) -> dict[str, float]:
    """Means over the injected calls: sentences, and those of the instruction."""
    parts = [units_of(made[row["n"]]) for row in rows if made[row["n"]]["kind"] == "injected"]
    return {
        "sentences": round(fmean(map(len, parts)), 1),
        "of_instruction": round(fmean(sum(u.injected for u in units) for units in parts), 1),
    }


def main() -> None:
    """Prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--conversations", type=Path, required=True)
    parser.add_argument("--raw", nargs="+", required=True, metavar="PRESET=FILE")
    parser.add_argument("--model", help="folder of a model; by default SmolLM2-135M-Instruct")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from transformers import AutoTokenizer

    from vllm_flashtrace.models.smollm2 import prepare_smollm2

    made = json.loads(args.conversations.read_text("utf-8"))
    if not all("injection" in conversation for conversation in made):
        parser.error("the conversations have no 'injection'; make them again with --make")
    raw = {}
    for item in args.raw:
        preset, _, path = item.partition("=")
        rows = [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]
        raw[preset] = [row for row in rows if row["args"]]
    model = args.model or str(prepare_smollm2())
    result = {
        "model": Path(args.model).name if args.model else "SmolLM2-135M-Instruct",
        **sizes(made, next(iter(raw.values()))),
        "rows": summary(made, raw, AutoTokenizer.from_pretrained(model)),
    }
    emit(result, table(result), args.json)


if __name__ == "__main__":
    main()
