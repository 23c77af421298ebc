"""A whole K = 1 attribution against the paper authors' package on the same weights and tokens.

Both sides explain a completion that has just been generated: ours finds its KV in the prefix cache,
the package does what it always does, a forward pass with attentions and then the hops. They run one
after the other, with as many threads; ours is timed from the first trace request to the result.

    python -m benchmarks.vs_reference [--cases 600,200,20 2000,40,40] [--eager] [--json OUT]
    python -m benchmarks.vs_reference --cases --per-token 1000 [--per-token-sample 128]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import per_token
from benchmarks.processes import WorkerMemory
from benchmarks.reference import ReferenceFailed, ReferenceRequest, run_in_fitting_mode
from benchmarks.trace_latency import Bench, Case
from vllm_flashtrace.core.hops import HopRecursion, HopResult
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.models import prepare_smollm2

if TYPE_CHECKING:
    from tests.engine.harness import Engine

CASES = ["600,200,20", "2000,1000,20", "2000,40,40"]
KV_CACHE_BYTES = 2 << 30


@dataclass(frozen=True)
class Ours:
    """One case through the engine."""

    token_ids: list[int]
    seconds: float
    scores: torch.Tensor
    recomputed_tokens: int
    idle_mb: float
    peak_mb: float


def measure_ours(engine: Engine, case: Case, repeats: int) -> Ours:
    """Median seconds, the scores on the prompt, and the worker's memory."""
    bench = Bench(engine, case)
    engine.generate(bench.token_ids, 1)
    memory = WorkerMemory(engine)
    bench.trace()
    traces = [bench.trace() for _ in range(repeats)]
    reports = traces[-1][1]
    return Ours(
        token_ids=list(bench.token_ids),
        seconds=statistics.median(seconds for seconds, _ in traces),
        scores=combine(case, [report.scores for report in reports]).scores[: case.prompt],
        recomputed_tokens=sum(report.recomputed_tokens for report in reports),
        idle_mb=memory.idle_mb,
        peak_mb=memory.peak_mb(),
    )


def combine(case: Case, hops: Sequence[torch.Tensor]) -> HopResult:
    """The hop formula on raw scores of each hop."""
    mask = torch.zeros(case.context, dtype=torch.bool)
    mask[case.prompt : case.prompt + case.reasoning] = True
    target = TargetWeights.from_spans([(case.context - case.output, case.context)])
    recursion = HopRecursion(target, case.prompt, case.context, mask, hops=len(hops) - 1)
    for hop in hops:
        scores = torch.zeros(case.context)
        scores[: len(hop)] = hop
        recursion.add(scores)
    return recursion.result()


def row(
    ours: Ours, case: Case, model: Path, threads: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Runs the package on the case and sets the two side by side."""
    from tests.engine.harness import relative_l1, top_overlap

    result: dict[str, Any] = {
        "context": case.context,
        "reasoning": case.reasoning,
        "output": case.output,
        "recomputed_tokens": ours.recomputed_tokens,
        "seconds": ours.seconds,
        "peak_rss_mb": ours.peak_mb,
        "extra_mb": ours.peak_mb - ours.idle_mb,
    }
    request = ReferenceRequest(
        model=str(model),
        token_ids=ours.token_ids,
        target=(case.context - case.output, case.context),
        reasoning=(case.prompt, case.prompt + case.reasoning),
        mode="stored",
        threads=threads,
        memory_limit_gib=options.memory_limit_gib,
        repeats=options.reference_repeats,
    )
    try:
        theirs, mode, note = run_in_fitting_mode(request, options.reference_timeout)
    except ReferenceFailed as failure:
        return result | {"reference_mode": "failed", "reference_note": str(failure)}
    reference_seconds = statistics.median(theirs["seconds"])
    expected = combine(case, list(theirs["hops"])).scores[: case.prompt]
    observed = theirs["observation"][: case.prompt]
    return result | {
        "reference_seconds": reference_seconds,
        "speedup": reference_seconds / ours.seconds,
        "relative_l1": relative_l1(ours.scores, expected),
        # The package adds hops before it normalises them, which shifts their weights a little.
        "relative_l1_unnormalised_hops": relative_l1(ours.scores, observed),
        "top10_overlap": top_overlap(ours.scores, expected, min(10, case.prompt)),
        "reference_peak_rss_mb": theirs["peak_rss_mb"],
        "reference_extra_mb": theirs["peak_rss_mb"] - theirs["idle_rss_mb"],
        "reference_mode": mode,
        "reference_note": note,
    }


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="*", default=CASES, help="context,reasoning,output")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--reference-repeats", type=int, default=1)
    parser.add_argument("--reference-timeout", type=float, default=3600, help="seconds of a run")
    parser.add_argument("--memory-limit-gib", type=float, default=20, help="for the package")
    parser.add_argument("--eager", action="store_true", help="an engine without compilation")
    parser.add_argument("--per-token", type=int, help="output tokens of the per-token comparison")
    parser.add_argument("--per-token-prompt", type=int, default=100)
    parser.add_argument(
        "--per-token-sample", type=int, help="explain so many output tokens and extrapolate"
    )
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Runs our side of every case, closes the engine, then runs the package."""
    from tests.engine.harness import Engine

    options = parse_options()
    cases = [Case.parse(text) for text in options.cases]
    singly = None
    if options.per_token:
        singly = per_token.PerTokenCase(
            options.per_token_prompt, options.per_token, options.per_token_sample
        )
    longest = max([case.context for case in cases] + [singly.length if singly else 0])
    model = prepare_smollm2()
    engine = Engine(
        model,
        max_model_len=longest + 8,
        enforce_eager=options.eager,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
    )
    try:
        threads = engine.on_worker(lambda worker: torch.get_num_threads())
        measured = [measure_ours(engine, case, options.repeats) for case in track(cases, "ours")]
        singly_ours = per_token.measure_ours(engine, singly, options.repeats) if singly else None
    finally:
        engine.close()

    settings = {
        "model": "SmolLM2-135M",
        "dtype": "float32",
        "engine": "eager" if options.eager else "compiled",
        "threads": threads,
        "package": f"flashtrace {metadata.version('flashtrace')}",
        "repeats": options.repeats,
        "reference_repeats": options.reference_repeats,
        "memory_limit_gib": options.memory_limit_gib,
        "kv_cache_mb": KV_CACHE_BYTES >> 20,
    }
    result: dict[str, Any] = {"settings": settings, "rows": [], "per_token": None}
    console = Console(width=150)
    for case, ours in zip(cases, track(measured, "package"), strict=True):
        result["rows"].append(row(ours, case, model, threads, options))
        _write(result, options.json)
    if singly and singly_ours:
        with console.status(f"package explains {singly.output} tokens one by one"):
            request = per_token.request(
                singly_ours, singly, model, threads, options.memory_limit_gib
            )
            result["per_token"] = per_token.compare(
                singly_ours, singly, request, options.reference_timeout
            )
        _write(result, options.json)
    _print(result, console)


def _write(result: dict[str, Any], path: Path | None) -> None:
    if path:
        path.write_text(json.dumps(result, indent=1) + "\n")


def _print(result: dict[str, Any], console: Console) -> None:
    settings = result["settings"]
    columns = [
        "context",
        "reasoning",
        "output",
        "seconds",
        "reference_seconds",
        "speedup",
        "relative_l1",
        "top10_overlap",
        "peak_rss_mb",
        "extra_mb",
        "reference_peak_rss_mb",
        "reference_mode",
    ]
    if result["rows"]:
        table = Table(
            title=f"K = 1 attribution, {settings['model']} {settings['dtype']}, "
            f"{settings['engine']} engine, against {settings['package']}, "
            f"threads of each: {settings['threads']}"
        )
        for name in columns:
            table.add_column(name.replace("_", " "))
        for measured in result["rows"]:
            table.add_row(*(_cell(name, measured.get(name)) for name in columns))
        console.print(table)
        for measured in result["rows"]:
            if measured.get("reference_note"):
                console.print(f"context {measured['context']}: {measured['reference_note']}")
    if (singly := result["per_token"]) is not None:
        table = Table(title=f"{singly['output']} output tokens explained", show_header=False)
        for name, value in singly.items():
            text = json.dumps(value) if isinstance(value, dict | list) else _cell(name, value)
            table.add_row(name.replace("_", " "), text)
        console.print(table)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if "relative_l1" in name:
        return f"{value:.1e}"
    if name.endswith("_mb"):
        return f"{value:.0f}"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
