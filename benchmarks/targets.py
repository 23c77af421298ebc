"""What it costs to explain every sentence of an answer: together, one by one, and as one target.

Attributions of an answer as one target, of its parts in one visit, and of each part by itself
alternate in one run on one engine; medians, and ratios to the answer as one target.

    python -m benchmarks.targets [--cases 2000,200,400 ...] [--parts 20] [--hops 0 1] [--json OUT]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track

from benchmarks.tables import emit
from benchmarks.tables import targets as table
from benchmarks.trace_latency import Case, start_engine
from vllm_flashtrace.core.hops import HopRecursion, TracedTarget
from vllm_flashtrace.core.weights import TargetWeights

if TYPE_CHECKING:
    from tests.engine.harness import Engine

CASES = ["2000,200,400"]
ONE_BY_ONE = "one by one"
WAYS = ("one target", "together", ONE_BY_ONE)


class Answer:
    """The output of a case, cut into parts of equal length."""

    def __init__(self, engine: Engine, case: Case, parts: int, hops: int) -> None:
        """Takes text of the engine's tokenizer."""
        from tests.engine.conftest import text_tokens

        self.engine, self.case, self.hops = engine, case, hops
        self.token_ids = text_tokens(engine, case.context)
        begin = case.context - case.output
        edges = [begin + case.output * i // parts for i in range(parts + 1)]
        self.spans = list(pairwise(edges))

    def run(self, way: str) -> tuple[float, int]:
        """Seconds of one attribution, and how many tokens it prefilled."""
        whole = [(self.spans[0][0], self.spans[-1][1])]
        visits = {
            "one target": [whole],
            "together": [self.spans],
            ONE_BY_ONE: [[span] for span in self.spans],
        }
        began = time.perf_counter()
        tokens = sum(self._visit([self._recursion(span) for span in v]) for v in visits[way])
        return time.perf_counter() - began, tokens

    def _recursion(self, span: tuple[int, int]) -> HopRecursion:
        case = self.case
        mask = torch.zeros(case.context, dtype=torch.bool)
        mask[case.prompt : case.prompt + case.reasoning] = True
        target = TargetWeights.from_spans([span])
        return HopRecursion(target, case.prompt, case.context, mask, hops=self.hops)

    def _visit(self, recursions: Sequence[HopRecursion]) -> int:
        from tests.engine.harness import TraceJob
        from vllm_flashtrace.trace.hop import padded

        tokens = 0
        while pending := [r for r in recursions if r.next_weights() is not None]:
            targets = [target for r in pending if (target := r.next_target()) is not None]
            if len(recursions) == 1 and self.hops < 2:  # As `trace.hop.visits` does.
                targets = [TracedTarget(targets[0].weights)]
            text = self.token_ids[: max(target.weights.last for target in targets) + 1]
            first, *others = targets
            job = TraceJob(text, first.weights, further=first.further, others=others)
            report = self.engine.trace(job)
            tokens += report.recomputed_tokens
            for recursion, hops in zip(pending, report.targets, strict=True):
                for scores in hops:
                    recursion.add(padded(scores, self.case.context))
        return tokens


def measure(answer: Answer, repeats: int) -> list[dict[str, Any]]:
    """A row for each way."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    tokens: dict[str, int] = {}
    for repeat in range(-1, repeats):  # The first round fills the prefix cache.
        for way in WAYS:
            taken, tokens[way] = answer.run(way)
            if repeat >= 0:
                seconds[way].append(taken)
    base = statistics.median(seconds[WAYS[0]])
    return [
        {
            "context": answer.case.context,
            "reasoning": answer.case.reasoning,
            "output": answer.case.output,
            "parts": len(answer.spans),
            "hops": answer.hops,
            "way": way,
            "recomputed_tokens": tokens[way],
            "seconds": statistics.median(seconds[way]),
            "ratio": statistics.median(seconds[way]) / base,
        }
        for way in WAYS
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--parts", type=int, default=20)
    parser.add_argument("--hops", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    cases = [Case.parse(text) for text in options.cases]
    engine = start_engine(max(case.context for case in cases), eager=True)
    try:
        answers = [
            Answer(engine, case, options.parts, hops) for case in cases for hops in options.hops
        ]
        rows = [row for answer in track(answers) for row in measure(answer, options.repeats)]
    finally:
        engine.close()
    result = {"rows": rows}
    emit(result, table(result), options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
