"""Prometheus metrics of the traces of one API server, shown at vLLM's ``/metrics``.

A metric never makes a request fail, and is registered once per process however often an application
is built. Several API servers (``--api-server-count``) add up: each writes its own values, and
vLLM's multiprocess collector sums counters, histograms and the gauges of live servers.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Concatenate, NamedTuple, ParamSpec

from prometheus_client import Counter, Gauge, Histogram

from vllm_flashtrace.base.logs import log_unexpected, logger

WARN_SECONDS = 60.0
"""Least time between two warnings about prefix-cache misses."""

ROUTES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/attributions",
)
PHASES = ("queue", "prefill", "attribution", "weighting", "verify", "total")
_MODEL = "model_name"
# Seconds; from a short trace on a GPU to the default timeout.
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

_P = ParamSpec("_P")


def _never_raises(
    method: Callable[Concatenate[TraceMetrics, _P], None],
) -> Callable[Concatenate[TraceMetrics, _P], None]:
    @functools.wraps(method)
    def wrapper(self: TraceMetrics, *args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            log_unexpected("metrics", error)

    return wrapper


class TraceMetrics:
    """The metrics of one served model."""

    def __init__(self, model_name: str) -> None:
        """Registers the metrics, all at 0, so that a server without traces shows them too.

        Args:
            model_name: Value of the ``model_name`` label, the same as in vLLM's own metrics.
        """
        self._model = model_name
        self._show_zeros()

    @_never_raises
    def ended(self, route: str, status: str, code: str, seconds: dict[str, float]) -> None:
        """Counts an attribution that has ended.

        Args:
            route: Route of the HTTP request.
            status: ``completed``, ``failed``, ``skipped`` or ``cancelled``.
            code: Error code, empty for a completed one.
            seconds: Seconds by phase; empty unless completed.
        """
        all_metrics = _collectors()
        all_metrics.requests.labels(self._model, route, status, code).inc()
        for phase in PHASES:
            if phase in seconds:
                all_metrics.seconds.labels(self._model, phase).observe(seconds[phase])

    @_never_raises
    def hop(self, recomputed_tokens: int, cached_tokens: int) -> None:
        """Counts what one hop cost."""
        _collectors().recomputed.labels(self._model).inc(recomputed_tokens)
        _collectors().cached.labels(self._model).inc(cached_tokens)

    @_never_raises
    def lookup(self, lookup: CacheLookup) -> None:
        """Counts what one hop looked up in the prefix cache."""
        _collectors().cache_queries.labels(self._model).inc(lookup.queries)
        _collectors().cache_hits.labels(self._model).inc(lookup.hits)
        _collectors().cache_misses.labels(self._model).inc(lookup.missed)

    @_never_raises
    def guarded(self, arguments: int, flagged: int) -> None:
        """Counts the arguments of tool calls that the guard has judged, and those it flagged."""
        _collectors().guarded.labels(self._model).inc(arguments)
        _collectors().flagged.labels(self._model).inc(flagged)

    @_never_raises
    def load(self, admission: Any) -> None:
        """Shows an :class:`~vllm_flashtrace.trace.admission.Admission` as it is now."""
        all_metrics = _collectors()
        all_metrics.waiting.labels(self._model).set(admission.waiting)
        all_metrics.running.labels(self._model).set(admission.holders)
        all_metrics.held_bytes.labels(self._model).set(admission.held_bytes)
        all_metrics.budget_bytes.labels(self._model).set(admission.budget_bytes or 0)

    @_never_raises
    def store_entries(self, count: int) -> None:
        """Shows how many deferred attributions this server keeps; call it at every change."""
        _collectors().stored.labels(self._model).set(count)

    @_never_raises
    def _show_zeros(self) -> None:
        all_metrics = _collectors()
        for route in ROUTES:
            all_metrics.requests.labels(self._model, route, "completed", "")
        for phase in PHASES:
            all_metrics.seconds.labels(self._model, phase)
        for metric in all_metrics[2:]:
            metric.labels(self._model)


class _Collectors(NamedTuple):
    requests: Counter
    seconds: Histogram
    recomputed: Counter
    cached: Counter
    cache_queries: Counter
    cache_hits: Counter
    cache_misses: Counter
    guarded: Counter
    flagged: Counter
    waiting: Gauge
    running: Gauge
    held_bytes: Gauge
    budget_bytes: Gauge
    stored: Gauge


@functools.cache
def _collectors() -> _Collectors:
    def gauge(name: str, text: str) -> Gauge:
        return Gauge(f"flashtrace_{name}", text, [_MODEL], multiprocess_mode="livesum")

    return _Collectors(
        requests=Counter(
            "flashtrace_requests",
            "Attributions that have ended, one per choice, by route, status and error code.",
            [_MODEL, "route", "status", "code"],
        ),
        seconds=Histogram(
            "flashtrace_phase_seconds",
            "Seconds of completed attributions by phase: queue (for a place and in the engine), "
            "prefill, attribution, weighting, verify, total.",
            [_MODEL, "phase"],
            buckets=_BUCKETS,
        ),
        recomputed=Counter(
            "flashtrace_recomputed_tokens", "Tokens that traces prefilled again.", [_MODEL]
        ),
        cached=Counter(
            "flashtrace_cached_tokens", "Tokens that traces found in the prefix cache.", [_MODEL]
        ),
        cache_queries=Counter(
            "flashtrace_prefix_cache_queries",
            "Tokens that trace requests looked up in the prefix cache.",
            [_MODEL],
        ),
        cache_hits=Counter(
            "flashtrace_prefix_cache_hits",
            "Tokens that trace requests found in the prefix cache.",
            [_MODEL],
        ),
        cache_misses=Counter(
            "flashtrace_prefix_cache_misses",
            "Trace requests that found less in the prefix cache than their completion, or an "
            "earlier hop, must have left there.",
            [_MODEL],
        ),
        guarded=Counter(
            "flashtrace_guarded_arguments",
            "Arguments of tool calls that the guard has judged.",
            [_MODEL],
        ),
        flagged=Counter(
            "flashtrace_flagged_arguments", "Arguments that the guard has flagged.", [_MODEL]
        ),
        waiting=gauge("traces_waiting", "Attributions that wait for a place in the engine."),
        running=gauge("traces_running", "Attributions that hold a place in the engine."),
        held_bytes=gauge(
            "accumulator_bytes", "Accumulator memory reserved for running attributions."
        ),
        budget_bytes=gauge(
            "accumulator_budget_bytes", "Accumulator memory that attributions may reserve."
        ),
        stored=gauge("store_entries", "Deferred attributions kept for pick-up."),
    )


@dataclass(frozen=True, slots=True)
class CacheLookup:
    """One trace request's lookup in the prefix cache, in tokens.

    Attributes:
        queries: Tokens that may come from the cache: those before the first target.
        hits: Tokens that did.
        left: Tokens that the engine has computed before, for the completion that is explained or
            for an earlier hop of its trace, and must have left in the cache.
    """

    queries: int
    hits: int
    left: int

    @property
    def missed(self) -> bool:
        """Whether less was found than was left: evicted, or computed by another engine."""
        return self.hits < self.left


def cache_lookup(
    first_target: int, hits: int | None, cache_config: Any, computed_before: bool
) -> CacheLookup:
    """The lookup of a trace request.

    Args:
        first_target: Its first target position, where its lookup ends.
        hits: ``RequestOutput.num_cached_tokens``.
        cache_config: vLLM's ``CacheConfig``.
        computed_before: Whether the engine has computed everything before the first target.
    """
    enabled = bool(cache_config.enable_prefix_caching)
    # The cache holds whole blocks only.
    block = cache_config.block_size
    left = first_target // block * block if enabled and computed_before and block else 0
    return CacheLookup(first_target if enabled else 0, hits or 0, left)


class CacheUse:
    """Sums over the trace requests of one API server.

    Attributes:
        queries: Tokens looked up.
        hits: Tokens found.
        misses: Trace requests that found less than must have been left.
    """

    def __init__(self) -> None:
        self.queries = 0
        self.hits = 0
        self.misses = 0
        self._warn_after = float("-inf")

    def add(self, lookup: CacheLookup) -> None:
        """Takes one lookup; a miss is logged, at most once in :data:`WARN_SECONDS`."""
        self.queries += lookup.queries
        self.hits += lookup.hits
        if not lookup.missed:
            return
        self.misses += 1
        now = time.monotonic()
        if now >= self._warn_after:
            self._warn_after = now + WARN_SECONDS
            logger.warning(
                "A trace found %d of %d tokens in the prefix cache that were computed before it: "
                "they were evicted, or computed by another engine (%d such traces so far; "
                "logged at most every %d s)",
                lookup.hits,
                lookup.left,
                self.misses,
                WARN_SECONDS,
            )

    def to_status(self) -> dict[str, int]:
        """For the status report."""
        return {"queries": self.queries, "hits": self.hits, "misses": self.misses}
