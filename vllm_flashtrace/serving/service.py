"""What the routes share: the tracer, its limits, and the rules for accepting a request.

Invariant: a request that carries a ``flashtrace`` field is either accepted whole or refused with
an :class:`InvalidRequestError` before anything is generated; the field is never dropped silently.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_flashtrace.errors import InvalidRequestError
from vllm_flashtrace.schema import FlashTraceRequest, RequestLimits, parse_flashtrace_field
from vllm_flashtrace.tracer import AsyncTracer
from vllm_flashtrace.wire import EXTRA_ARGS_KEY

FIELD = "flashtrace"
RESERVED_XARGS = frozenset({EXTRA_ARGS_KEY, "flashtrace_trace"})


@dataclass(frozen=True, slots=True)
class TraceService:
    """Attribution service of one API server process.

    Attributes:
        tracer: Runs the traces.
        limits: Bounds that a request is checked against.
        unsupported: Why the served model cannot be traced, None when it can.
    """

    tracer: AsyncTracer
    limits: RequestLimits
    unsupported: str | None = None

    def parse_request(self, request: Any) -> FlashTraceRequest | None:
        """Validates the ``flashtrace`` field of a vLLM request model.

        Args:
            request: Chat or completion request; our field is in its ``model_extra``.

        Returns:
            None when no attribution is asked for.

        Raises:
            InvalidRequestError: Naming the field and its value.
        """
        refuse_reserved_xargs(request)
        extra = request.model_extra
        if not extra or FIELD not in extra:
            return None
        parsed = self.parse_field(extra[FIELD])
        if parsed is not None and request.use_beam_search:
            raise InvalidRequestError(
                "use_beam_search",
                "use_beam_search=true cannot be combined with flashtrace: beams are searched by "
                "inner requests that cannot be traced",
            )
        return parsed

    def parse_field(self, value: Any) -> FlashTraceRequest | None:
        """Validates one value of the field; None for null and false.

        Raises:
            InvalidRequestError: A bad value, or a model that cannot be traced.
        """
        parsed = parse_flashtrace_field(value, self.limits)
        if parsed is not None and self.unsupported is not None:
            raise InvalidRequestError(
                FIELD,
                f"flashtrace: the served model cannot be traced: {self.unsupported}",
                code="unsupported_model",
            )
        return parsed

    def refuse_field(self, request: Any, route: str) -> None:
        """Refuses the field on a route that cannot serve it.

        Raises:
            InvalidRequestError: The request asks for an attribution.
        """
        refuse_reserved_xargs(request)
        value = (request.model_extra or {}).get(FIELD)
        if value is not None and value is not False:
            raise InvalidRequestError(FIELD, f"flashtrace is not available on {route}")


def refuse_reserved_xargs(request: Any) -> None:
    """Keeps clients from reaching the key under which internal trace requests travel.

    Raises:
        InvalidRequestError: ``vllm_xargs`` holds a reserved key.
    """
    # The batch request model does not declare the field; it may still be sent.
    xargs = getattr(request, "vllm_xargs", None)
    if not isinstance(xargs, dict):
        return
    for key in sorted(RESERVED_XARGS.intersection(xargs)):
        raise InvalidRequestError(
            f"vllm_xargs.{key}", f"vllm_xargs.{key} is reserved for internal use"
        )
