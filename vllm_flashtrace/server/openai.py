"""vLLM's OpenAI handlers with attribution; with its neighbours, all that touches them.

Invariant: a request without the ``flashtrace`` field is handed to the stock handler object itself,
so its response is vLLM's by construction. A request with it runs the same stock code on a shallow
copy of that object whose ``engine_client`` records what passes through.

Written against vLLM 0.32.0: ``create_chat_completion`` and ``create_completion`` call
``self.engine_client.generate(engine_input, sampling_params, request_id, **kwargs)`` once per
prompt, in prompt order, before they return.
"""

from __future__ import annotations

import copy
from collections.abc import AsyncGenerator, Awaitable
from http import HTTPStatus
from typing import Any

from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import validate_json_request, with_cancellation

from vllm_flashtrace.api.checks import check_messages
from vllm_flashtrace.api.request import FlashTraceRequest, check_against_limit
from vllm_flashtrace.base.errors import InvalidRequestError
from vllm_flashtrace.server.recording_client import RecordingClient
from vllm_flashtrace.server.rendering import (
    make_reasoning_parser,
    make_render,
    require_tool_calls,
)
from vllm_flashtrace.server.session import RequestFacts, TraceService, TraceSession
from vllm_flashtrace.server.streams import (
    ChoiceWithAttribution,
    chat_choice,
    text_choice,
    with_attributions,
)

__all__ = [
    "ErrorResponse",
    "TracedChat",
    "TracedCompletion",
    "chat_facts",
    "error_response",
    "not_found_response",
    "recording_client",
    "validate_json_request",
    "with_cancellation",
]


class TracedChat(OpenAIServingChat):
    """``/v1/chat/completions`` with the ``flashtrace`` field."""

    def __init__(self, stock: OpenAIServingChat, service: TraceService) -> None:
        """Takes over the attributes of ``stock`` and keeps it for the actual work."""
        self.__dict__.update(vars(stock))
        self._stock = stock
        self._service = service

    async def create_chat_completion(self, request: Any, raw_request: Any = None) -> Any:
        """Serves a chat request; see :func:`_serve`."""
        try:
            flashtrace = self._service.parse_request(request)
            if flashtrace is not None:
                require_tool_calls(flashtrace, self.parser_cls, request)
                facts = chat_facts(self._stock, request, flashtrace)
        except InvalidRequestError as error:
            return error_response(error)
        if flashtrace is None:
            return await self._stock.create_chat_completion(request, raw_request)
        handler, client = _recording_copy(self._stock, flashtrace)
        answer = handler.create_chat_completion(request, raw_request)
        return await _serve(answer, client, facts, self._service, chat_choice)


class TracedCompletion(OpenAIServingCompletion):
    """``/v1/completions`` with the ``flashtrace`` field."""

    def __init__(self, stock: OpenAIServingCompletion, service: TraceService) -> None:
        """Takes over the attributes of ``stock`` and keeps it for the actual work."""
        self.__dict__.update(vars(stock))
        self._stock = stock
        self._service = service

    async def create_completion(self, request: Any, raw_request: Any = None) -> Any:
        """Serves a completion request; see :func:`_serve`."""
        try:
            flashtrace = self._service.parse_request(request)
            if flashtrace is not None:
                require_tool_calls(flashtrace)
        except InvalidRequestError as error:
            return error_response(error)
        if flashtrace is None:
            return await self._stock.create_completion(request, raw_request)
        facts = RequestFacts(
            flashtrace=flashtrace,
            choices_per_prompt=request.n or 1,
            prompt_texts=_prompt_texts(request),
            # vLLM generates one hidden token for a pure echo.
            generates=not (request.echo and request.max_tokens == 0),
            route="/v1/completions",
        )
        handler, client = _recording_copy(self._stock, flashtrace)
        answer = handler.create_completion(request, raw_request)
        return await _serve(answer, client, facts, self._service, text_choice)


def chat_facts(
    handler: OpenAIServingChat, request: Any, flashtrace: FlashTraceRequest
) -> RequestFacts:
    """What a chat request says about its completions; to be called before vLLM renders it.

    Args:
        handler: vLLM's chat handler, or one derived from it.
        request: The chat request.
        flashtrace: Its validated field.

    Raises:
        InvalidRequestError: The messages cannot be copied.
    """
    check_messages(request.messages, "messages")
    return RequestFacts(
        flashtrace=flashtrace,
        choices_per_prompt=request.n or 1,
        # vLLM may rewrite the messages while it renders them.
        messages=copy.deepcopy(request.messages),
        render=make_render(handler, request),
        reasoning_parser=make_reasoning_parser(handler, request),
    )


def recording_client(engine_client: Any, flashtrace: FlashTraceRequest) -> RecordingClient:
    """A recorder that refuses a generation too short for the positions ``flashtrace`` names."""

    def check(sampling_params: Any) -> None:
        if sampling_params.max_tokens is not None:
            check_against_limit(flashtrace, sampling_params.max_tokens)

    return RecordingClient(engine_client, check)


def error_response(error: InvalidRequestError) -> Any:
    """OpenAI's error body with status 400 for a refused request."""
    return create_error_response(error.message, param=error.param)


def not_found_response(message: str, param: str) -> Any:
    """OpenAI's error body with status 404."""
    return create_error_response(
        message, err_type="NotFoundError", status_code=HTTPStatus.NOT_FOUND, param=param
    )


async def _serve(
    answer: Awaitable[Any],
    client: RecordingClient,
    facts: RequestFacts,
    service: TraceService,
    make_choice: ChoiceWithAttribution,
) -> Any:
    """Adds the attributions to vLLM's answer: a response, a stream, or an error as it is."""
    try:
        response = await answer
    except InvalidRequestError as error:
        return error_response(error)
    if isinstance(response, ErrorResponse):
        return response
    session = TraceSession(service, facts, client.prompts)
    if isinstance(response, AsyncGenerator):
        return with_attributions(response, session, make_choice)
    await session.attach(response.choices)
    return response


def _recording_copy(stock: Any, flashtrace: FlashTraceRequest) -> tuple[Any, RecordingClient]:
    handler = copy.copy(stock)
    handler.engine_client = recording_client(stock.engine_client, flashtrace)
    return handler, handler.engine_client


def _prompt_texts(request: Any) -> list[str | None]:
    """The client's prompt strings in the order of vLLM's engine inputs.

    None stands for a prompt that was not sent as text, or that vLLM rewrites (fill-in-the-middle
    suffix, truncation), where offsets into the client's string would be wrong.
    """
    embeds, prompt = request.prompt_embeds, request.prompt
    texts: list[str | None] = [None] * (
        0 if embeds is None else len(embeds) if isinstance(embeds, list) else 1
    )
    if request.suffix is not None or request.truncate_prompt_tokens is not None:
        return texts
    if isinstance(prompt, str):
        return [*texts, prompt]
    return [*texts, *(p if isinstance(p, str) else None for p in prompt or ())]
