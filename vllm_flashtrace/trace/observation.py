"""What operators see of attributions: metrics, OpenTelemetry spans and log lines, from one place.

Every attribution that begins is counted exactly once when it ends, and logged once unless it is
completed. Watching never changes its outcome.

Without vLLM's tracing (``--otlp-traces-endpoint``) no span is made and trace headers pass through
untouched. With it, spans go to the provider that vLLM set up, under the request's own context, and
vLLM's spans of the engine requests nest under them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

from vllm_flashtrace.api.converters import EVALUATION_EVENT, evaluation_events
from vllm_flashtrace.base.logs import log_lost_trace
from vllm_flashtrace.base.records import ScoredText, ScoreReport, TraceReport, TraceUsage
from vllm_flashtrace.trace.metrics import CacheLookup, CacheUse, TraceMetrics

try:
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:  # Optional, as in vLLM, which refuses --otlp-traces-endpoint without it.
    trace = None  # type: ignore[assignment]

Headers = Mapping[str, str]
SpanValue = str | int | float | bool

ATTRIBUTION_SPAN = "flashtrace.attribute"
HOP_SPAN = "flashtrace.hop"
# As many as OpenTelemetry keeps of a span by default, of which it would keep the last.
_MAX_EVENTS = 128
SCORE_SPAN = "flashtrace.score"
GUARD_EVENT = "flashtrace.guard.flagged"


class Observer:
    """Watches the attributions of one API server.

    Attributes:
        metrics: Prometheus metrics.
        telemetry: OpenTelemetry spans.
        cache_use: What traces found in the prefix cache.
    """

    def __init__(self, model_name: str, *, tracing: bool) -> None:
        """Registers the metrics.

        Args:
            model_name: The name the model is served under.
            tracing: Whether vLLM exports OpenTelemetry spans.
        """
        self.metrics = TraceMetrics(model_name)
        self.telemetry = Telemetry(tracing, model_name)
        self.cache_use = CacheUse()

    @contextmanager
    def attribution(
        self, trace_id: str, request_id: str | None, route: str, headers: Headers | None
    ) -> Iterator[Observation]:
        """Watches one attribution; the block must hand its result to :meth:`Observation.ended`.

        Args:
            trace_id: Public id of the attribution.
            request_id: vLLM's id of the completion, if there was one.
            route: Route of the HTTP request.
            headers: Trace headers of the HTTP request.
        """
        attributes = {"flashtrace.id": trace_id, "flashtrace.route": route}
        if request_id is not None:
            attributes["gen_ai.request.id"] = request_id
        with self.telemetry.span(ATTRIBUTION_SPAN, headers, attributes) as span:
            observation = Observation(self, trace_id, request_id, route, span)
            try:
                yield observation
            except asyncio.CancelledError:
                observation.cancelled()
                raise


class Observation:
    """One attribution under way."""

    def __init__(
        self, observer: Observer, trace_id: str, request_id: str | None, route: str, span: Span
    ) -> None:
        self._observer = observer
        self._trace_id = trace_id
        self._request_id = request_id
        self._route = route
        self._span = span
        self._began = time.monotonic()
        self._hop: int | None = None

    @contextmanager
    def hop(self, index: int, target_tokens: int) -> Iterator[Span]:
        """Runs hop ``index`` and those behind it from the same prefill.

        The span's headers belong to its engine request.
        """
        self._hop = index
        attributes = {"flashtrace.hop": index, "flashtrace.target_tokens": target_tokens}
        with self._observer.telemetry.span(HOP_SPAN, self._span.headers, attributes) as span:
            try:
                yield span
            except BaseException as error:
                span.failed(getattr(error, "code", None) or type(error).__name__)
                raise

    def measured(self, span: Span, report: TraceReport, lookup: CacheLookup) -> None:
        """Takes what a hop cost and what it found in the prefix cache."""
        self._observer.metrics.hop(report.recomputed_tokens, report.cached_tokens)
        self._observer.metrics.lookup(lookup)
        self._observer.cache_use.add(lookup)
        span.set(
            {
                "flashtrace.recomputed_tokens": report.recomputed_tokens,
                "flashtrace.cached_tokens": report.cached_tokens,
                "flashtrace.restarts": report.restarts,
                "flashtrace.hops": sum(map(len, report.targets)),
                "flashtrace.targets": len(report.targets),
            }
        )

    @contextmanager
    def scoring(self, text: ScoredText) -> Iterator[Span]:
        """Scores a text; the span's headers belong to its engine request."""
        attributes = {"flashtrace.target_tokens": len(text.positions)}
        with self._observer.telemetry.span(SCORE_SPAN, self._span.headers, attributes) as span:
            yield span

    def scored(self, span: Span, report: ScoreReport) -> None:
        """Takes what scoring a text cost."""
        self._observer.metrics.hop(report.recomputed_tokens, report.cached_tokens)
        span.set(
            {
                "flashtrace.recomputed_tokens": report.recomputed_tokens,
                "flashtrace.cached_tokens": report.cached_tokens,
            }
        )

    def ended(self, result: dict[str, Any], usage: TraceUsage | None = None) -> None:
        """Takes the attribution object: counts it, and logs it unless it is completed.

        Args:
            result: The object.
            usage: What a completed one has cost.
        """
        status, error = result["status"], result.get("error") or {}
        code = error.get("code", "")
        seconds: dict[str, float] = {}
        self._span.set({"flashtrace.status": status})
        if status == "completed" and usage is not None:
            seconds = {**usage.seconds, "total": time.monotonic() - self._began}
            self._span.set(
                {
                    **_found(result),
                    "flashtrace.recomputed_tokens": usage.recomputed_tokens,
                    "flashtrace.cached_tokens": usage.cached_tokens,
                }
            )
            self._span.evaluated(result, self._request_id)
        else:
            self._lost(status, code, error.get("message", ""))
        self._observer.metrics.ended(self._route, status, code, seconds)
        if (guard := result.get("guard")) is not None:
            self._guarded(guard["arguments"])

    def _guarded(self, arguments: Sequence[Mapping[str, Any]]) -> None:
        flagged = [each for each in arguments if each["flagged"]]
        self._observer.metrics.guarded(len(arguments), len(flagged))
        for each in flagged:
            # Without names and reasons: a model may write anything as the name of an argument.
            self._span.event(
                GUARD_EVENT,
                {
                    "flashtrace.tool_call": each["tool_call"],
                    "flashtrace.trusted_share": each["trusted"],
                    "flashtrace.untrusted_share": max(
                        (entry["share"] for entry in each["untrusted"]), default=0.0
                    ),
                },
            )

    def cancelled(self) -> None:
        """Counts and logs an attribution whose client left, or that the server's stop ends."""
        self._span.set({"flashtrace.status": "cancelled"})
        self._lost("cancelled", "cancelled", "the client left or the server stops")
        self._observer.metrics.ended(self._route, "cancelled", "cancelled", {})

    def _lost(self, status: str, code: str, message: str) -> None:
        self._span.failed(code)
        log_lost_trace(
            self._trace_id,
            status=status,
            code=code,
            message=message,
            request_id=self._request_id,
            route=self._route,
            hop=self._hop,
        )


def _found(result: Mapping[str, Any]) -> dict[str, int]:
    """What a completed attribution explains, and the most hops that it took."""
    targets = result.get("targets", [result])
    spans = [span for found in targets for span in found["target"]["tokens"]]
    return {
        "flashtrace.hops": max(len(found["hops"]) for found in targets),
        "flashtrace.target_tokens": sum(end - start for start, end in spans),
        "flashtrace.targets": len(targets),
    }


class Telemetry:
    """Makes the spans of one API server."""

    def __init__(self, enabled: bool, model_name: str) -> None:
        """Takes the provider in force.

        Args:
            enabled: Whether vLLM has tracing on.
            model_name: Value of ``gen_ai.request.model``.
        """
        on = enabled and trace is not None
        self._tracer = trace.get_tracer("vllm_flashtrace") if on else None
        # Conventions of OpenTelemetry for generative AI; "attribute" is our own operation.
        self._common = {
            "gen_ai.operation.name": "attribute",
            "gen_ai.provider.name": "vllm",
            "gen_ai.request.model": model_name,
        }

    @contextmanager
    def span(
        self, name: str, headers: Headers | None, attributes: Mapping[str, SpanValue]
    ) -> Iterator[Span]:
        """Runs a span under the context in ``headers``.

        Args:
            name: Name of the span.
            headers: W3C trace headers of the parent; without them the span is a root.
            attributes: Attributes beside the common ones.
        """
        if self._tracer is None:
            yield Span(None, headers)
            return
        propagator = TraceContextTextMapPropagator()
        parent = propagator.extract(headers or {})
        span = self._tracer.start_span(
            name, context=parent, attributes={**self._common, **attributes}
        )
        carrier = dict(headers or {})
        propagator.inject(carrier, trace.set_span_in_context(span, parent))
        try:
            yield Span(span, carrier)
        finally:
            span.end()


class Span:
    """A running span; does nothing when tracing is off.

    Attributes:
        headers: Trace headers that put other spans under this one.
    """

    def __init__(self, span: Any, headers: Headers | None) -> None:
        self._span = span
        self.headers = headers

    def set(self, attributes: Mapping[str, SpanValue]) -> None:
        """Sets attributes."""
        if self._span is not None:
            self._span.set_attributes(dict(attributes))

    def evaluated(self, result: Mapping[str, Any], response_id: str | None) -> None:
        """Adds the measures of a completed attribution as events, the first 128 of them."""
        if self._span is not None:
            for attributes in islice(evaluation_events(result, response_id), _MAX_EVENTS):
                self._span.add_event(EVALUATION_EVENT, attributes)

    def event(self, name: str, attributes: Mapping[str, SpanValue]) -> None:
        """Adds an event."""
        if self._span is not None:
            self._span.add_event(name, dict(attributes))

    def failed(self, code: str) -> None:
        """Marks the span as failed; the code alone, since messages may quote text."""
        if self._span is not None:
            self._span.set_attribute("error.type", code)
            self._span.set_status(trace.StatusCode.ERROR, code)
