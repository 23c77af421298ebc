"""How the cost of a K = 1 attribution grows with context, reasoning and concurrency.

Exponents are slopes of least-squares lines in log-log: 1 means linear. Beside the attribution stand
its floor (the same prefill without a trace) and a plain prefill of the whole context, uncached.

    python -m benchmarks.scaling [--quick] [--eager] [--json OUT] [--plot OUT.png]
    python -m benchmarks.scaling --from-json IN --plot OUT.png
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.trace_latency import Bench, Case
from vllm_flashtrace.core.hops import HopRecursion
from vllm_flashtrace.core.proximity import DEFAULT_EXACT_FRACTION
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.models import prepare_smollm2

if TYPE_CHECKING:
    from tests.engine.harness import Engine

SHORT = 40
KV_CACHE_BYTES = 2 << 30
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Sweeps:
    """What is measured: each sweep varies one number and holds the others.

    Lengths are multiples of the KV block (128 tokens on the CPU), so that every point recomputes
    the same part of a block before its first target token.
    """

    contexts: tuple[int, ...] = (512, 1024, 2048, 4096, 8064)
    reasonings: tuple[int, ...] = (128, 384, 1024, 3072)
    reasoning_context: int = 4096
    concurrencies: tuple[int, ...] = (1, 2, 4, 8)
    concurrency_context: int = 2048

    @property
    def longest(self) -> int:
        """The longest trace in tokens."""
        return max(*self.contexts, self.reasoning_context, self.concurrency_context)

    @property
    def points(self) -> int:
        """Number of measured points."""
        return len(self.contexts) + len(self.reasonings) + len(self.concurrencies)


QUICK = Sweeps((256, 512, 1024), (128, 256, 384), 640, (1, 2, 4), 384)


def context_sweep(engine: Engine, sweeps: Sweeps, repeats: int, done: Callable[[], None]) -> Rows:
    """Growing context; reasoning and output stay short."""
    rows = []
    for context in sweeps.contexts:
        row = Bench(engine, Case(context, SHORT, SHORT)).row(repeats)
        row["uncached_prefill_seconds"] = statistics.median(
            _uncached_prefill(engine, context, f"Version {i}. ") for i in range(repeats)
        )
        rows.append(row)
        done()
    return rows


def reasoning_sweep(engine: Engine, sweeps: Sweeps, repeats: int, done: Callable[[], None]) -> Rows:
    """Growing reasoning inside a context of fixed length."""
    rows = []
    for reasoning in sweeps.reasonings:
        case = Case(sweeps.reasoning_context, reasoning, SHORT)
        rows.append(Bench(engine, case).row(repeats))
        done()
    return rows


def concurrency_sweep(
    engine: Engine, sweeps: Sweeps, repeats: int, done: Callable[[], None]
) -> Rows:
    """Several completions attributed together, every hop of all submitted at once."""
    rows = []
    for traces in sweeps.concurrencies:
        together = Together(engine, Case(sweeps.concurrency_context, SHORT, SHORT), traces)
        rows.append(together.row(repeats))
        done()
    return rows


class Together:
    """Attributions of different texts of one length, in lockstep."""

    def __init__(self, engine: Engine, case: Case, traces: int) -> None:
        """Leaves the KV of every text in the prefix cache."""
        from tests.engine.conftest import text_tokens

        self._engine = engine
        self._case = case
        self._texts = [text_tokens(engine, case.context, f"Document {i}. ") for i in range(traces)]
        for token_ids in self._texts:
            engine.generate(token_ids, 1)

    def trace(self) -> tuple[float, list[Any]]:
        """Seconds until all are finished, and every report."""
        from tests.engine.harness import TraceJob

        case, reports = self._case, []
        mask = torch.zeros(case.context, dtype=torch.bool)
        mask[case.prompt : case.prompt + case.reasoning] = True
        target = TargetWeights.from_spans([(case.context - case.output, case.context)])
        began = time.perf_counter()
        recursions = [
            HopRecursion(target, case.prompt, case.context, mask, hops=1) for _ in self._texts
        ]
        while (weights := [recursion.next_weights() for recursion in recursions])[0] is not None:
            jobs = [
                TraceJob(token_ids[: each.last + 1], each, DEFAULT_EXACT_FRACTION)
                for token_ids, each in zip(self._texts, weights, strict=True)
            ]
            hop = self._engine.trace_many(jobs)
            for recursion, report in zip(recursions, hop, strict=True):
                scores = torch.zeros(case.context)
                scores[: len(report.scores)] = report.scores
                recursion.add(scores)
            reports += hop
        for recursion in recursions:
            recursion.result()
        return time.perf_counter() - began, reports

    def row(self, repeats: int) -> dict[str, Any]:
        """Medians."""
        self.trace()
        runs = [self.trace() for _ in range(repeats)]
        seconds = statistics.median(seconds for seconds, _ in runs)

        def phase(name: str) -> float:
            return statistics.median(
                sum(report.seconds.get(name, 0.0) for report in reports) for _, reports in runs
            )

        traces = len(self._texts)
        return {
            "traces": traces,
            "context": self._case.context,
            "seconds": seconds,
            "seconds_per_trace": seconds / traces,
            "recording_seconds": phase("recording"),
            "proximity_seconds": phase("proximity"),
        }


def exponents(rows: Rows, variable: str) -> dict[str, float]:
    """Slope in log-log of every measured number of seconds against the variable."""
    fitted = {}
    for name in rows[0]:
        points = [(row[variable], row[name]) for row in rows if name.endswith("seconds")]
        points = [(x, y) for x, y in points if y > 0]
        if len({x for x, _ in points}) > 1:
            x, y = np.log(np.array(points, dtype=np.float64)).T
            fitted[name] = float(np.polyfit(x, y, 1)[0])
    return fitted


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the three sweeps on one engine."""
    from tests.engine.harness import Engine

    sweeps = QUICK if options.quick else Sweeps()
    engine = Engine(
        prepare_smollm2(),
        max_model_len=sweeps.longest + 8,
        enforce_eager=options.eager,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
    )
    kinds = (
        ("context", context_sweep, "context"),
        ("reasoning", reasoning_sweep, "reasoning"),
        ("concurrency", concurrency_sweep, "traces"),
    )
    result: dict[str, Any] = {
        "settings": {
            "model": "SmolLM2-135M",
            "dtype": "float32",
            "engine": "eager" if options.eager else "compiled",
            "repeats": options.repeats,
            "cores": os.cpu_count(),
            "reasoning_sweep_context": sweeps.reasoning_context,
            "concurrency_sweep_context": sweeps.concurrency_context,
            "short_span": SHORT,
        }
    }
    try:
        result["settings"]["threads"] = engine.on_worker(lambda worker: torch.get_num_threads())
        with Progress() as progress:
            task = progress.add_task("points", total=sweeps.points)
            for name, sweep, variable in kinds:
                rows = sweep(engine, sweeps, options.repeats, lambda: progress.advance(task))
                fitted = exponents(rows, variable)
                result[name] = {
                    "variable": variable,
                    "rows": rows,
                    "exponent": fitted["seconds"],
                    "exponents": fitted,
                }
                _write(result, options.json)
    finally:
        engine.close()
    return result


def main() -> None:
    """Measures, or reads what was measured, and shows it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few short cases")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="an engine without compilation")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--from-json", type=Path, help="show an earlier measurement")
    options = parser.parse_args()
    source = options.from_json
    result = json.loads(source.read_text()) if source else measure(options)
    _print(result, Console(width=150))
    if options.plot:
        from benchmarks.scaling_plot import plot

        plot(result, options.plot)


def _uncached_prefill(engine: Engine, length: int, salt: str) -> float:
    from tests.engine.conftest import text_tokens

    token_ids = text_tokens(engine, length, salt)
    began = time.perf_counter()
    engine.generate(token_ids, 1)
    return time.perf_counter() - began


def _write(result: dict[str, Any], path: Path | None) -> None:
    if path:
        path.write_text(json.dumps(result, indent=1) + "\n")


def _print(result: dict[str, Any], console: Console) -> None:
    for name in ("context", "reasoning", "concurrency"):
        sweep = result[name]
        columns = [sweep["variable"]]
        columns += [column for column in sweep["rows"][0] if "seconds" in column]
        table = Table(title=f"{name}: seconds of K = 1 attributions; last line: exponents")
        for column in columns:
            table.add_column(column.replace("_seconds", "").replace("_", " "))
        for row in sweep["rows"]:
            table.add_row(str(row[columns[0]]), *(f"{row[c]:.2f}" for c in columns[1:]))
        fitted = sweep["exponents"]
        cells = [f"{fitted[c]:.2f}" if c in fitted else "" for c in columns[1:]]
        table.add_section()
        table.add_row("", *cells)
        console.print(table)


if __name__ == "__main__":
    main()
