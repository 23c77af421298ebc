"""Seconds of a whole K = 1 attribution, and of the same prefill without a trace.

The floor of a case is the same engine prefilling as many tokens over the same cached prefix in the
same run; traces and floors alternate, and medians are compared. The seconds of a trace split into

- prefill: the engine running the trace requests, less the next two,
- recording: adding target rows to the sums, inside the forward pass,
- proximity: from the sums to scores,
- transport: fetching the scores and working out the next hop's weights.

``extra_mb`` is the worker's peak memory during a trace, less what it holds idle before the first.

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

from benchmarks.processes import WorkerMemory
from vllm_flashtrace.core.hops import HopRecursion
from vllm_flashtrace.core.proximity import DEFAULT_EXACT_FRACTION
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.models import prepare_smollm2

if TYPE_CHECKING:
    from tests.engine.harness import Engine

SMALL_CASES = ["600,200,20", "2000,40,40"]
ALL_CASES = ["600,200,20", "2000,1000,20", "2000,40,40", "6000,40,40", "8000,4000,40"]


@dataclass(frozen=True)
class Timing:
    """Seconds of one attribution, and of what its caller spent beside the engine's steps."""

    seconds: float
    transport: float


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
        timing, reports = self.timed_trace()
        return timing.seconds, reports

    def timed_trace(self) -> tuple[Timing, list[Any]]:
        """One attribution; its timing and the report of each hop."""
        from tests.engine.harness import TraceJob

        case, reports, engine_seconds = self.case, [], 0.0
        mask = torch.zeros(case.context, dtype=torch.bool)
        mask[case.prompt : case.prompt + case.reasoning] = True
        target = TargetWeights.from_spans([(case.context - case.output, case.context)])
        began = time.perf_counter()
        recursion = HopRecursion(target, case.prompt, case.context, mask, hops=1)
        while (weights := recursion.next_weights()) is not None:
            length = weights.last + 1
            job = TraceJob(self.token_ids[:length], weights, DEFAULT_EXACT_FRACTION)
            entered = time.perf_counter()
            _, nonce = self.engine.submit(job)
            self.engine.run()
            engine_seconds += time.perf_counter() - entered
            reports.append(self.engine.collect(nonce))
            scores = torch.zeros(case.context)
            scores[:length] = reports[-1].scores
            recursion.add(scores)
        recursion.result()
        seconds = time.perf_counter() - began
        return Timing(seconds, seconds - engine_seconds), reports

    def floor(self, reports: list[Any]) -> float:
        """Prefills what the hops prefilled, behind the same prefix, without a trace."""
        began = time.perf_counter()
        for report in reports:
            self._variant += 1
            fresh = [self._variant + 10] * report.recomputed_tokens
            self.engine.generate([*self.token_ids[: report.cached_tokens], *fresh], 1)
        return time.perf_counter() - began

    def row(self, repeats: int, idle_mb: float | None = None) -> dict[str, Any]:
        """Alternates traces and floors; medians.

        Args:
            repeats: Pairs of a trace and a floor.
            idle_mb: What the worker holds before the first trace; None for what it holds now.
        """
        self.engine.generate(self.token_ids, 1)
        memory = WorkerMemory(self.engine)
        self.trace()
        extra_mb = memory.peak_mb() - (memory.idle_mb if idle_mb is None else idle_mb)
        traces, floors, reports = [], [], []
        for _ in range(repeats):
            timing, reports = self.timed_trace()
            traces.append((timing, reports))
            floors.append(self.floor(reports))
        seconds = statistics.median(timing.seconds for timing, _ in traces)
        floor = statistics.median(floors)
        transport = statistics.median(timing.transport for timing, _ in traces)

        def phase(name: str) -> float:
            return statistics.median(sum(r.seconds[name] for r in hops) for _, hops in traces)

        recording, proximity = phase("recording"), phase("proximity")
        return {
            "context": self.case.context,
            "reasoning": self.case.reasoning,
            "output": self.case.output,
            "recomputed_tokens": sum(report.recomputed_tokens for report in reports),
            "seconds": seconds,
            "floor_seconds": floor,
            "ratio_to_floor": seconds / floor,
            "prefill_seconds": seconds - recording - proximity - transport,
            "recording_seconds": recording,
            "proximity_seconds": proximity,
            "transport_seconds": transport,
            "extra_mb": extra_mb,
        }


def touch_kv_cache(worker: Any) -> None:
    """Runs in the worker: writes every page of the KV cache, so that its use does not show."""
    for layer in worker.vllm_config.compilation_config.static_forward_context.values():
        layer.kv_cache.add_(0)


def main() -> None:
    """Runs the cases and prints a table."""
    from tests.engine.harness import Engine

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=SMALL_CASES, help="or: all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="an engine without compilation")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    texts = ALL_CASES if options.cases == ["all"] else options.cases
    cases = [Case.parse(text) for text in texts]
    engine = Engine(
        prepare_smollm2(),
        max_model_len=max(case.context for case in cases) + 8,
        enforce_eager=options.eager,
        kv_cache_memory_bytes=2 << 30,
    )
    try:
        benches = [Bench(engine, case) for case in cases]
        for bench in benches:
            engine.generate(bench.token_ids, 1)
        engine.on_worker(touch_kv_cache)
        idle_mb = WorkerMemory(engine).idle_mb
        rows = []
        for bench in track(benches, "cases"):
            rows.append(bench.row(options.repeats, idle_mb))
    finally:
        engine.close()
    mode = "eager" if options.eager else "compiled"
    table = Table(title=f"K = 1 attribution, SmolLM2-135M float32, {mode} engine, 2 CPU cores")
    for name in rows[0]:
        table.add_column(name.replace("_", " "))
    for row in rows:
        cells = [f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()]
        table.add_row(*cells)
    Console(width=180).print(table)
    if options.json:
        options.json.write_text(json.dumps({"engine": mode, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
