"""Hops as engine requests: a prefill that ends at the last target position, and its report.

A request runs one hop, or all of them where the worker keeps the rows that later hops weigh.

`trace_call` and `take_report` serve the server and offline jobs alike; `run_hop` runs the request
on vLLM's asynchronous engine.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor
from vllm import SamplingParams, TokensPrompt
from vllm.sampling_params import RequestOutputKind

from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.base.records import TraceReport, TraceUsage
from vllm_flashtrace.core.hops import FurtherHops
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.trace.budget import AccumulatorBudget
from vllm_flashtrace.trace.config import FlashTraceConfig
from vllm_flashtrace.trace.engines import Engines, noting_ranks
from vllm_flashtrace.trace.pickup import carried_answer, pick_up
from vllm_flashtrace.trace.wire import EXTRA_ARGS_KEY, TraceSpec, seal

if TYPE_CHECKING:
    from vllm_flashtrace.text.plan import TracePlan

CHECK_SECONDS = 0.5
"""How often `while_alive` looks whether the engines live."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TraceCall:
    """One hop as an engine request."""

    spec: TraceSpec
    prompt: TokensPrompt
    params: SamplingParams


def kept_rows(plan: TracePlan, budget: AccumulatorBudget | None) -> int:
    """Rows that a worker is to keep for the hops after the first; 0 where each has its prefill.

    With one hop behind the first, both ways prefill the same rows, and keeping them takes memory.
    Scores per layer come from hops that have their own: a worker holds those of one hop at a time.
    """
    further, weights = plan.recursion.further_hops(), plan.recursion.next_weights()
    if budget is None or further is None or weights is None or further.hops < 2:
        return 0
    if "layers" in plan.request.include:
        return 0
    rows = len(further.rows(weights))
    return rows if budget.keeps(len(plan.token_ids), rows) else 0


def trace_call(
    plan: TracePlan,
    weights: TargetWeights,
    config: FlashTraceConfig,
    cache_salt: str | None,
    *,
    further: FurtherHops | None = None,
) -> TraceCall:
    """The engine request that records a hop: a prefill up to the last target position.

    Args:
        plan: The attribution.
        weights: Target of the hop.
        config: Options of the server.
        cache_salt: The completion's.
        further: Hops that the worker is to run after it.
    """
    token_ids = plan.token_ids[: weights.last + 1]
    spec = TraceSpec.create(
        weights,
        len(token_ids),
        exact_fraction=config.exact_fraction,
        layers="layers" in plan.request.include,
        further=further,
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


@dataclass(frozen=True, slots=True)
class EngineContext:
    """What a trace request must share with the completion it explains.

    Attributes:
        cache_salt: Without the same salt the prefix cache would miss.
        lora_request: The adapter the completion was generated with.
        priority: Scheduling priority.
        trace_headers: OpenTelemetry headers.
        data_parallel_rank: Engine that served the completion; None if there is only one, or if any
            will do.
        request_id: vLLM's id of the completion, for logs and spans.
    """

    cache_salt: str | None = None
    lora_request: Any | None = None
    priority: int = 0
    trace_headers: Mapping[str, str] | None = None
    data_parallel_rank: int | None = None
    request_id: str | None = None


@dataclass(frozen=True, slots=True)
class HopRun:
    """What became of a hop.

    Attributes:
        report: What the workers measured.
        rank: The engine it ran on; None if there is only one.
        cached_tokens: Tokens that the scheduler found in the prefix cache.
    """

    report: TraceReport
    rank: int | None
    cached_tokens: int | None


async def run_hop(
    engines: Engines,
    call: TraceCall,
    context: EngineContext,
    request_id: str,
    trace_headers: Mapping[str, str] | None,
) -> HopRun:
    """Runs one trace request and returns what the workers measured.

    Args:
        engines: The server's engines.
        call: The trace request.
        context: What it shares with the completion.
        request_id: Its id in the engine.
        trace_headers: Parent of vLLM's own spans of the request.

    Raises:
        TraceError: ``engine_dead``, ``aborted``, or what a worker says went wrong.
        asyncio.CancelledError: The engine's request is aborted.
    """
    return await while_alive(engines, _run(engines, call, context, request_id, trace_headers))


async def _run(
    engines: Engines,
    call: TraceCall,
    context: EngineContext,
    request_id: str,
    trace_headers: Mapping[str, str] | None,
) -> HopRun:
    outputs: list[Any] = []
    ranks: list[int] = []
    cached: int | None = None
    carried: bytes | None = None
    with noting_ranks(ranks):
        async for output in engines.client.generate(
            call.prompt,
            call.params,
            request_id,
            lora_request=context.lora_request,
            trace_headers=trace_headers,
            priority=context.priority,
            data_parallel_rank=context.data_parallel_rank,
        ):
            outputs, cached = output.outputs, output.num_cached_tokens
            carried = carried_answer(output)
    if any(output.finish_reason == "abort" for output in outputs):
        raise TraceError("aborted", "the engine aborted the trace (sleep, pause or shutdown)")
    rank = ranks[0] if ranks else context.data_parallel_rank
    report = await pick_up(call.spec.nonce, functools.partial(engines.call, rank), carried)
    return HopRun(report, rank, cached)


async def while_alive(engines: Engines, work: Coroutine[Any, Any, T]) -> T:
    """Awaits ``work`` for as long as the engines live.

    An engine that dies or is shut down leaves calls to its workers unanswered for ever; this raises
    within `CHECK_SECONDS`.

    Raises:
        TraceError: ``engine_dead``, after cancelling ``work``.
    """
    task = asyncio.create_task(work)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=CHECK_SECONDS)
            if not task.done() and engines.errored:
                raise TraceError("engine_dead", "the engine has stopped")
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def take_report(
    plan: TracePlan, usage: TraceUsage, report: TraceReport, engine_seconds: float
) -> None:
    """Adds the scores of a request's hops to the recursion and its cost to the usage.

    Args:
        plan: The plan whose recursion awaits the hop.
        usage: Cost of the attribution so far.
        report: What the engine measured.
        engine_seconds: Time from handing the hop to the engine to its report.

    Raises:
        TraceError: ``bad_scores`` when the recursion refuses the scores, ``weights_changed`` when
            the hop was not computed with the weights of the hop before.
    """
    if usage.weights not in (None, report.weights):
        raise TraceError("weights_changed", "the model's weights changed between two hops")
    try:
        length = len(plan.token_ids)
        plan.recursion.add(*padded_scores(report, length))
        for scores in report.later_scores:
            if plan.recursion.next_weights() is not None:
                plan.recursion.add(*padded_scores(TraceReport(scores), length))
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
