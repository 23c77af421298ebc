"""One attribution of a whole output against the package explaining every output token by itself.

The two answer different questions: the first is the proximity of the summed flow, the second the
sum of every token's proximities. Both are compared, and single tokens too, where they must agree.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.processes import WorkerMemory
from benchmarks.reference import ReferenceFailed, ReferenceRequest, Span, run_reference
from benchmarks.reference_process import SINK_CHUNK_TOKENS
from vllm_flashtrace.core.proximity import DEFAULT_EXACT_FRACTION
from vllm_flashtrace.core.weights import TargetWeights

if TYPE_CHECKING:
    from tests.engine.harness import Engine


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


def measure_ours(engine: Engine, case: PerTokenCase, repeats: int) -> OursPerToken:
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


def request(
    ours: OursPerToken, case: PerTokenCase, model: Path, threads: int, memory_limit_gib: float
) -> ReferenceRequest:
    """What the package has to explain, on the same tokens."""
    return ReferenceRequest(
        model=str(model),
        token_ids=ours.token_ids,
        target=(case.prompt, case.length),
        reasoning=None,
        mode="stored",
        threads=threads,
        memory_limit_gib=memory_limit_gib,
        per_token=case.ranges(),
    )


def compare(
    ours: OursPerToken, case: PerTokenCase, asked: ReferenceRequest, timeout: float
) -> dict[str, Any]:
    """Runs the package and sets the two side by side; a failure of it becomes a note."""
    from tests.engine.harness import relative_l1

    result: dict[str, Any] = {
        "prompt": case.prompt,
        "output": case.output,
        "seconds": ours.seconds,
        "peak_rss_mb": ours.peak_mb,
        "extra_mb": ours.peak_mb - ours.idle_mb,
    }
    try:
        theirs = run_reference(asked, timeout)
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
