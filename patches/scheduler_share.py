"""Keeps traces from starving other requests of the step's token budget.

What it changes: in a step with untraced requests, ``Scheduler`` gives all trace prefills together
at most ``trace_token_share`` of ``max_num_scheduled_tokens``. ``add_request`` notes trace requests,
``schedule`` starts each step's count, ``_reserve_prefill_lookahead`` (called for every request just
before its blocks are allocated) shortens a trace's chunk, and ``_handle_blocked_waiting_request``
passes over a waiting trace when the share is used up. Without a trace in the scheduler each of them
costs one comparison.

Why here: vLLM's priorities order requests but do not bound what one takes of a step, and
``long_prefill_token_threshold`` bounds every request alike. A waiting request that is shortened to
nothing would end the scan of the queue with everybody behind it, hence the second method.

Tested on: vLLM 0.32.0.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm_flashtrace.patches._check import PatchError, require_parameters
from vllm_flashtrace.patches.token_share import TokenShare

from vllm_flashtrace.trace.config import FlashTraceConfig
from vllm_flashtrace.trace.wire import sealed_spec

logger = logging.getLogger("vllm.flashtrace")

_METHODS: dict[str, tuple[str, ...]] = {
    "add_request": ("self", "request"),
    "schedule": ("self",),
    "_reserve_prefill_lookahead": (
        "self",
        "request",
        "num_computed_tokens",
        "num_new_tokens",
    ),
    "_handle_blocked_waiting_request": ("self", "request"),
}


class _Traces:
    """The trace requests of one scheduler and what the current step has left for them."""

    def __init__(self, scheduler: Any) -> None:
        config = FlashTraceConfig.from_additional_config(scheduler.vllm_config.additional_config)
        # Chunks that vLLM aligns itself, to Mamba states or to a drafter, must not be cut further.
        aligned = scheduler.need_mamba_block_aligned_split or scheduler.num_prefill_lookahead > 1
        self.share = TokenShare(
            config.trace_token_share,
            scheduler.max_num_scheduled_tokens,
            may_split=scheduler.scheduler_config.enable_chunked_prefill and not aligned,
        )
        self.ids: set[str] = set()

    def begin_step(self, requests: dict[str, Any]) -> bool:
        """Starts a step; False when no trace is left."""
        self.ids = {req_id for req_id in self.ids if req_id in requests}
        self.share.begin_step(capped=len(requests) > len(self.ids))
        return bool(self.ids)


def check() -> None:
    """Raises PatchError unless the methods fit and asynchronous scheduling inherits them."""
    for name, parameters in _METHODS.items():
        method = getattr(Scheduler, name, None)
        require_parameters(method, f"Scheduler.{name}", *parameters)
        if getattr(AsyncScheduler, name) is not method:
            raise PatchError(f"AsyncScheduler.{name} is not Scheduler's")


def apply() -> None:
    """Wraps the four methods."""
    stock_add = Scheduler.add_request
    stock_schedule = Scheduler.schedule
    stock_reserve = Scheduler._reserve_prefill_lookahead
    stock_handle = Scheduler._handle_blocked_waiting_request

    @functools.wraps(stock_add)
    def add_request(self: Scheduler, request: Any) -> None:
        stock_add(self, request)
        params = request.sampling_params
        if params is not None and sealed_spec(params.extra_args) is not None:
            try:
                if self._flashtrace_traces is None:
                    self._flashtrace_traces = _Traces(self)
                self._flashtrace_traces.ids.add(request.request_id)
            except Exception as error:
                _give_up(self, error)

    @functools.wraps(stock_schedule)
    def schedule(self: Scheduler, *args: Any, **kwargs: Any) -> Any:
        if (traces := self._flashtrace_traces) is not None:
            try:
                if not traces.begin_step(self.requests):
                    self._flashtrace_traces = None
            except Exception as error:
                _give_up(self, error)
        return stock_schedule(self, *args, **kwargs)

    @functools.wraps(stock_reserve)
    def reserve(
        self: Scheduler, request: Any, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        allowed: int = stock_reserve(self, request, num_computed_tokens, num_new_tokens)
        if (traces := self._flashtrace_traces) is not None:
            try:
                if request.request_id in traces.ids:
                    return traces.share.grant(allowed)
            except Exception as error:
                _give_up(self, error)
        return allowed

    @functools.wraps(stock_handle)
    def handle(self: Scheduler, request: Any) -> bool:
        ready: bool = stock_handle(self, request)
        if ready and (traces := self._flashtrace_traces) is not None:
            try:
                return request.request_id not in traces.ids or traces.share.has_room
            except Exception as error:
                _give_up(self, error)
        return ready

    Scheduler._flashtrace_traces = None
    Scheduler.add_request = add_request
    Scheduler.schedule = schedule
    Scheduler._reserve_prefill_lookahead = reserve
    Scheduler._handle_blocked_waiting_request = handle


def _give_up(scheduler: Scheduler, error: Exception) -> None:
    """Schedules the present traces like any request; an exception here would end the engine."""
    scheduler._flashtrace_traces = None
    _log_once(type(error).__name__, str(error))


@functools.cache
def _log_once(kind: str, message: str) -> None:
    logger.error("FlashTrace: the token share of traces is not limited: %s: %s", kind, message)
