"""What vLLM's handlers of all traced routes have in common.

A request without the ``flashtrace`` field is served by vLLM's handler object itself, so its
response is vLLM's by construction. A request with it runs the same code of vLLM on a copy of that
object whose ``engine_client`` records what passes through.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from vllm_flashtrace.api.request import FIELD, FlashTraceRequest, check_against_limit
from vllm_flashtrace.base.errors import InvalidRequestError
from vllm_flashtrace.server.http_errors import error_response
from vllm_flashtrace.server.recording_client import RecordingClient
from vllm_flashtrace.server.rendering import with_pixels
from vllm_flashtrace.server.session import (
    RequestFacts,
    TraceService,
    TraceSession,
    refuse_reserved_xargs,
)
from vllm_flashtrace.text.plan import refuse_with_images
from vllm_flashtrace.trace.multimodal import PromptImages


@dataclass(frozen=True, slots=True)
class Recording:
    """A handler that serves one traced request, and what it recorded.

    Attributes:
        handler: A copy of vLLM's handler.
        session: Makes the traces of the request; called after the engine answered.
    """

    handler: Any
    session: Callable[[], TraceSession]


class TracedHandler:
    """Adds the ``flashtrace`` field to one of vLLM's handlers, the second base of a subclass.

    A subclass overrides the method that the route calls, and lets it return :meth:`serve`.
    """

    def __init__(self, stock: Any, service: TraceService) -> None:
        """Takes over the attributes of ``stock`` and keeps it for the actual work."""
        self.__dict__.update(vars(stock))
        self._stock = stock
        self._service = service

    async def serve(self, method: str, request: Any, raw_request: Any) -> Any:
        """Calls vLLM's ``method`` and adds the attributions to what it answers.

        Args:
            method: Name of the handler's method that the route calls.
            request: vLLM's model of the request.
            raw_request: The HTTP request; None outside HTTP.

        Returns:
            A response or a stream with attributions, or an error: ours, or vLLM's as it is.
        """
        try:
            value = await field_as_sent(request, raw_request)
            flashtrace = self._service.parse_request(request, value)
            if flashtrace is None:
                return await getattr(self._stock, method)(request, raw_request)
            recording = await self.record(request, flashtrace)
            response = await getattr(recording.handler, method)(request, raw_request)
        except InvalidRequestError as error:
            return error_response(error)
        if isinstance(response, ErrorResponse):
            return response
        if isinstance(response, AsyncGenerator):
            return self.attach_to_stream(response, recording.session)
        return await self.attach(response, recording.session())

    @abstractmethod
    async def record(self, request: Any, flashtrace: FlashTraceRequest) -> Recording:
        """Makes the handler for one traced request.

        Raises:
            InvalidRequestError: The request cannot be traced.
        """

    async def attach(self, response: Any, session: TraceSession) -> Any:
        """The finished response with its attributions."""
        await session.attach(response.choices)
        return response

    @abstractmethod
    def attach_to_stream(
        self, events: AsyncGenerator[Any, None], session: Callable[[], TraceSession]
    ) -> AsyncGenerator[Any, None]:
        """VLLM's stream with the attributions in it."""


def recording_copy(stock: Any, facts: RequestFacts, service: TraceService) -> Recording:
    """A recording copy of a handler for a request of which everything is known beforehand."""
    handler = copy.copy(stock)
    handler.online_renderer = with_pixels(stock.online_renderer)
    client = handler.engine_client = recording_client(stock.engine_client, facts.flashtrace)
    return Recording(handler, lambda: TraceSession(service, facts, client.prompts))


def recording_client(engine_client: Any, flashtrace: FlashTraceRequest) -> RecordingClient:
    """A recorder that refuses a generation too short for the positions ``flashtrace`` names.

    It also refuses images where ``flashtrace`` asks for what is not known of them.
    """

    def check(sampling_params: Any, images: PromptImages | None) -> None:
        check_beside_images(flashtrace, images)
        if sampling_params.max_tokens is not None:
            check_against_limit(flashtrace, sampling_params.max_tokens)

    return RecordingClient(engine_client, check)


def check_beside_images(flashtrace: FlashTraceRequest, images: PromptImages | None) -> None:
    """Refuses what a request cannot have beside images.

    Raises:
        InvalidRequestError: Naming the option.
    """
    refuse_with_images(flashtrace, 0 if images is None else images.count)


async def field_as_sent(request: Any, raw_request: Any) -> Any:
    """The value of the field in an HTTP request's body; None where it has none.

    Args:
        request: vLLM's request model; some drop keys that they do not know.
        raw_request: The HTTP request, whose body has been parsed already; None outside HTTP.
    """
    if request.model_extra is not None:
        return request.model_extra.get(FIELD)
    if raw_request is None:
        return None
    body = await raw_request.json()
    return body.get(FIELD) if isinstance(body, dict) else None


def refusing(handler: Any, method: str, route: str) -> Any:
    """A copy of ``handler`` whose ``method`` refuses the ``flashtrace`` field.

    Args:
        handler: Handler of a route that cannot be traced.
        method: Its method ``(request, raw_request)``.
        route: The route, as the message names it.
    """
    stock: Callable[..., Awaitable[Any]] = getattr(handler, method)

    async def guarded(request: Any, raw_request: Any = None) -> Any:
        try:
            refuse_reserved_xargs(request)
            value = await field_as_sent(request, raw_request)
            if value is not None and value is not False:
                raise InvalidRequestError(FIELD, f"{FIELD} is not available on {route}")
        except InvalidRequestError as error:
            return error_response(error)
        return await stock(request, raw_request)

    guarded_handler = copy.copy(handler)
    setattr(guarded_handler, method, guarded)
    return guarded_handler
