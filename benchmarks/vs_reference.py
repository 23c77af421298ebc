"""A whole K = 1 attribution against the paper authors' package on the same weights and tokens.

Both sides explain a completion that has just been generated: ours finds its KV in the prefix cache,
the package does what it always does, a forward pass with attentions and then the hops. They run one
after the other, with as many threads; ours is timed from the first trace request to the result.

``--per-token`` compares one attribution of a whole output with the package explaining every output
token by itself. The two answer different questions: the first is the proximity of the summed flow,
the second the sum of every token's proximities; single tokens must agree.

    python -m benchmarks.vs_reference [--cases 600,200,20 2000,40,40] [--eager] [--json OUT]
    python -m benchmarks.vs_reference --cases --per-token 1000 [--per-token-sample 128]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track

from benchmarks import tables
from benchmarks.processes import WorkerMemory
from benchmarks.reference import (
    SINK_CHUNK_TOKENS,
    ReferenceFailed,
    ReferenceRequest,
    Span,
    run_reference,
)
from benchmarks.trace_latency import Bench, Case, start_engine
from vllm_flashtrace.core.hops import HopResult
from vllm_flashtrace.core.proximity import DEFAULT_EXACT_FRACTION
from vllm_flashtrace.core.weights import TargetWeights

if TYPE_CHECKING:
    from tests.engine.harness import Engine

CASES = ["600,200,20", "2000,1000,20", "2000,40,40"]


@dataclass(frozen=True)
class Ours:
    """One case through the engine."""

    token_ids: list[int]
    seconds: float
    scores: torch.Tensor
    recomputed_tokens: int
    idle_mb: float
    peak_mb: float


def measure_case(engine: Engine, case: Case, repeats: int) -> Ours:
    """Median seconds, the scores on the prompt, and the worker's memory."""
    bench = Bench(engine, case)
    engine.generate(bench.token_ids, 1)
    memory = WorkerMemory(engine)
    bench.trace()
    traces = [bench.trace() for _ in range(repeats)]
    reports = traces[-1][-1]
    return Ours(
        token_ids=list(bench.token_ids),
        seconds=statistics.median(trace[0] for trace in traces),
        scores=combine(case, [report.scores for report in reports]).scores[: case.prompt],
        recomputed_tokens=sum(report.recomputed_tokens for report in reports),
        idle_mb=memory.idle_mb,
        peak_mb=memory.peak_mb(),
    )


def combine(case: Case, hops: Sequence[torch.Tensor]) -> HopResult:
    """The hop formula on raw scores of each hop."""
    recursion = case.recursion()
    for hop in hops:
        case.add(recursion, hop)
    return recursion.result()


def row(ours: Ours, case: Case, threads: int, options: argparse.Namespace) -> dict[str, Any]:
    """Runs the package on the case and sets the two side by side."""
    from tests.engine.harness import relative_l1, top_overlap
    from vllm_flashtrace.models import prepare_smollm2

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
        model=str(prepare_smollm2()),
        token_ids=ours.token_ids,
        target=(case.context - case.output, case.context),
        reasoning=(case.prompt, case.prompt + case.reasoning),
        threads=threads,
        memory_limit_gib=options.memory_limit_gib,
        repeats=options.reference_repeats,
    )
    try:
        theirs = run_reference(request, options.reference_timeout)
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
        "reference_mode": "stored",
    }


@dataclass(frozen=True)
class PerTokenCase:
    """Token counts; ``sample`` output tokens are explained one by one, or all if it is None."""

    prompt: int
    output: int
    sample: int | None = None

    @property
    def length(self) -> int:
        """Number of tokens of the trace."""
        return self.prompt + self.output

    def ranges(self) -> list[Span]:
        """Tokens that the package explains: all, or blocks in the middle of equal parts.

        The package works in blocks of tokens, and a token's cost grows with its position; such
        blocks have the mean cost of all.
        """
        if self.sample is None or self.sample >= self.output:
            return [(self.prompt, self.length)]
        width = min(SINK_CHUNK_TOKENS, self.sample)
        count = self.sample // width
        middles = [self.prompt + (2 * i + 1) * self.output / (2 * count) for i in range(count)]
        return [
            (round(middle - width / 2), round(middle - width / 2) + width) for middle in middles
        ]


@dataclass(frozen=True)
class OursPerToken:
    """Seconds of the attribution of the whole output, and scores to compare."""

    token_ids: list[int]
    seconds: float
    whole: torch.Tensor
    explained: torch.Tensor
    singles: dict[int, torch.Tensor]
    idle_mb: float
    peak_mb: float


def measure_per_token(engine: Engine, case: PerTokenCase, repeats: int) -> OursPerToken:
    """Attributions without recursion, over the KV that generating has left."""
    from tests.engine.conftest import text_tokens
    from tests.engine.harness import TraceJob

    token_ids = text_tokens(engine, case.length)
    engine.generate(token_ids, 1)
    memory = WorkerMemory(engine)

    def trace(spans: list[Span]) -> torch.Tensor:
        weights = TargetWeights.from_spans(spans)
        length = weights.last + 1
        report = engine.trace(TraceJob(token_ids[:length], weights, DEFAULT_EXACT_FRACTION))
        scores = torch.zeros(case.length)
        scores[:length] = report.scores
        return scores

    whole = trace([(case.prompt, case.length)])
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        trace([(case.prompt, case.length)])
        seconds.append(time.perf_counter() - began)
    peak = memory.peak_mb()
    ranges = case.ranges()
    return OursPerToken(
        token_ids=token_ids,
        seconds=statistics.median(seconds),
        whole=whole,
        explained=trace(ranges),
        singles={at: trace([(at, at + 1)]) for at in _few_positions(ranges)},
        idle_mb=memory.idle_mb,
        peak_mb=peak,
    )


def per_token_row(
    ours: OursPerToken, case: PerTokenCase, threads: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Runs the package and sets the two side by side; a failure of it becomes a note."""
    from tests.engine.harness import relative_l1
    from vllm_flashtrace.models import prepare_smollm2

    asked = ReferenceRequest(
        model=str(prepare_smollm2()),
        token_ids=ours.token_ids,
        target=(case.prompt, case.length),
        reasoning=None,
        threads=threads,
        memory_limit_gib=options.memory_limit_gib,
        per_token=case.ranges(),
    )

    result: dict[str, Any] = {
        "prompt": case.prompt,
        "output": case.output,
        "seconds": ours.seconds,
        "peak_rss_mb": ours.peak_mb,
        "extra_mb": ours.peak_mb - ours.idle_mb,
    }
    try:
        theirs = run_reference(asked, options.reference_timeout)
    except ReferenceFailed as failure:
        return result | {"reference_note": str(failure)}
    ranges = asked.per_token
    explained = sum(end - begin for begin, end in ranges)
    overhead = theirs["overhead_seconds"]
    explaining = sum(seconds - overhead for seconds in theirs["range_seconds"])
    reference_seconds = theirs["forward_seconds"] + overhead + explaining * case.output / explained
    rows = theirs["rows"].double()
    row_of = {at: i for i, at in enumerate(at for span in ranges for at in range(*span))}
    total = rows.sum(dim=0)
    prompt = slice(0, case.prompt)
    return result | {
        "reference_seconds": reference_seconds,
        "reference_forward_seconds": theirs["forward_seconds"],
        "reference_span_seconds": theirs["forward_seconds"] + theirs["span_seconds"],
        "reference_peak_rss_mb": theirs["peak_rss_mb"],
        "speedup": reference_seconds / ours.seconds,
        "explained_tokens": explained,
        "extrapolated_from": explained if explained < case.output else None,
        "span_relative_l1": relative_l1(ours.whole, theirs["span_scores"]),
        "single_tokens": [
            {"position": at, "relative_l1": relative_l1(scores, rows[row_of[at]])}
            for at, scores in ours.singles.items()
        ],
        "against_sum_of_tokens": {
            "context": _agreement(ours.explained, total),
            "input": _agreement(ours.explained[prompt], total[prompt]),
        },
    }


def _few_positions(ranges: list[Span]) -> list[int]:
    positions = [at for span in ranges for at in range(*span)]
    return sorted({positions[0], positions[len(positions) // 2], positions[-1]})


def _agreement(ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, float]:
    from tests.engine.harness import relative_l1, top_overlap

    ours, theirs = ours.double(), theirs.double()
    top = min(10, ours.numel())
    return {
        "relative_l1": relative_l1(ours, theirs),
        "cosine": float(torch.nn.functional.cosine_similarity(ours, theirs, dim=0)),
        "top10_overlap": top_overlap(ours, theirs, top),
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
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
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs our side of every case, closes the engine, then runs the package."""
    options = parse(arguments)
    cases = [Case.parse(text) for text in options.cases]
    singly = None
    if options.per_token:
        sizes = (options.per_token_prompt, options.per_token, options.per_token_sample)
        singly = PerTokenCase(*sizes)
    longest = max([case.context for case in cases] + [singly.length if singly else 0])
    engine = start_engine(longest, options.eager)
    try:
        threads = engine.on_worker(lambda worker: torch.get_num_threads())
        measured = [measure_case(engine, case, options.repeats) for case in track(cases, "ours")]
        ours_singly = measure_per_token(engine, singly, options.repeats) if singly else None
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
    }
    pairs = list(zip(measured, cases, strict=True))
    rows = [row(ours, case, threads, options) for ours, case in track(pairs, "package")]
    result: dict[str, Any] = {"settings": settings, "rows": rows, "per_token": None}
    if singly and ours_singly:
        result["per_token"] = per_token_row(ours_singly, singly, threads, options)
    text = "\n\n".join([tables.vs_reference(result), tables.per_token(result)])
    tables.emit(result, text, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
