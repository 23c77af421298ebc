"""What the routes share: the tracer, its limits, and the rules for accepting a request.

Invariant: a request that carries a ``flashtrace`` field is either accepted whole or refused with
an :class:`InvalidRequestError` before anything is generated; the field is never dropped silently.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from vllm_flashtrace.api.request import FlashTraceRequest, RequestLimits, parse_flashtrace_field
from vllm_flashtrace.base.errors import InvalidRequestError, TraceError
from vllm_flashtrace.base.records import Completion
from vllm_flashtrace.server.deferred import DeferredAttributions
from vllm_flashtrace.trace.tracer import AsyncTracer, EngineContext
from vllm_flashtrace.trace.wire import EXTRA_ARGS_KEY

FIELD = "flashtrace"
RESERVED_XARGS = frozenset({EXTRA_ARGS_KEY, "flashtrace_trace"})


@dataclass(frozen=True, slots=True)
class TraceService:
    """Attribution service of one API server process.

    Attributes:
        tracer: Runs the traces.
        limits: Bounds that a request is checked against.
        deferred: Attributions that outlive their requests.
        unsupported: Why the served model cannot be traced, None when it can.
    """

    tracer: AsyncTracer
    limits: RequestLimits
    deferred: DeferredAttributions
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
        parsed = self.parse_field_of(request, (request.model_extra or {}).get(FIELD))
        if parsed is not None and getattr(request, "use_beam_search", False):
            raise InvalidRequestError(
                "use_beam_search",
                "use_beam_search=true cannot be combined with flashtrace: beams are searched by "
                "inner requests that cannot be traced",
            )
        return parsed

    def parse_field_of(self, request: Any, value: Any) -> FlashTraceRequest | None:
        """Validates the field's ``value`` and that nothing else in ``request`` poses as it.

        Raises:
            InvalidRequestError: Naming the field and its value.
        """
        refuse_reserved_xargs(request)
        return self.parse_field(value)

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

    async def attribute(
        self,
        request: FlashTraceRequest,
        completion: Completion,
        context: EngineContext,
        *,
        trace_id: str,
        route: str,
        **options: Any,
    ) -> dict[str, Any]:
        """Attributes a completion now, or later if ``request`` is deferred.

        Args:
            request: What is asked for.
            completion: The completion to explain.
            context: What the trace shares with it.
            trace_id: Fresh id of the attribution.
            route: Route of the HTTP request.
            options: Further arguments of :meth:`AsyncTracer.attribute`.

        Returns:
            The attribution object; of a deferred one, the ``queued`` object at once.
        """
        job = partial(
            self.tracer.attribute,
            request,
            completion,
            context,
            trace_id=trace_id,
            route=route,
            **options,
        )
        if request.mode != "deferred":
            return await job()
        try:
            return await self.deferred.submit(trace_id, job)
        except TraceError as error:
            return self.tracer.lost(trace_id, error, context, route=route)

    async def close(self) -> None:
        """Ends what outlives the requests; the last thing that is called."""
        await self.deferred.close()


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
