"""Keeps trace prefills from starving other requests of the step's token budget.

What it changes: in a step with other requests, ``Scheduler`` gives all trace prefills together at
most ``trace_token_share`` of ``max_num_scheduled_tokens``. Of its methods, ``add_request`` notes
trace requests, ``schedule`` starts each step's count, ``_reserve_prefill_lookahead`` (called for
every request just before its blocks are allocated) shortens a trace's chunk, and
``_handle_blocked_waiting_request`` passes over a waiting trace when the share is used up. Without a
trace in the scheduler each costs one comparison.

Why here: vLLM's priorities order requests but do not bound what one takes of a step, and
``long_prefill_token_threshold`` bounds every request alike. Shortening a waiting request to nothing
would end the scan of the queue and starve the requests behind it; passing over it does not.

Tested on: vLLM 0.32.0.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_flashtrace.base.logs import logger
from vllm_flashtrace.patches._check import PatchError, require_parameters
from vllm_flashtrace.trace.config import FlashTraceConfig
from vllm_flashtrace.trace.wire import sealed_spec

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

MIN_CHUNK = 16
"""A chunk is cut no shorter than this (or the share): a step's fixed cost would outweigh it."""


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
                # A last token with places for drafts is scheduled whole, or vLLM ends the engine.
                drafts = num_computed_tokens + allowed > request.num_tokens
                if request.request_id in traces.ids and not drafts:
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


class TokenShare:
    """The share of one scheduler; :meth:`begin_step`, then :meth:`grant` for each trace.

    Invariant: in a capped step traces are granted at most the share, and the first that asks is
    granted something, so every trace makes progress.
    """

    def __init__(self, share: float, step_budget: int, *, may_split: bool = True) -> None:
        """Starts uncapped.

        Args:
            share: Part of the step's budget that traces may take, over 0 and at most 1.
            step_budget: Tokens that one step may schedule.
            may_split: Whether a prefill may be cut into chunks. If not, a capped step admits one
                whole trace.
        """
        self._size = max(1, int(share * step_budget))
        self._min_chunk = min(MIN_CHUNK, self._size)
        self._may_split = may_split
        self._left: int | None = None

    @property
    def size(self) -> int:
        """Tokens that traces may take of a capped step."""
        return self._size

    def begin_step(self, *, capped: bool) -> None:
        """Forgets what was granted; without other requests to starve a step needs no cap."""
        self._left = self._size if capped else None

    @property
    def has_room(self) -> bool:
        """Whether :meth:`grant` would grant a trace of any length at least one token."""
        if self._left is None:
            return True
        return self._left >= (self._min_chunk if self._may_split else self._size)

    def grant(self, wanted: int) -> int:
        """Takes up to ``wanted`` tokens out of the share.

        What is granted counts even if the caller cannot use it in the end, so that the cap is never
        exceeded; the next step starts anew.

        Returns:
            Tokens granted; 0 when the rest of the share is not worth a chunk.
        """
        if self._left is None or wanted <= 0:
            return wanted
        granted = wanted
        if self._may_split and wanted > self._left:
            granted = self._left if self._left >= self._min_chunk else 0
        self._left = max(0, self._left - granted)
        return granted


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
