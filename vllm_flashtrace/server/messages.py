"""``/v1/messages``, vLLM's form of Anthropic's Messages API, with the ``flashtrace`` field.

The ``flashtrace`` field on routes whose request model drops keys it does not know.

Invariant: on a route that cannot serve the field it is an HTTP 400, never ignored.

Invariant: vLLM itself turns the request into a chat request and the chat's answer into a message;
here that chat request is only looked at, so that an attribution is one of what was generated.

Positions in messages count the chat request's messages: the system prompt first, then one message
per turn, with each tool result as a message of its own before the turn it came in.

Written against vLLM 0.32.0: ``AnthropicServingMessages`` is a chat handler that calls its own
``create_chat_completion``, and its request model drops unknown keys.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from vllm.entrypoints.anthropic.protocol import AnthropicMessagesResponse
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages

from vllm_flashtrace.api.request import FlashTraceRequest
from vllm_flashtrace.base.errors import InvalidRequestError
from vllm_flashtrace.server.openai import (
    ErrorResponse,
    chat_facts,
    error_response,
    recording_client,
)
from vllm_flashtrace.server.rendering import require_tool_calls
from vllm_flashtrace.server.session import (
    FIELD,
    RequestFacts,
    TraceService,
    TraceSession,
    refuse_reserved_xargs,
)
from vllm_flashtrace.server.streams import with_attribution_of_message


async def field_as_sent(request: Any, raw_request: Any) -> Any:
    """The value of the field in an HTTP request's body; None where it has none.

    Args:
        request: vLLM's request model.
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
                raise InvalidRequestError(FIELD, f"flashtrace is not available on {route}")
        except InvalidRequestError as error:
            return error_response(error)
        return await stock(request, raw_request)

    guarded_handler = copy.copy(handler)
    setattr(guarded_handler, method, guarded)
    return guarded_handler


class MessageWithAttribution(AnthropicMessagesResponse):
    """vLLM's message with our object beside its content."""

    flashtrace: dict[str, Any]


class TracedMessages(AnthropicServingMessages):
    """``/v1/messages`` with the ``flashtrace`` field."""

    def __init__(self, stock: AnthropicServingMessages, service: TraceService) -> None:
        """Takes over the attributes of ``stock`` and keeps it for the actual work."""
        self.__dict__.update(vars(stock))
        self._stock = stock
        self._service = service

    async def create_messages(self, request: Any, raw_request: Any = None) -> Any:
        """Adds the attribution to vLLM's answer: a message, a stream, or an error as it is."""
        try:
            value = await field_as_sent(request, raw_request)
            flashtrace = self._service.parse_field_of(request, value)
            if flashtrace is None:
                return await self._stock.create_messages(request, raw_request)
            handler = _RecordingMessages(self._stock, flashtrace)
            response = await handler.create_messages(request, raw_request)
        except InvalidRequestError as error:
            return error_response(error)
        if isinstance(response, ErrorResponse):
            return response
        session = handler.session(self._service)
        if isinstance(response, AsyncGenerator):
            return with_attribution_of_message(response, session)
        [attribution] = await session.all_of([0])
        return MessageWithAttribution(**vars(response), flashtrace=attribution)


class _RecordingMessages(AnthropicServingMessages):
    """The stock handler for one traced request."""

    def __init__(self, stock: AnthropicServingMessages, flashtrace: FlashTraceRequest) -> None:
        self.__dict__.update(vars(stock))
        self._flashtrace = flashtrace
        self._facts: RequestFacts | None = None
        self.engine_client: Any = recording_client(stock.engine_client, flashtrace)

    async def create_chat_completion(self, request: Any, raw_request: Any = None) -> Any:
        require_tool_calls(self._flashtrace, self.parser_cls, request)
        facts = chat_facts(self, request, self._flashtrace)
        self._facts = dataclasses.replace(facts, route="/v1/messages")
        return await super().create_chat_completion(request, raw_request)

    def session(self, service: TraceService) -> TraceSession:
        """The traces of the request, once it has been given to the engine."""
        assert self._facts is not None
        return TraceSession(service, self._facts, self.engine_client.prompts)
