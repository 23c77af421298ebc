"""``/v1/chat/completions`` and ``/v1/completions`` with the ``flashtrace`` field.

Written against vLLM 0.32.0: ``create_chat_completion`` and ``create_completion`` call
``self.engine_client.generate(engine_input, sampling_params, request_id, **kwargs)`` once per
prompt, in prompt order, before they return.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion

from vllm_flashtrace.api.checks import check_messages
from vllm_flashtrace.api.request import FlashTraceRequest, refuse_citations
from vllm_flashtrace.base.records import Document
from vllm_flashtrace.server.citation_forms import cited_message
from vllm_flashtrace.server.rendering import (
    copied_messages,
    make_reasoning_parser,
    make_render,
    require_tool_calls,
    with_pixels,
)
from vllm_flashtrace.server.session import RequestFacts, TraceService, TraceSession
from vllm_flashtrace.server.streams import chat_choice, text_choice, with_attributions
from vllm_flashtrace.server.traced_handler import (
    Recording,
    TracedHandler,
    recording_client,
    recording_copy,
)
from vllm_flashtrace.text.prompt_images import refuse_media
from vllm_flashtrace.text.sources import chat_documents


class TracedChat(TracedHandler, OpenAIServingChat):
    """``/v1/chat/completions`` with the ``flashtrace`` field."""

    async def create_chat_completion(self, request: Any, raw_request: Any = None) -> Any:
        """Serves a chat request; see :meth:`TracedHandler.serve`."""
        return await self.serve("create_chat_completion", request, raw_request)

    async def record(self, request: Any, flashtrace: FlashTraceRequest) -> Recording:
        """A recording copy, with what the request says of its completions."""
        require_tool_calls(flashtrace, self.parser_cls, request)
        facts = await chat_facts(self._stock, request, flashtrace)
        return recording_copy(self._stock, facts, self._service)

    async def attach(self, response: Any, session: TraceSession) -> Any:
        """The finished response with its attributions, and messages with their citations."""
        await session.attach(response.choices)
        for choice in response.choices:
            citations = await session.citations(choice.index)
            if citations is not None:
                form = session.flashtrace.citation_form
                choice.message = cited_message(choice.message, citations, form)
        return response

    def attach_to_stream(
        self, events: AsyncGenerator[Any, None], session: Callable[[], TraceSession]
    ) -> AsyncGenerator[Any, None]:
        """One more chunk per choice."""
        return with_attributions(events, session(), chat_choice)


class TracedCompletion(TracedHandler, OpenAIServingCompletion):
    """``/v1/completions`` with the ``flashtrace`` field."""

    async def create_completion(self, request: Any, raw_request: Any = None) -> Any:
        """Serves a completion request; see :meth:`TracedHandler.serve`."""
        return await self.serve("create_completion", request, raw_request)

    async def record(self, request: Any, flashtrace: FlashTraceRequest) -> Recording:
        """A recording copy, with what the request says of its completions."""
        require_tool_calls(flashtrace)
        refuse_citations(flashtrace, "/v1/completions")
        facts = RequestFacts(
            flashtrace=flashtrace,
            choices_per_prompt=request.n or 1,
            prompt_texts=_prompt_texts(request),
            # vLLM generates one hidden token for a pure echo.
            generates=not (request.echo and request.max_tokens == 0),
            route="/v1/completions",
        )
        await facts.check_sources()
        return recording_copy(self._stock, facts, self._service)

    def attach_to_stream(
        self, events: AsyncGenerator[Any, None], session: Callable[[], TraceSession]
    ) -> AsyncGenerator[Any, None]:
        """One more chunk per choice."""
        return with_attributions(events, session(), text_choice)


class RecordedChat(OpenAIServingChat):
    """Notes what a handler of another form asks of the chat handler that it derives from.

    A base of a handler's copy for one traced request, before the stock class, which answers it by
    its own ``create_chat_completion``.
    """

    def __init__(
        self,
        stock: OpenAIServingChat,
        flashtrace: FlashTraceRequest,
        route: str,
        documents: Sequence[Document],
    ) -> None:
        """Takes over the attributes of ``stock``.

        Args:
            stock: vLLM's handler.
            flashtrace: The validated field of the request.
            route: Route of the request.
            documents: Documents of the request that the chat request does not name.
        """
        self.__dict__.update(vars(stock))
        self._flashtrace = flashtrace
        self._route = route
        self._documents = documents
        self._facts: RequestFacts | None = None
        self.online_renderer = with_pixels(stock.online_renderer)
        self.engine_client: Any = recording_client(stock.engine_client, flashtrace)

    async def create_chat_completion(self, request: Any, raw_request: Any = None) -> Any:
        """Serves the chat request that vLLM made of the request.

        Raises:
            InvalidRequestError: It cannot be traced as asked.
        """
        require_tool_calls(self._flashtrace, self.parser_cls, request)
        facts = await chat_facts(self, request, self._flashtrace, self._documents)
        self._facts = dataclasses.replace(facts, route=self._route)
        return await super().create_chat_completion(request, raw_request)

    def session(self, service: TraceService) -> TraceSession:
        """The traces of the request, once it has been given to the engine."""
        assert self._facts is not None
        return TraceSession(service, self._facts, self.engine_client.prompts)


async def chat_facts(
    handler: OpenAIServingChat,
    request: Any,
    flashtrace: FlashTraceRequest,
    documents: Sequence[Document] = (),
) -> RequestFacts:
    """What a chat request says about its completions; to be called before vLLM renders it.

    Args:
        handler: vLLM's chat handler, or one derived from it.
        request: The chat request.
        flashtrace: Its validated field.
        documents: Documents that are in the messages already.

    Raises:
        InvalidRequestError: The messages cannot be copied, or do not hold the sources.
    """
    check_messages(request.messages, "messages")
    messages = copied_messages(request.messages)
    refuse_media(messages, "messages")
    facts = RequestFacts(
        flashtrace=flashtrace,
        choices_per_prompt=request.n or 1,
        messages=messages,
        render=make_render(handler, request),
        reasoning_parser=make_reasoning_parser(handler, request),
        documents=[*documents, *chat_documents(request.documents)],
    )
    await facts.check_sources()
    return facts


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
