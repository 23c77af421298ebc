"""``/v1/responses`` with the ``flashtrace`` field.

The attribution is added to the output item that carries the answer, in the finished response and in
the ``response.completed`` event; everything else is vLLM's.

Positions in messages count the messages that vLLM makes of the request for the chat template:
``instructions`` first, then the turns of ``previous_response_id``, then ``input``, where a
function call joins the assistant's message before it.

Written against vLLM 0.32.0: ``create_responses`` renders through
``self.online_renderer.preprocess_chat`` and generates in ``_generate_with_builtin_tools``, whose
last engine call gives the answer.
"""

from __future__ import annotations

import copy
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from openai.types.responses import ResponseOutputTextAnnotationAddedEvent
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.renderers import merge_kwargs

from vllm_flashtrace.api.checks import check_messages
from vllm_flashtrace.api.request import FlashTraceRequest, check_against_limit, refuse_citations
from vllm_flashtrace.base.errors import InvalidRequestError
from vllm_flashtrace.base.records import Completion
from vllm_flashtrace.server.citation_forms import response_annotations
from vllm_flashtrace.server.recording_client import RecordingClient
from vllm_flashtrace.server.rendering import (
    Render,
    copied_messages,
    make_reasoning_parser,
    render_with,
    require_tool_calls,
    with_pixels,
)
from vllm_flashtrace.server.session import (
    RequestFacts,
    TraceService,
    TraceSession,
    check_sources,
)
from vllm_flashtrace.server.traced_handler import Recording, TracedHandler, check_beside_images
from vllm_flashtrace.text.prompt_images import refuse_media


class TracedResponses(TracedHandler, OpenAIServingResponses):
    """``/v1/responses`` with the ``flashtrace`` field."""

    async def create_responses(self, request: Any, raw_request: Any = None) -> Any:
        """Serves a response; see :meth:`TracedHandler.serve`."""
        return await self.serve("create_responses", request, raw_request)

    async def record(self, request: Any, flashtrace: FlashTraceRequest) -> Recording:
        """A copy that notes what vLLM makes of the request while it renders it."""
        if request.background:
            raise InvalidRequestError(
                "background",
                "background=true cannot be combined with flashtrace: such a response counts as "
                "completed before its attribution is there; use mode 'deferred' instead",
            )
        require_tool_calls(flashtrace, self.parser, request)
        refuse_citations(flashtrace, "/v1/responses", forms=True)
        handler = _RecordingResponses(self._stock, flashtrace, request)
        return Recording(handler, lambda: handler.session(self._service))

    async def attach(self, response: Any, session: TraceSession) -> Any:
        """The response, with the attribution on the output item that it explains."""
        # A response that vLLM keeps may be fetched again.
        [attribution] = await session.all_of([0], whole=self._stock.enable_store)
        carrier = _answer(response.output, session.flashtrace)
        (response if carrier is None else carrier).flashtrace = attribution
        for _, _, part, own in await _annotated(response, session):
            part.annotations = own
        return response

    async def attach_to_stream(
        self, events: AsyncGenerator[Any, None], session: Callable[[], TraceSession]
    ) -> AsyncGenerator[Any, None]:
        """The events, with the attribution in the finished response of the last one."""
        async with aclosing(events):
            async for event in events:
                if event.type == "response.completed":
                    traced = session()
                    await self.attach(event.response, traced)
                    for added in await _added(event, traced):
                        yield added
                yield event


async def _annotated(response: Any, session: TraceSession) -> list[tuple[int, int, Any, list[Any]]]:
    """Indices of the item and the content part of the answer's text, the part, its annotations."""
    citations = await session.citations(0)
    messages = [i for i, item in enumerate(response.output) if item.type == "message"]
    if citations is None or not messages:
        return []
    parts = response.output[messages[-1]].content
    texts = [i for i, part in enumerate(parts) if part.type == "output_text"]
    return [(messages[-1], i, parts[i], response_annotations(citations)) for i in texts[:1]]


async def _added(completed: Any, session: TraceSession) -> list[Any]:
    """One event per annotation, which take the numbers from that of the last event on."""
    events = [
        ResponseOutputTextAnnotationAddedEvent(
            type="response.output_text.annotation.added",
            annotation=annotation.model_dump(),
            annotation_index=index,
            content_index=content_index,
            item_id=completed.response.output[output_index].id,
            output_index=output_index,
            sequence_number=completed.sequence_number + index,
        )
        for output_index, content_index, _, own in await _annotated(completed.response, session)
        for index, annotation in enumerate(own)
    ]
    completed.sequence_number += len(events)
    return events


class _RecordingResponses(OpenAIServingResponses):
    """The stock handler for one traced request."""

    def __init__(
        self, stock: OpenAIServingResponses, flashtrace: FlashTraceRequest, request: Any
    ) -> None:
        self.__dict__.update(vars(stock))
        self._flashtrace = flashtrace
        self._request = request
        self._messages: Sequence[Mapping[str, Any]] = ()
        self._render: Render | None = None
        self.engine_client: Any = RecordingClient(
            stock.engine_client, lambda _, images: check_beside_images(flashtrace, images)
        )
        self.online_renderer = copy.copy(stock.online_renderer)
        self.online_renderer.preprocess_chat = self._preprocess_chat
        self._stock_renderer = stock.online_renderer

    async def _preprocess_chat(
        self,
        request: Any,
        messages: Any,
        default_template: Any,
        default_template_content_format: Any,
        default_template_kwargs: Any,
        tool_dicts: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Notes what is rendered, and how; vLLM may rewrite the messages while it renders."""
        check_messages(messages, "input")
        self._messages = copied_messages(messages)
        refuse_media(self._messages, "input")
        known = Completion((), (), "", messages=self._messages)
        await check_sources(self._flashtrace, known)
        defaults = merge_kwargs(default_template_kwargs, {"tools": tool_dicts, "tokenize": False})
        params = request.build_chat_params(
            default_template, default_template_content_format
        ).with_defaults(defaults)
        self._render = render_with(self._stock_renderer, lambda: params)
        return await with_pixels(self._stock_renderer).preprocess_chat(
            request,
            messages,
            default_template,
            default_template_content_format,
            default_template_kwargs,
            tool_dicts,
            **kwargs,
        )

    def _generate_with_builtin_tools(self, *args: Any, **kwargs: Any) -> Any:
        # A plain function: a refusal has to come before a stream is promised.
        check_against_limit(self._flashtrace, kwargs["sampling_params"].max_tokens)
        return super()._generate_with_builtin_tools(*args, **kwargs)

    def session(self, service: TraceService) -> TraceSession:
        """The traces of the request, once its generation is over."""
        view: Any = _ChatView(self)
        facts = RequestFacts(
            flashtrace=self._flashtrace,
            choices_per_prompt=1,
            messages=self._messages,
            render=self._render,
            reasoning_parser=make_reasoning_parser(view, self._request),
            route="/v1/responses",
        )
        # With tools run by the server there are several generations; the last one is the answer.
        return TraceSession(service, facts, self.engine_client.prompts[-1:])


class _ChatView:
    """The responses handler under the names that the chat handler has for the same things."""

    def __init__(self, handler: OpenAIServingResponses) -> None:
        self.parser_cls = handler.parser
        self.renderer = handler.renderer
        self.online_renderer = handler.online_renderer
        self.enable_auto_tools = handler.enable_auto_tools
        self.model_config = handler.model_config
        self._make_parser = handler._make_response_parser
        self._effective_chat_template_kwargs = handler._effective_chat_template_kwargs


def _answer(items: Sequence[Any], flashtrace: FlashTraceRequest) -> Any | None:
    """The output item that carries what ``flashtrace`` explains; None where there is no item."""
    messages = [item for item in items if item.type == "message"]
    calls = [item for item in items if item.type in ("function_call", "custom_tool_call")]
    wanted = getattr(flashtrace.target, "tool_call", None)
    if wanted is not None and wanted < len(calls):
        return calls[wanted]
    return next(iter([*messages[-1:], *calls[:1], *items[-1:]]), None)
