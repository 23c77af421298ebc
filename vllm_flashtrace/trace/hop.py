"""Hops as engine requests: a prefill that ends at the last target position, and its report.

A request runs one hop, or all of them, also of several targets, where the worker keeps the rows
that they weigh.

`visits` and `take_report` serve the server and offline jobs alike; `run_hop` runs the request on
vLLM's asynchronous engine.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import math
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from vllm import SamplingParams, TokensPrompt
from vllm.sampling_params import RequestOutputKind

from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.base.records import TraceReport, TraceUsage
from vllm_flashtrace.core.hops import TracedTarget
from vllm_flashtrace.trace.budget import AccumulatorBudget
from vllm_flashtrace.trace.config import FlashTraceConfig
from vllm_flashtrace.trace.engines import Engines, noting_ranks
from vllm_flashtrace.trace.multimodal import PromptImages
from vllm_flashtrace.trace.pickup import carried_answer, pick_up
from vllm_flashtrace.trace.wire import EXTRA_ARGS_KEY, Spec, TraceSpec, seal

if TYPE_CHECKING:
    from vllm_flashtrace.text.plan import TracePlan

CHECK_SECONDS = 0.5
"""How often `while_alive` looks whether the engines live."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TraceCall:
    """A trace request: one hop of an attribution, or all hops of some whose rows are kept.

    Attributes:
        plans: Whose next hops it runs, one target each.
        spec: What the worker is to record.
        prompt: The tokens up to the last target.
        params: Carries the spec.
    """

    plans: tuple[TracePlan, ...]
    spec: TraceSpec
    prompt: TokensPrompt
    params: SamplingParams

    @property
    def target_tokens(self) -> int:
        """Target positions of its first hops."""
        return sum(len(target.positions) // 4 for target in self.spec.targets)


@dataclass(frozen=True, slots=True)
class Visit:
    """Targets of one completion that are traced together.

    Attributes:
        plans: One for each target.
        kept_rows: Rows that a worker is to keep, so that one prefill does for all hops of all; 0
            where each hop of the only one has its own.
    """

    plans: tuple[TracePlan, ...]
    kept_rows: int = 0

    @property
    def context(self) -> int:
        """Tokens of its longest request."""
        return max(len(plan.token_ids) for plan in self.plans)

    def next_call(self, config: FlashTraceConfig, context: EngineContext) -> TraceCall | None:
        """The next request; None when all hops are run.

        Args:
            config: Options of the server.
            context: What it shares with the completion.
        """
        pending = [
            (plan, target)
            for plan in self.plans
            if (target := plan.recursion.next_target()) is not None
        ]
        if not pending:
            return None
        plans, targets = zip(*pending, strict=True)
        if not self.kept_rows:
            targets = (TracedTarget(targets[0].weights),)
        return _trace_call(plans, targets, config, context)


def visits(plans: Sequence[TracePlan], budget: AccumulatorBudget | None) -> list[Visit]:
    """Puts the targets of one completion together, as far as a worker may keep their rows.

    With one hop behind the only target's first, both ways prefill the same rows, and keeping them
    takes memory. Scores per layer and sums of attention come from hops that have their own: a
    worker holds those of one hop at a time.

    Args:
        plans: One for each target.
        budget: What a worker may keep; None where it is not known.
    """
    found: list[Visit] = []
    rows = torch.empty(0, dtype=torch.int64)
    for plan in plans:
        target = plan.recursion.next_target()
        own = rows[:0] if target is None else target.rows
        if found:
            joined = torch.cat([rows, own]).unique()
            visit = Visit((*found[-1].plans, plan), len(joined))
            if _may_keep(visit, budget):
                found[-1], rows = visit, joined
                continue
        visit, rows = Visit((plan,), len(own)), own
        further = None if target is None else target.further
        keeps = further is not None and further.hops > 1 and _may_keep(visit, budget)
        found.append(visit if keeps else Visit((plan,)))
    return found


def _may_keep(visit: Visit, budget: AccumulatorBudget | None) -> bool:
    """Whether a worker may keep the rows of a visit."""
    include = visit.plans[0].request.include
    if budget is None or "layers" in include or "attention" in include:
        return False
    return budget.keeps(visit.context, visit.kept_rows)


def _trace_call(
    plans: Sequence[TracePlan],
    targets: Sequence[TracedTarget],
    config: FlashTraceConfig,
    context: EngineContext,
) -> TraceCall:
    """The engine request: a prefill up to the last target position, or the end of its image."""
    length = max(target.weights.last for target in targets) + 1
    if context.images is not None:
        length = context.images.whole(length)
    token_ids = max((plan.token_ids for plan in plans), key=len)[:length]
    first = plans[0]
    spec = TraceSpec.create(
        targets,
        len(token_ids),
        exact_fraction=config.exact_fraction,
        layers="layers" in first.request.include,
        attention="attention" in first.request.include and not first.recursion.begun,
        heads=first.request.heads,
    )
    prompt, params = engine_input(token_ids, spec, context)
    return TraceCall(tuple(plans), spec, prompt, params)


def engine_input(
    token_ids: Sequence[int], spec: Spec, context: EngineContext
) -> tuple[TokensPrompt, SamplingParams]:
    """Prompt and parameters of an engine request that prefills tokens as a spec says.

    Args:
        token_ids: The tokens; the prompt of the completion comes first.
        spec: What the worker is to do with them.
        context: What the request shares with the completion.
    """
    images = context.images
    prompt = TokensPrompt(prompt_token_ids=list(token_ids))
    if images is not None:
        prompt = images.prompt(list(token_ids))
    if context.cache_salt is not None:
        prompt["cache_salt"] = context.cache_salt
    params = SamplingParams(
        max_tokens=1,
        temperature=0.0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={EXTRA_ARGS_KEY: seal(spec)},
    )
    return prompt, params


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
        images: The images of its prompt; None if there are none.
    """

    cache_salt: str | None = None
    lora_request: Any | None = None
    priority: int = 0
    trace_headers: Mapping[str, str] | None = None
    data_parallel_rank: int | None = None
    request_id: str | None = None
    images: PromptImages | None = None


@dataclass(frozen=True, slots=True)
class RequestRun:
    """What became of an engine request that is ours.

    Attributes:
        rank: The engine it ran on; None if there is only one.
        cached_tokens: Tokens that the scheduler found in the prefix cache.
        carried: The worker's answer, if it came with the output.
    """

    rank: int | None
    cached_tokens: int | None
    carried: bytes | None


async def run_request(
    engines: Engines,
    prompt: TokensPrompt,
    params: SamplingParams,
    context: EngineContext,
    request_id: str,
    trace_headers: Mapping[str, str] | None,
) -> RequestRun:
    """Runs a request with a sealed spec; see `run_hop`."""
    outputs: list[Any] = []
    ranks: list[int] = []
    cached: int | None = None
    carried: bytes | None = None
    with noting_ranks(ranks):
        async for output in engines.client.generate(
            prompt,
            params,
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
    return RequestRun(ranks[0] if ranks else context.data_parallel_rank, cached, carried)


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
    run = await run_request(engines, call.prompt, call.params, context, request_id, trace_headers)
    call_worker = functools.partial(engines.call, run.rank)
    report = await pick_up(call.spec.nonce, call_worker, run.carried)
    return HopRun(report, run.rank, run.cached_tokens)


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
    call: TraceCall, usage: TraceUsage, report: TraceReport, engine_seconds: float
) -> None:
    """Adds the scores of a request's hops to the recursions and its cost to the usage.

    Args:
        call: The request; the recursions of its plans await their hops.
        usage: Cost of the attribution so far.
        report: What the engine measured.
        engine_seconds: Time from handing the request to the engine to its report.

    Raises:
        TraceError: ``bad_scores`` when a recursion refuses the scores, ``weights_changed`` when
            the hop was not computed with the weights of the hop before, ``result_missing`` when the
            report is of other targets.
    """
    if usage.weights not in (None, report.weights):
        raise TraceError("weights_changed", "the model's weights changed between two hops")
    if len(report.targets) != len(call.plans):
        raise TraceError(
            "result_missing",
            f"the worker's result is of {len(report.targets)} targets, not {len(call.plans)}",
        )
    try:
        for place, (plan, hops) in enumerate(zip(call.plans, report.targets, strict=True)):
            length, layers = len(plan.token_ids), report.layer_scores
            if report.changes is not None and not plan.recursion.begun:
                traced, whole = report.changes[place].tolist()
                share = traced / whole if whole else 0.0
                if math.isfinite(share):
                    usage.change_shares[id(plan)] = share
            for scores in hops:
                if plan.recursion.next_weights() is not None:
                    plan.recursion.add(
                        padded(scores, length), None if layers is None else padded(layers, length)
                    )
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


def padded(scores: Tensor, length: int) -> Tensor:
    """Scores ``[..., N]`` over the whole trace of a target.

    Tokens behind a hop's last target have none, and a request with other targets may be longer.
    """
    missing = length - scores.shape[-1]
    if missing < 0 and not scores[..., length:].any():
        return scores[..., :length]
    # Too many scores are for the recursion to refuse.
    return torch.nn.functional.pad(scores, (0, missing)) if missing > 0 else scores
