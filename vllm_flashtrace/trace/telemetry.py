"""OpenTelemetry spans of attributions.

Invariant: without vLLM's tracing (``--otlp-traces-endpoint``) nothing is recorded and trace headers
pass through untouched; with it, spans go to the provider that vLLM set up, under the request's own
context, and vLLM's spans of our internal requests nest under them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

try:
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:  # Optional, as in vLLM, which refuses --otlp-traces-endpoint without it.
    trace = None  # type: ignore[assignment]

Headers = Mapping[str, str]
SpanValue = str | int | float | bool

ATTRIBUTION_SPAN = "flashtrace.attribute"
HOP_SPAN = "flashtrace.hop"


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

    def failed(self, code: str) -> None:
        """Marks the span as failed; the code alone, since messages may quote text."""
        if self._span is not None:
            self._span.set_attribute("error.type", code)
            self._span.set_status(trace.StatusCode.ERROR, code)


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
        # Conventions of OpenTelemetry for generative AI; "attribute" is an operation of ours.
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
