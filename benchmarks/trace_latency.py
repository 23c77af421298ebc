"""Seconds of a whole K = 1 attribution, and of the same prefill without a trace.

The floor of a case is the same engine prefilling as many tokens over the same cached prefix in the
same run; traces and floors alternate, and medians are compared.

    python -m benchmarks.trace_latency [--cases 600,200,20 2000,40,40] [--eager] [--json OUT]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vllm_flashtrace.core.hops import HopRecursion
from vllm_flashtrace.core.proximity import DEFAULT_EXACT_FRACTION
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.models import prepare_smollm2

if TYPE_CHECKING:
    from tests.engine.harness import Engine

SMALL_CASES = ["600,200,20", "2000,40,40"]


@dataclass(frozen=True)
class Case:
    """Token counts: the whole context, of which reasoning and output are the end."""

    context: int
    reasoning: int
    output: int

    @classmethod
    def parse(cls, text: str) -> Case:
        """Reads ``context,reasoning,output``."""
        return cls(*(int(part) for part in text.split(",")))

    @property
    def prompt(self) -> int:
        """Number of prompt tokens."""
        return self.context - self.reasoning - self.output


class Bench:
    """Runs one case on a shared engine."""

    def __init__(self, engine: Engine, case: Case) -> None:
        from tests.engine.conftest import text_tokens

        self.engine = engine
        self.case = case
        self.token_ids = text_tokens(engine, case.context)
        self._variant = 0

    def trace(self) -> tuple[float, list[Any]]:
        """One attribution; seconds and the report of each hop."""
        from tests.engine.harness import TraceJob

        case, reports = self.case, []
        mask = torch.zeros(case.context, dtype=torch.bool)
        mask[case.prompt : case.prompt + case.reasoning] = True
        target = TargetWeights.from_spans([(case.context - case.output, case.context)])
        began = time.perf_counter()
        recursion = HopRecursion(target, case.prompt, case.context, mask, hops=1)
        while (weights := recursion.next_weights()) is not None:
            length = weights.last + 1
            job = TraceJob(self.token_ids[:length], weights, DEFAULT_EXACT_FRACTION)
            reports.append(self.engine.trace(job))
            scores = torch.zeros(case.context)
            scores[:length] = reports[-1].scores
            recursion.add(scores)
        recursion.result()
        return time.perf_counter() - began, reports

    def floor(self, reports: list[Any]) -> float:
        """Prefills what the hops prefilled, behind the same prefix, without a trace."""
        began = time.perf_counter()
        for report in reports:
            self._variant += 1
            fresh = [self._variant + 10] * report.recomputed_tokens
            self.engine.generate([*self.token_ids[: report.cached_tokens], *fresh], 1)
        return time.perf_counter() - began

    def row(self, repeats: int) -> dict[str, Any]:
        """Alternates traces and floors; medians."""
        self.engine.generate(self.token_ids, 1)
        self.trace()
        traces, floors = [], []
        for _ in range(repeats):
            seconds, reports = self.trace()
            traces.append((seconds, reports))
            floors.append(self.floor(reports))
        seconds = statistics.median(s for s, _ in traces)
        floor = statistics.median(floors)

        def phase(name: str) -> float:
            return statistics.median(sum(r.seconds[name] for r in reports) for _, reports in traces)

        return {
            "context": self.case.context,
            "reasoning": self.case.reasoning,
            "output": self.case.output,
            "recomputed_tokens": sum(r.recomputed_tokens for r in traces[-1][1]),
            "seconds": seconds,
            "floor_seconds": floor,
            "ratio_to_floor": seconds / floor,
            "recording_seconds": phase("recording"),
            "proximity_seconds": phase("proximity"),
        }


def main() -> None:
    """Runs the cases and prints a table."""
    from tests.engine.harness import Engine

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=SMALL_CASES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="an engine without compilation")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cases = [Case.parse(text) for text in options.cases]
    engine = Engine(
        prepare_smollm2(),
        max_model_len=max(case.context for case in cases) + 8,
        enforce_eager=options.eager,
        kv_cache_memory_bytes=2 << 30,
    )
    try:
        rows = [Bench(engine, case).row(options.repeats) for case in track(cases, "cases")]
    finally:
        engine.close()
    mode = "eager" if options.eager else "compiled"
    table = Table(title=f"K = 1 attribution, SmolLM2-135M float32, {mode} engine, 2 CPU cores")
    for name in rows[0]:
        table.add_column(name.replace("_", " "))
    for row in rows:
        cells = [f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()]
        table.add_row(*cells)
    Console(width=150).print(table)
    if options.json:
        options.json.write_text(json.dumps({"engine": mode, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
