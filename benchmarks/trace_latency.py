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
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track

from benchmarks.processes import WorkerMemory
from benchmarks.tables import emit
from benchmarks.tables import trace_latency as table
from vllm_flashtrace.core.hops import HopRecursion
from vllm_flashtrace.core.proximity import DEFAULT_EXACT_FRACTION
from vllm_flashtrace.core.weights import TargetWeights

if TYPE_CHECKING:
    from tests.engine.harness import Engine

KV_CACHE_BYTES = 2 << 30
SMALL_CASES = ["600,200,20", "2000,40,40"]
ALL_CASES = ["600,200,20", "2000,1000,20", "2000,40,40", "6000,40,40", "8000,4000,40"]


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

    def recursion(self, hops: int = 1) -> HopRecursion:
        """So many hops from the output through the reasoning."""
        mask = torch.zeros(self.context, dtype=torch.bool)
        mask[self.prompt : self.prompt + self.reasoning] = True
        target = TargetWeights.from_spans([(self.context - self.output, self.context)])
        return HopRecursion(target, self.prompt, self.context, mask, hops=hops)

    def add(self, recursion: HopRecursion, report: Any) -> None:
        """Adds the scores of a request's hops, which may end before the context does."""
        for scores in (report.scores, *report.later_scores):
            whole = torch.zeros(self.context)
            whole[: len(scores)] = scores
            recursion.add(whole)


def attribute_together(
    engine: Engine, case: Case, texts: Sequence[list[int]], at_once: int | None = None
) -> list[Any]:
    """Attributes several texts of a case in lockstep; returns the reports of all hops.

    The next request of all of them, or of ``at_once`` at a time, is submitted before the engine
    runs.
    """
    from tests.engine.harness import TraceJob

    recursions, reports = [case.recursion() for _ in texts], []
    open_ones = list(zip(texts, recursions, strict=True))
    while open_ones:
        hops = [(t, r, w) for t, r in open_ones if (w := r.next_weights()) is not None]
        step = at_once or max(1, len(hops))
        for part in (hops[first : first + step] for first in range(0, len(hops), step)):
            jobs = [TraceJob(text[: w.last + 1], w, DEFAULT_EXACT_FRACTION) for text, _, w in part]
            found = engine.trace_many(jobs)
            for (_, recursion, _), report in zip(part, found, strict=True):
                case.add(recursion, report)
            reports += found
        open_ones = [(text, recursion) for text, recursion, _ in hops]
    for recursion in recursions:
        recursion.result()
    return reports


class Bench:
    """Runs one case on a shared engine.

    Attributes:
        keeps: Whether all hops come from one prefill.
        hops: Hops through the reasoning.
    """

    def __init__(self, engine: Engine, case: Case, token_ids: list[int] | None = None) -> None:
        """Takes text of the engine's tokenizer unless tokens are given."""
        self.keeps, self.hops = False, 1
        if token_ids is None:
            from tests.engine.conftest import text_tokens

            token_ids = text_tokens(engine, case.context)
        self.engine, self.case, self.token_ids = engine, case, token_ids
        self._variant = 0

    def trace(self) -> tuple[float, float, list[Any]]:
        """One attribution.

        Returns:
            Its seconds, those that the caller spent beside the engine's steps, and the report of
            each request.
        """
        from tests.engine.harness import TraceJob

        reports, engine_seconds = [], 0.0
        began = time.perf_counter()
        recursion = self.case.recursion(self.hops)
        while (weights := recursion.next_weights()) is not None:
            further = recursion.further_hops() if self.keeps else None
            text = self.token_ids[: weights.last + 1]
            job = TraceJob(text, weights, DEFAULT_EXACT_FRACTION, further=further)
            entered = time.perf_counter()
            _, nonce = self.engine.submit(job)
            self.engine.run()
            engine_seconds += time.perf_counter() - entered
            reports.append(self.engine.collect(nonce))
            self.case.add(recursion, reports[-1])
        recursion.result()
        seconds = time.perf_counter() - began
        return seconds, seconds - engine_seconds, reports

    def floor(self, reports: list[Any]) -> float:
        """Prefills what the requests prefilled, behind the same prefix, without a trace."""
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
        self.floor(self.trace()[-1])  # Compiles kernels, as the floor may.
        extra_mb = memory.peak_mb() - (memory.idle_mb if idle_mb is None else idle_mb)
        traces, floors = [], []
        for _ in range(repeats):
            traces.append(self.trace())
            floors.append(self.floor(traces[-1][-1]))
        seconds, transport = (statistics.median(trace[i] for trace in traces) for i in (0, 1))
        floor, reports = statistics.median(floors), traces[-1][-1]

        def phase(name: str) -> float:
            return statistics.median(sum(r.seconds[name] for r in hops) for _, _, hops in traces)

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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=SMALL_CASES, help="or: all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="an engine without compilation")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    cases = [Case.parse(t) for t in (ALL_CASES if options.cases == ["all"] else options.cases)]
    engine = start_engine(max(case.context for case in cases), options.eager)
    try:
        benches = [Bench(engine, case) for case in cases]
        for bench in benches:
            engine.generate(bench.token_ids, 1)
        engine.on_worker(touch_kv_cache)
        idle_mb = WorkerMemory(engine).idle_mb
        rows = [bench.row(options.repeats, idle_mb) for bench in track(benches, "cases")]
    finally:
        engine.close()
    result = {"engine": "eager" if options.eager else "compiled", "rows": rows}
    emit(result, table(result), options.json)
    return 0


def start_engine(longest: int, eager: bool) -> Engine:
    """SmolLM2-135M in float32 with room for contexts of so many tokens.

    Its preparation is imported here: it needs gguf, which machines that only use `Bench` may lack.
    """
    from tests.engine.harness import Engine
    from vllm_flashtrace.models import prepare_smollm2

    return Engine(
        prepare_smollm2(),
        "a benchmark",
        max_model_len=longest + 8,
        enforce_eager=eager,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
    )


if __name__ == "__main__":
    sys.exit(main())
