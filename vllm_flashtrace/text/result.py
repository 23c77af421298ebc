"""The ``flashtrace`` object of a response.

Invariant: every number in it is finite and plain JSON, and the masses of a completed attribution
add up to one; otherwise there is no result but a TraceError.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from vllm_flashtrace.base.errors import FlashTraceError, TraceError
from vllm_flashtrace.base.records import TraceUsage
from vllm_flashtrace.core.hops import HopMass, HopResult
from vllm_flashtrace.text.plan import TracePlan
from vllm_flashtrace.text.segments import segments
from vllm_flashtrace.text.sentences import sentences

OBJECT = "flashtrace.attribution"
# Refusals that say nothing about the trace: the same request may succeed later.
_SKIPPED = frozenset({"overloaded"})
_TOLERANCE = 1e-4


def build_result(
    plan: TracePlan, result: HopResult, usage: TraceUsage, trace_id: str
) -> dict[str, Any]:
    """Puts the outcome of all hops into the public form.

    Args:
        plan: The plan that was run.
        result: What the hops added up to.
        usage: What they cost.
        trace_id: Id of the attribution.

    Raises:
        TraceError: ``mass_imbalance`` when masses do not add up to 1, ``bad_scores`` when a number
            is not finite or negative, ``no_layer_scores`` when layers were asked for but not
            measured.
    """
    _check_balance(result)
    scores = _numbers(result.scores[: plan.prompt_length])
    data: dict[str, Any] = {
        "id": trace_id,
        "object": OBJECT,
        "status": "completed",
        "target": {"text": plan.target_text, "tokens": [list(s) for s in plan.target_spans]},
        "scores": [_score(plan, i, scores[i]) for i in _chosen(scores, plan.request.top_k)],
        "prompt_tokens": plan.prompt_length,
        "input_mass": result.input_mass,
        "remaining_mass": result.remaining_mass,
        "target_mass": result.target_mass,
        "skipped_mass": result.skipped_mass,
        "hops": [_hop(mass) for mass in result.hops],
    }
    data |= _inclusions(plan, result, scores)
    if "hops" in plan.request.include:
        for hop, hop_scores in zip(data["hops"], result.per_hop_scores, strict=True):
            hop["scores"] = _numbers((hop_scores * plan.input_mask)[: plan.prompt_length])
    data["usage"] = {
        "recomputed_tokens": int(usage.recomputed_tokens),
        "cached_tokens": int(usage.cached_tokens),
        "seconds": {phase: float(value) for phase, value in usage.seconds.items()},
    }
    if plan.dropped_target_tokens:
        data["usage"]["dropped_target_tokens"] = plan.dropped_target_tokens
    return data


def failed_result(
    trace_id: str, error: FlashTraceError, status: Literal["failed", "skipped"] | None = None
) -> dict[str, Any]:
    """The object of an attribution that has no result; by default its code decides the status."""
    if status is None:
        status = "skipped" if error.code in _SKIPPED else "failed"
    return {"id": trace_id, "object": OBJECT, "status": status, "error": error.to_dict()}


def _check_balance(result: HopResult) -> None:
    parts = (result.input_mass, result.remaining_mass, result.target_mass, result.skipped_mass)
    total = math.fsum(parts)
    if not abs(total - 1) <= _TOLERANCE:
        raise TraceError(
            "mass_imbalance", f"the masses of the attribution add up to {total}, not 1"
        )
    scored = float(result.scores.sum())
    if not abs(scored - result.input_mass) <= _TOLERANCE:
        raise TraceError(
            "mass_imbalance",
            f"the scores add up to {scored}, but the input mass is {result.input_mass}",
        )


def _numbers(scores: Tensor) -> list[float]:
    if not scores.isfinite().all() or (scores < 0).any():
        raise TraceError("bad_scores", "a score is negative or not finite")
    numbers: list[float] = scores.tolist()
    return numbers


def _chosen(scores: Sequence[float], top_k: int | None) -> list[int]:
    """Indices to return: all in order, or the highest above 0 first, ties in prompt order."""
    if top_k is None:
        return list(range(len(scores)))
    positive = [i for i, score in enumerate(scores) if score > 0]
    return sorted(positive, key=lambda i: (-scores[i], i))[:top_k]


def _score(plan: TracePlan, index: int, score: float) -> dict[str, Any]:
    located = plan.prompt_map.tokens[index]
    return {
        "index": index,
        "token": plan.prompt.token(index),
        "token_id": int(plan.token_ids[index]),
        "score": score,
        **(located.to_dict() if located is not None else {}),
    }


def _hop(mass: HopMass) -> dict[str, Any]:
    return {
        "hop": mass.hop,
        "input_mass": mass.input_mass,
        "reasoning_mass": mass.reasoning_mass,
        "target_mass": mass.target_mass,
        "skipped_mass": mass.skipped_mass,
    }


def _inclusions(plan: TracePlan, result: HopResult, scores: list[float]) -> dict[str, Any]:
    """The optional parts that the request asks for."""
    include = plan.request.include
    data: dict[str, Any] = {}
    if "segments" in include:
        data["segments"] = segments(plan.prompt_map, plan.completion.messages, scores)
    if "sentences" in include:
        found = sentences(plan.prompt_map, plan.completion, scores)
        best = _chosen([entry["mean"] for entry in found], plan.request.top_k)
        data["sentences"] = [found[i] for i in best]
    if "generated" in include:
        data["generated"] = _generated(plan, result)
    if "layers" in include:
        if result.layer_scores is None:
            raise TraceError("no_layer_scores", "scores per layer were asked for but not measured")
        data["layers"] = [_numbers(layer[: plan.prompt_length]) for layer in result.layer_scores]
    if "tokens" in include:
        data["tokens"] = plan.prompt.pieces()
    return data


def _generated(plan: TracePlan, result: HopResult) -> list[dict[str, Any]]:
    """Every generated token; those behind the last target position have no influence on it.

    Hidden tokens have a score but no text and no id.
    """
    traced = _numbers(result.generated_scores[plan.prompt_length :])
    token_ids = plan.completion.generated_token_ids
    scores = [*traced, *[0.0] * (len(token_ids) - len(traced))]
    hidden = plan.generated.hidden
    rows = zip(plan.generated.full.pieces(), token_ids, scores, strict=True)
    return [
        {
            "index": i,
            **({} if i < hidden else {"token": token, "token_id": int(token_id)}),
            "score": score,
        }
        for i, (token, token_id, score) in enumerate(rows)
    ]
