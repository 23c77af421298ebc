"""One hop on vLLM's asynchronous engine: generate, then pick up the report where it ran.

Invariant: a hop ends. An engine that dies or is shut down leaves calls to its workers unanswered
for ever; whoever waits here learns of it within :data:`CHECK_SECONDS`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.base.records import TraceReport
from vllm_flashtrace.trace.engines import Engines, noting_ranks
from vllm_flashtrace.trace.pickup import pick_up

if TYPE_CHECKING:
    from vllm_flashtrace.trace.hop import TraceCall

CHECK_SECONDS = 0.5

T = TypeVar("T")


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


async def while_alive(engines: Engines, work: Coroutine[Any, Any, T]) -> T:
    """Awaits ``work`` for as long as the engines live.

    Raises:
        TraceError: ``engine_dead``; ``work`` has been cancelled then.
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
    if any(output.finish_reason == "abort" for output in outputs):
        raise TraceError("aborted", "the engine aborted the trace (sleep, pause or shutdown)")
    rank = ranks[0] if ranks else context.data_parallel_rank
    pickup = pick_up(call.spec.nonce)
    request = next(pickup)
    while True:
        replies = await engines.call(rank, request.method, request.args)
        try:
            request = pickup.send(replies)
        except StopIteration as done:
            return HopRun(done.value, rank, cached)
