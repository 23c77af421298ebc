"""One hop as an engine request, for the server and offline alike.

Invariant: what goes into the engine is a prefill that ends at the last target position, and what
comes out is either a report of that prefill or a TraceError.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from vllm import SamplingParams, TokensPrompt
from vllm.sampling_params import RequestOutputKind

from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.base.records import TraceReport, TraceUsage
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.trace.config import FlashTraceConfig
from vllm_flashtrace.trace.wire import EXTRA_ARGS_KEY, TraceSpec, seal

if TYPE_CHECKING:
    from vllm_flashtrace.text.plan import TracePlan


@dataclass(frozen=True, slots=True)
class TraceCall:
    """One hop as an engine request."""

    spec: TraceSpec
    prompt: TokensPrompt
    params: SamplingParams


def trace_call(
    plan: TracePlan, weights: TargetWeights, config: FlashTraceConfig, cache_salt: str | None
) -> TraceCall:
    """The engine request that records one hop: a prefill up to the last target position."""
    token_ids = plan.token_ids[: weights.last + 1]
    spec = TraceSpec.create(
        weights,
        len(token_ids),
        exact_fraction=config.exact_fraction,
        layers="layers" in plan.request.include,
    )
    prompt = TokensPrompt(prompt_token_ids=token_ids)
    if cache_salt is not None:
        prompt["cache_salt"] = cache_salt
    params = SamplingParams(
        max_tokens=1,
        temperature=0.0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={EXTRA_ARGS_KEY: seal(spec)},
    )
    return TraceCall(spec, prompt, params)


def take_report(
    plan: TracePlan, usage: TraceUsage, report: TraceReport, engine_seconds: float
) -> None:
    """Adds a hop's scores to the recursion and its cost to the usage.

    Args:
        plan: The plan whose recursion awaits the hop.
        usage: Cost of the attribution so far.
        report: What the engine measured.
        engine_seconds: Time from handing the hop to the engine to its report.

    Raises:
        TraceError: ``bad_scores`` when the recursion refuses the scores.
    """
    try:
        plan.recursion.add(*padded_scores(report, len(plan.token_ids)))
    except ValueError as error:
        raise TraceError("bad_scores", str(error)) from error
    usage.add(with_phases(report, engine_seconds))


def with_phases(report: TraceReport, engine_seconds: float) -> TraceReport:
    """Adds what only the caller can time: how long the request waited inside the engine."""
    phases = report.seconds
    attribution = phases.get("recording", 0.0) + phases.get("proximity", 0.0)
    return dataclasses.replace(
        report,
        seconds={
            "queue": max(0.0, engine_seconds - sum(phases.values())),
            "prefill": phases.get("prefill", 0.0),
            "attribution": attribution,
        },
    )


def padded_scores(report: TraceReport, length: int) -> tuple[Tensor, Tensor | None]:
    """A hop's scores over the whole trace: tokens after its last target contribute nothing."""
    missing = length - report.scores.shape[0]
    if missing <= 0:  # Too many scores are for the recursion to refuse.
        return report.scores, report.layer_scores
    scores = report.scores.new_zeros(length)
    scores[:-missing] = report.scores
    if report.layer_scores is None:
        return scores, None
    layers = report.layer_scores.new_zeros(report.layer_scores.shape[0], length)
    layers[:, :-missing] = report.layer_scores
    return scores, layers
