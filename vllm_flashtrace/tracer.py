"""Runs attributions on an asynchronous engine: one trace request per hop.

Invariant: :meth:`AsyncTracer.attribute` returns an attribution object whatever happens to the
trace, and leaves no request behind in the engine.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_flashtrace.config import FlashTraceConfig
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.errors import FlashTraceError, TraceError
from vllm_flashtrace.hop import (
    decode_rpc,
    decode_status,
    padded_scores,
    trace_call,
    with_phases,
)
from vllm_flashtrace.postprocess.plan import TracePlan, plan_trace
from vllm_flashtrace.postprocess.result import build_result, failed_result
from vllm_flashtrace.records import Completion, TraceReport, TraceUsage
from vllm_flashtrace.schema import FlashTraceRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineContext:
    """What a trace request must share with the completion it explains.

    Attributes:
        cache_salt: Without the same salt the prefix cache would miss.
        lora_request: The adapter the completion was generated with.
        priority: Scheduling priority.
        trace_headers: OpenTelemetry headers.
        data_parallel_rank: Engine that served the completion, if chosen by the client.
    """

    cache_salt: str | None = None
    lora_request: Any | None = None
    priority: int = 0
    trace_headers: Mapping[str, str] | None = None
    data_parallel_rank: int | None = None


class AsyncTracer:
    """Attributes completions through vLLM's ``EngineClient``."""

    def __init__(self, engine_client: Any, config: FlashTraceConfig) -> None:
        self._engine = engine_client
        self.config = config
        self._places = asyncio.Semaphore(config.max_concurrent_traces)
        # Planning runs in threads; a fast tokenizer must not be shared with the server's own.
        self._tokenizer = copy.deepcopy(engine_client.get_tokenizer())
        self._waiting = 0
        self._refusal: str | None = None
        self._asked = False

    async def support(self) -> str | None:
        """Why the served model cannot be traced, or None if it can; asked once."""
        if not self._asked:
            try:
                replies = await self._engine.collective_rpc("flashtrace_status")
                self._refusal = decode_status(replies)["refusal"]
            except Exception as error:
                logger.warning("FlashTrace is not active in the engine: %s", error)
                self._refusal = "the engine runs without the FlashTrace plugin"
            self._asked = True
        return self._refusal

    async def attribute(
        self,
        request: FlashTraceRequest,
        completion: Completion,
        context: EngineContext,
        *,
        trace_id: str,
        reasoning_parser: Any | None = None,
        render: Any | None = None,
    ) -> dict[str, Any]:
        """Attributes one completion.

        Returns:
            The attribution object of the public interface; status ``failed`` or ``skipped`` with
            a reason when there is no attribution.

        Raises:
            asyncio.CancelledError: When the caller gave up; the engine request is aborted.
        """
        if self._waiting >= self.config.max_waiting_traces and self._places.locked():
            error = TraceError("overloaded", f"{self._waiting} attributions are waiting already")
            return failed_result(trace_id, error, status="skipped")
        try:
            async with asyncio.timeout(self.config.trace_timeout_seconds):
                plan = await asyncio.to_thread(
                    self._plan, request, completion, context, reasoning_parser, render
                )
                usage = await self._run(plan, context, trace_id)
                return await asyncio.to_thread(
                    build_result, plan, plan.recursion.result(), usage, trace_id
                )
        except TimeoutError:
            limit = self.config.trace_timeout_seconds
            error = TraceError("timeout", f"the trace took longer than {limit:g} s")
            return self._failed(trace_id, error)
        except FlashTraceError as error:
            return self._failed(trace_id, error)
        except Exception as error:
            logger.exception("Trace %s failed", trace_id)
            reason = TraceError("internal_error", f"{type(error).__name__}: {error}")
            return failed_result(trace_id, reason)

    def _plan(
        self,
        request: FlashTraceRequest,
        completion: Completion,
        context: EngineContext,
        reasoning_parser: Any | None,
        render: Any | None,
    ) -> TracePlan:
        if context.lora_request is not None:
            raise TraceError("unsupported_lora", "traces of LoRA completions are not supported")
        return plan_trace(
            request,
            completion,
            self._tokenizer,
            reasoning_parser=reasoning_parser,
            render=render,
            max_trace_tokens=self._engine.model_config.max_model_len - 1,
            auto_threshold=self.config.auto_threshold,
            max_hops=self.config.max_hops,
        )

    async def _run(self, plan: TracePlan, context: EngineContext, trace_id: str) -> TraceUsage:
        usage = TraceUsage()
        hop = 0
        while (weights := plan.recursion.next_weights()) is not None:
            report = await self._hop(plan, weights, context, f"{trace_id}-hop{hop}")
            plan.recursion.add(*padded_scores(report, len(plan.token_ids)))
            usage.add(report)
            hop += 1
        return usage

    async def _hop(
        self, plan: TracePlan, weights: TargetWeights, context: EngineContext, request_id: str
    ) -> TraceReport:
        call = trace_call(plan, weights, self.config, context.cache_salt)
        asked = time.monotonic()
        self._waiting += 1
        try:
            await self._places.acquire()
        finally:
            self._waiting -= 1
        try:
            began = time.monotonic()
            async for _ in self._engine.generate(
                call.prompt,
                call.params,
                request_id,
                trace_headers=context.trace_headers,
                priority=context.priority,
                data_parallel_rank=context.data_parallel_rank,
            ):
                pass
            replies = await self._engine.collective_rpc(
                "flashtrace_collect", args=(call.spec.nonce,)
            )
        finally:
            self._places.release()
        return with_phases(decode_rpc(replies), time.monotonic() - began, began - asked)

    def _failed(self, trace_id: str, error: FlashTraceError) -> dict[str, Any]:
        logger.warning("Trace %s failed (%s): %s", trace_id, error.code, error.message)
        return failed_result(trace_id, error)
