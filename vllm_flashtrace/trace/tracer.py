"""Runs attributions on vLLM's asynchronous engine: plans them, admits them, runs hop after hop."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal, TypeAlias, TypeVar

import msgspec

from vllm_flashtrace.api.request import FlashTraceRequest
from vllm_flashtrace.base.errors import FlashTraceError, TraceError
from vllm_flashtrace.base.logs import log_unexpected, logger
from vllm_flashtrace.base.records import Completion, ScoreReport, TraceReport, TraceUsage
from vllm_flashtrace.text.plan import (
    TracePlan,
    plan_targets,
    surprise_text,
    weigh_by_surprise,
)
from vllm_flashtrace.text.result import build_result, failed_result
from vllm_flashtrace.text.verification import Verification
from vllm_flashtrace.trace.admission import Admission
from vllm_flashtrace.trace.budget import AccumulatorBudget
from vllm_flashtrace.trace.config import FlashTraceConfig
from vllm_flashtrace.trace.engines import Engines
from vllm_flashtrace.trace.hop import (
    EngineContext,
    TraceCall,
    run_hop,
    take_report,
    visits,
    while_alive,
)
from vllm_flashtrace.trace.large_results import (
    LARGE_BYTES,
    ImageMemory,
    LargeAttribution,
    result_bytes,
)
from vllm_flashtrace.trace.metrics import cache_lookup
from vllm_flashtrace.trace.observation import Observation, Observer
from vllm_flashtrace.trace.pickup import decode_status
from vllm_flashtrace.trace.scoring import run_score

__all__ = ["AsyncTracer", "EngineContext", "served_name"]

_NO_ROUTE = "unknown"
# Planning 128k tokens is half a second of Python. One thread does it for all requests of a process,
# in their order, and lets the event loop in after a millisecond, not after the usual five.
_TEXT_THREAD = ThreadPoolExecutor(1, thread_name_prefix="flashtrace-text")
_SWITCH_SECONDS = 0.001

# How long making the result may take when verification has used up the attribution's time.
_RESULT_SECONDS = 10.0

T = TypeVar("T")
Verifier: TypeAlias = Callable[..., Awaitable[Sequence[Mapping[str, Any]]]]


class AsyncTracer:
    """Attributes completions through vLLM's ``EngineClient``.

    Attributes:
        config: Options of the server.
        observer: Metrics, spans and log lines of the attributions.
    """

    def __init__(
        self, engine_client: Any, config: FlashTraceConfig, *, cache_details: bool = False
    ) -> None:
        """Starts without a trace.

        Args:
            engine_client: vLLM's ``EngineClient``.
            config: Options of the server.
            cache_details: Tells clients how many of their tokens were in the prefix cache, which
                they share with others.
        """
        self._engine = engine_client
        self._cache_details = cache_details
        self._engines = Engines(engine_client)
        self.config = config
        vllm_config = engine_client.vllm_config
        self.observer = Observer(
            served_name(vllm_config.model_config),
            tracing=vllm_config.observability_config.otlp_traces_endpoint is not None,
        )
        self._admission = Admission(
            config.concurrent_traces(vllm_config),
            max_waiting=config.max_waiting_traces,
            max_waiting_seconds=config.max_waiting_seconds,
            on_change=self.observer.metrics.load,
        )
        self._budget: AccumulatorBudget | None = None
        self._planning = 0
        self._results = Admission(
            sys.maxsize,
            max_waiting=config.max_waiting_traces,
            max_waiting_seconds=config.max_waiting_seconds,
            budget_bytes=config.max_result_mib << 20,
            waits_for="room for the result",
            bytes_of="results (max_result_mib)",
        )
        self._images = ImageMemory(config.max_result_mib << 20)
        # Planning runs in a thread; a fast tokenizer must not be shared with the server's own.
        self._tokenizer = copy.deepcopy(engine_client.get_tokenizer())
        self._refusal: str | None = None
        self._asked = False

    async def support(self) -> str | None:
        """Why the served model cannot be traced, or None if it can; asked once.

        Also learns how much memory this server's traces may take.
        """
        if not self._asked:
            try:
                status = decode_status(await self._engines.call_all("flashtrace_status"))
                self._refusal = self._engines.refusal() or status["refusal"]
                self._limit(AccumulatorBudget.from_status(status))
            except Exception as error:
                logger.warning("FlashTrace is not active in the engine: %s", error)
                self._refusal = "the engine runs without the FlashTrace plugin"
            self._asked = True
        return self._refusal

    @property
    def load(self) -> dict[str, int | None]:
        """What this server's traces take now: places, queue, and bytes of accumulators and results.

        Those that wait to be planned, or for room for their result, count as waiting.
        """
        return {
            "running": self._admission.holders,
            "waiting": self._planning + self._results.waiting + self._admission.waiting,
            "accumulator_bytes": self._admission.held_bytes,
            "accumulator_budget_bytes": self._admission.budget_bytes,
            "result_bytes": self._results.held_bytes,
            "result_budget_bytes": self._results.budget_bytes,
        }

    async def worker_reports(self, timeout: float) -> list[dict[str, Any]]:
        """What each worker of each engine says of itself and its traces.

        Args:
            timeout: Longest wait in seconds; a busy engine answers between two steps.

        Raises:
            TimeoutError: No answer in time.
            TraceError: ``engine_dead``.
        """
        async with asyncio.timeout(timeout):
            replies = await while_alive(self._engines, self._engines.call_all("flashtrace_status"))
        return [msgspec.msgpack.decode(reply) for reply in replies]

    async def attribute(
        self,
        request: FlashTraceRequest,
        completion: Completion,
        context: EngineContext,
        *,
        trace_id: str,
        route: str = _NO_ROUTE,
        reasoning_parser: Any | None = None,
        render: Any | None = None,
    ) -> dict[str, Any]:
        """Attributes one completion, and leaves no request behind in the engine.

        Args:
            request: What is asked for.
            completion: The completion to explain.
            context: What the trace shares with it.
            trace_id: Public id of the attribution.
            route: Route of the HTTP request, for metrics and logs.
            reasoning_parser: Finds the reasoning in the generated tokens.
            render: Renders chat messages as the prompt was rendered.

        Returns:
            The attribution object of the public interface; status ``failed`` or ``skipped`` with
            a reason when there is no attribution. A large one is a `LargeAttribution`.

        Raises:
            asyncio.CancelledError: The caller was cancelled; the engine request is aborted.
        """
        with self._watch(trace_id, context, route) as watch:
            usage = TraceUsage()
            try:
                # Before the work of planning.
                self._admission.refuse_if_full(self._planning + self._results.waiting)
                seconds = self.config.trace_timeout_seconds
                with self._images.held(context.images):
                    async with asyncio.timeout(seconds) as limit:
                        plans, waited = await self._planned(
                            partial(self._plan, request, completion, reasoning_parser, render)
                        )
                        verifier = partial(self._verify, plans, render=render, limit=limit)
                        result, usage = await self._run(
                            plans, context, trace_id, watch, waited, verifier
                        )
            except Exception as error:
                result = failed_result(trace_id, self._reason(error))
            watch.ended(result, usage)
            return result

    def lost(
        self,
        trace_id: str,
        error: FlashTraceError,
        context: EngineContext | None = None,
        *,
        route: str = _NO_ROUTE,
        status: Literal["failed", "skipped"] | None = None,
    ) -> dict[str, Any]:
        """The object of an attribution that could not even begin; counted and logged.

        Args:
            trace_id: Public id of the attribution.
            error: Why.
            context: Context of the completion, if there is one.
            route: Route of the HTTP request, for metrics and logs.
            status: By default the error's code decides.
        """
        result = failed_result(trace_id, error, status)
        with self._watch(trace_id, context or EngineContext(), route) as watch:
            watch.ended(result)
        return result

    def _watch(
        self, trace_id: str, context: EngineContext, route: str
    ) -> AbstractContextManager[Observation]:
        return self.observer.attribution(trace_id, context.request_id, route, context.trace_headers)

    def _reason(self, error: Exception) -> FlashTraceError:
        if isinstance(error, FlashTraceError):
            return error
        if isinstance(error, TimeoutError):
            limit = self.config.trace_timeout_seconds
            return TraceError("timeout", f"the trace took longer than {limit:g} s")
        if self._engine.errored:
            return TraceError("engine_dead", "the engine has stopped")
        log_unexpected("an attribution", error)
        return TraceError("internal_error", f"{type(error).__name__}: {error}")

    async def _planned(self, plan: Callable[[], list[TracePlan]]) -> tuple[list[TracePlan], float]:
        """The plans of the targets, and the seconds that they waited to be made."""
        began = time.monotonic()

        def timed() -> tuple[list[TracePlan], float]:
            waited = time.monotonic() - began
            return plan(), waited

        self._planning += 1
        try:
            return await in_text_thread(timed)
        finally:
            self._planning -= 1

    async def _run(
        self,
        plans: list[TracePlan],
        context: EngineContext,
        trace_id: str,
        watch: Observation,
        waited: float,
        verifier: Verifier,
    ) -> tuple[dict[str, Any], TraceUsage]:
        """The attribution object and its cost; a large one holds its memory of the budget."""
        first = plans[0]
        nbytes = result_bytes(
            first.request,
            prompt=first.prompt_length,
            generated=len(first.completion.generated_token_ids),
            layers=self._layers,
            max_hops=self.config.max_hops,
            targets=len(plans),
            heads=self._heads,
            sources=len(first.sources or ()),
            image_tokens=sum(len(image.tokens) for image in first.completion.images),
        )
        large = nbytes >= LARGE_BYTES
        if large:
            waited += await self._results.enter(nbytes)
        result: dict[str, Any] | None = None
        try:
            usage, verifications = await self._admitted(
                plans, context, trace_id, watch, waited, verifier
            )
            build = partial(
                build_result,
                verifications=verifications,
                cache_details=self._cache_details,
                as_tensors=large,
            )
            result = await in_text_thread(lambda: build(plans, usage, trace_id))
            if large:
                result = LargeAttribution(result, partial(self._results.leave, nbytes))
            return result, usage
        finally:
            if large and not isinstance(result, LargeAttribution):
                self._results.leave(nbytes)

    def _plan(
        self,
        request: FlashTraceRequest,
        completion: Completion,
        reasoning_parser: Any | None,
        render: Any | None,
    ) -> list[TracePlan]:
        plans = plan_targets(
            request,
            completion,
            self._tokenizer,
            reasoning_parser=reasoning_parser,
            render=render,
            max_trace_tokens=self._engine.model_config.max_model_len - 1,
            auto_threshold=self.config.auto_threshold,
            max_hops=self.config.max_hops,
            max_targets=self.config.limits.max_targets,
        )
        if "layers" in request.include:
            self._check_layers(plans[0].prompt_length)
        if "attention" in request.include:
            self._check_attention(len(completion.token_ids))
        return plans

    def _check_layers(self, prompt_length: int) -> None:
        limit, count = self.config.max_layer_scores, self._layers * prompt_length
        if count > limit:
            raise TraceError(
                "too_many_layer_scores",
                f"flashtrace.include 'layers': {self._layers} layers of {prompt_length} prompt "
                f"tokens are {count} scores; the server gives at most {limit} (max_layer_scores)",
            )

    def _check_attention(self, tokens: int) -> None:
        limit, count = self.config.max_attention_sums, self._layers * self._heads * tokens
        if count > limit:
            raise TraceError(
                "too_many_attention_sums",
                f"flashtrace.include 'attention': {self._layers} layers of {self._heads} heads and "
                f"{tokens} tokens are {count} numbers; the server gives at most {limit} "
                "(max_attention_sums)",
            )

    @property
    def _layers(self) -> int:
        layers: int = self._engine.model_config.get_total_num_hidden_layers()
        return layers

    @property
    def _heads(self) -> int:
        parallel = self._engine.vllm_config.parallel_config
        own: int = self._engine.model_config.get_num_attention_heads(parallel)
        return own * int(parallel.tensor_parallel_size)

    def _limit(self, budget: AccumulatorBudget | None) -> None:
        if budget is not None:
            servers = getattr(self._engine.vllm_config.parallel_config, "_api_process_count", 1)
            self._budget = budget.shared_by(servers)
            self._admission.budget_bytes = self._budget.limit_bytes
            self.observer.metrics.load(self._admission)

    async def _admitted(
        self,
        plans: list[TracePlan],
        context: EngineContext,
        trace_id: str,
        watch: Observation,
        waited: float,
        verifier: Verifier,
    ) -> tuple[TraceUsage, Sequence[Mapping[str, Any]]]:
        """Runs all requests in one place, so that later ones do not queue behind others'."""
        together = visits(plans, self._budget)
        cost = 0
        if self._budget is not None:
            # Requests run one after the other; none is longer than its visit, or keeps more rows.
            attention = "attention" in plans[0].request.include
            self._budget.check(max(visit.context for visit in together), attention=attention)
            cost = max(
                self._budget.cost(visit.context, visit.kept_rows, attention=attention)
                for visit in together
            )
        waited_here = await self._admission.enter(cost)
        try:
            usage = TraceUsage(seconds={"queue": waited + waited_here})
            if plans[0].request.weighting == "surprise":
                context = await self._weigh(plans, context, trace_id, watch, usage)
            hop = 0
            # A completion leaves its tokens in its engine's cache, and every hop does.
            computed_before = context.request_id is not None
            for visit in together:
                while (call := visit.next_call(self.config, context)) is not None:
                    name = f"{trace_id}-hop{hop}"
                    with watch.hop(hop, call.target_tokens) as span:
                        began = time.monotonic()
                        run = await run_hop(self._engines, call, context, name, span.headers)
                        lookup = cache_lookup(
                            call.spec.first_target,
                            run.cached_tokens,
                            self._engine.vllm_config.cache_config,
                            computed_before,
                        )
                        watch.measured(span, run.report, lookup)
                        await _take(call, usage, run.report, time.monotonic() - began)
                    # What the engine has computed for this hop serves the next one.
                    context = dataclasses.replace(context, data_parallel_rank=run.rank)
                    computed_before = True
                    hop += sum(map(len, run.report.targets))
            if not plans[0].request.verify:
                return usage, ()
            self._admission.shrink(cost)
            cost = 0
            return usage, await verifier(context, trace_id, watch, usage)
        finally:
            self._admission.leave(cost)

    async def _weigh(
        self,
        plans: list[TracePlan],
        context: EngineContext,
        trace_id: str,
        watch: Observation,
        usage: TraceUsage,
    ) -> EngineContext:
        """Weights the tokens of the targets by how little the model expected them.

        Returns:
            The context of what follows: the rank whose cache has the tokens now.
        """
        began = time.monotonic()
        text = surprise_text(plans)
        with watch.scoring(text) as span:
            report, rank = await run_score(
                self._engines, text, context, f"{trace_id}-weighting", span.headers
            )
            watch.scored(span, report)
        usage.add_score(report)
        usage.weights = report.weights
        weigh_by_surprise(plans, text, report.log_probs)
        usage.seconds["weighting"] = time.monotonic() - began
        return dataclasses.replace(context, data_parallel_rank=rank)

    async def _verify(
        self,
        plans: list[TracePlan],
        context: EngineContext,
        trace_id: str,
        watch: Observation,
        usage: TraceUsage,
        *,
        render: Any | None,
        limit: asyncio.Timeout,
    ) -> list[dict[str, Any]]:
        """The ``verification`` of each target, one request after the other.

        What fails, or is not there when the attribution's time is up, has a reason in place of
        numbers; the attribution is there by then.
        """
        began, ends = time.monotonic(), limit.when()
        make = partial(
            Verification,
            plans,
            self._tokenizer,
            render=render,
            max_requests=self.config.max_verify_requests,
        )
        verification: Verification | None = None
        reports: list[ScoreReport | FlashTraceError] = []
        failure: FlashTraceError | None = None
        # The result is still to be made behind it.
        limit.reschedule(None if ends is None else ends + _RESULT_SECONDS)
        try:
            async with asyncio.timeout_at(ends):
                verification = await in_text_thread(lambda: make())
                for number, text in enumerate(verification.texts):
                    name = f"{trace_id}-score{number}"
                    with watch.scoring(text) as span:
                        try:
                            report, _ = await run_score(
                                self._engines, text, context, name, span.headers
                            )
                        except Exception as error:
                            failure = self._reason(error)
                            span.failed(failure.code)
                            reports.append(failure)
                            if number == 0:
                                break  # Without it no other one says anything.
                        else:
                            watch.scored(span, report)
                            usage.add_score(report)
                            reports.append(report)
        except Exception as error:
            failure = self._reason(error)
        usage.seconds["verify"] = time.monotonic() - began
        if verification is None:
            reason = "internal_error" if failure is None else f"{failure.code}: {failure.message}"
            return [{"reason": reason} for _ in plans]
        lost = failure or TraceError("internal_error", "not scored")
        reports += [lost] * (len(verification.texts) - len(reports))
        return verification.results(reports, usage.weights)


async def _take(call: TraceCall, usage: TraceUsage, report: TraceReport, seconds: float) -> None:
    if report.layer_scores is None:
        take_report(call, usage, report, seconds)
    else:  # Several passes over [L, N], without the interpreter.
        await asyncio.to_thread(take_report, call, usage, report, seconds)


async def in_text_thread(work: Callable[[], T]) -> T:
    """Runs ``work`` after what others have asked for; never begins it once the caller has left."""

    def politely() -> T:
        usual = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_SECONDS)
        try:
            return work()
        finally:
            sys.setswitchinterval(usual)

    return await asyncio.get_running_loop().run_in_executor(_TEXT_THREAD, politely)


def served_name(model_config: Any) -> str:
    """The name in vLLM's own metrics: the first of those the model is served under."""
    name = model_config.served_model_name
    return str(name[0] if isinstance(name, list) else name)
