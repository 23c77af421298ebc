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

from vllm_flashtrace.accumulator_budget import AccumulatorBudget
from vllm_flashtrace.admission import Admission
from vllm_flashtrace.config import FlashTraceConfig
from vllm_flashtrace.errors import FlashTraceError, TraceError
from vllm_flashtrace.hop import TraceCall, take_report, trace_call
from vllm_flashtrace.pickup import decode_status, pick_up
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
        self._admission = Admission(
            config.max_concurrent_traces,
            max_waiting=config.max_waiting_traces,
            max_waiting_seconds=config.max_waiting_seconds,
        )
        self._budget: AccumulatorBudget | None = None
        # Planning runs in threads; a fast tokenizer must not be shared with the server's own.
        self._tokenizer = copy.deepcopy(engine_client.get_tokenizer())
        self._refusal: str | None = None
        self._asked = False

    async def support(self) -> str | None:
        """Why the served model cannot be traced, or None if it can; asked once.

        Also learns how much memory this server's traces may take.
        """
        if not self._asked:
            try:
                status = decode_status(await self._engine.collective_rpc("flashtrace_status"))
                self._refusal = status["refusal"]
                self._limit(AccumulatorBudget.from_status(status))
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
        try:
            self._admission.refuse_if_full()  # Before the work of planning.
            async with asyncio.timeout(self.config.trace_timeout_seconds):
                plan = await asyncio.to_thread(
                    self._plan, request, completion, context, reasoning_parser, render
                )
                usage = await self._admitted(plan, context, trace_id)
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

    def _limit(self, budget: AccumulatorBudget | None) -> None:
        if budget is not None:
            servers = getattr(self._engine.vllm_config.parallel_config, "_api_process_count", 1)
            self._budget = budget.shared_by(servers)
            self._admission.budget_bytes = self._budget.limit_bytes

    async def _admitted(self, plan: TracePlan, context: EngineContext, trace_id: str) -> TraceUsage:
        """Runs all hops in one place, so that later hops do not queue behind new attributions."""
        cost = 0
        if self._budget is not None:
            # Hops run one after the other, and none is longer than the plan.
            self._budget.check(len(plan.token_ids))
            cost = self._budget.cost(len(plan.token_ids))
        async with self._admission.place(cost) as waited:
            usage = TraceUsage(seconds={"queue": waited})
            hop = 0
            while (weights := plan.recursion.next_weights()) is not None:
                call = trace_call(plan, weights, self.config, context.cache_salt)
                began = time.monotonic()
                report = await self._hop(call, context, f"{trace_id}-hop{hop}")
                take_report(plan, usage, report, time.monotonic() - began)
                hop += 1
        return usage

    async def _hop(self, call: TraceCall, context: EngineContext, request_id: str) -> TraceReport:
        async for _ in self._engine.generate(
            call.prompt,
            call.params,
            request_id,
            trace_headers=context.trace_headers,
            priority=context.priority,
            data_parallel_rank=context.data_parallel_rank,
        ):
            pass
        pickup = pick_up(call.spec.nonce)
        request = next(pickup)
        while True:
            replies = await self._engine.collective_rpc(request.method, args=request.args)
            try:
                request = pickup.send(replies)
            except StopIteration as done:
                report: TraceReport = done.value
                return report

    def _failed(self, trace_id: str, error: FlashTraceError) -> dict[str, Any]:
        result = failed_result(trace_id, error)
        logger.warning(
            "Trace %s %s (%s): %s", trace_id, result["status"], error.code, error.message
        )
        return result
