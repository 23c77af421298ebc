"""One hop on vLLM's asynchronous engine: generate, then pick up the report.

Invariant: a hop ends. An engine that dies or is shut down leaves calls to its workers unanswered
for ever; whoever waits here learns of it within :data:`CHECK_SECONDS`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from vllm_flashtrace.errors import TraceError
from vllm_flashtrace.pickup import pick_up
from vllm_flashtrace.records import TraceReport

if TYPE_CHECKING:
    from vllm_flashtrace.hop import TraceCall

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
        data_parallel_rank: Engine that served the completion, if chosen by the client.
        request_id: vLLM's id of the completion, for logs and spans.
    """

    cache_salt: str | None = None
    lora_request: Any | None = None
    priority: int = 0
    trace_headers: Mapping[str, str] | None = None
    data_parallel_rank: int | None = None
    request_id: str | None = None


async def run_hop(
    engine: Any,
    call: TraceCall,
    context: EngineContext,
    request_id: str,
    trace_headers: Mapping[str, str] | None,
) -> TraceReport:
    """Runs one trace request and returns what the workers measured.

    Args:
        engine: vLLM's ``EngineClient``.
        call: The trace request.
        context: What it shares with the completion.
        request_id: Its id in the engine.
        trace_headers: Parent of vLLM's own spans of the request.

    Raises:
        TraceError: ``engine_dead``, ``aborted``, or what a worker says went wrong.
        asyncio.CancelledError: The engine's request is aborted.
    """
    return await while_alive(engine, _run(engine, call, context, request_id, trace_headers))


async def while_alive(engine: Any, work: Coroutine[Any, Any, T]) -> T:
    """Awaits ``work`` for as long as the engine lives.

    Raises:
        TraceError: ``engine_dead``; ``work`` has been cancelled then.
    """
    task = asyncio.create_task(work)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=CHECK_SECONDS)
            if not task.done() and engine.errored:
                raise TraceError("engine_dead", "the engine has stopped")
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _run(
    engine: Any,
    call: TraceCall,
    context: EngineContext,
    request_id: str,
    trace_headers: Mapping[str, str] | None,
) -> TraceReport:
    outputs: list[Any] = []
    async for output in engine.generate(
        call.prompt,
        call.params,
        request_id,
        lora_request=context.lora_request,
        trace_headers=trace_headers,
        priority=context.priority,
        data_parallel_rank=context.data_parallel_rank,
    ):
        outputs = output.outputs
    if any(output.finish_reason == "abort" for output in outputs):
        raise TraceError("aborted", "the engine aborted the trace (sleep, pause or shutdown)")
    pickup = pick_up(call.spec.nonce)
    request = next(pickup)
    while True:
        replies = await engine.collective_rpc(request.method, args=request.args)
        try:
            request = pickup.send(replies)
        except StopIteration as done:
            report: TraceReport = done.value
            return report
