"""``/cohere/v2/chat``, vLLM's form of Cohere's Chat API, with the ``flashtrace`` field.

vLLM itself turns the request into a chat request and the chat's answer into Cohere's form; that
chat request is only looked at here. vLLM has the route with ``VLLM_ENABLE_COHERE_API=1``, where the
package ``cohere`` is installed.

Written against vLLM 0.32.0: ``CohereServingChatV2`` is a chat handler that calls its own
``create_chat_completion``, and its request model drops unknown keys.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from typing import Any

from cohere.types import Citation
from vllm.entrypoints.cohere.protocol import (
    CitationEndEvent,
    CitationStartEvent,
    CohereChatV2Response,
)
from vllm.entrypoints.cohere.serving import CohereServingChatV2

from vllm_flashtrace.api.request import FIELD, FlashTraceRequest
from vllm_flashtrace.base.records import Document
from vllm_flashtrace.server.citation_forms import Citations, cohere_citations
from vllm_flashtrace.server.large_objects import Carried
from vllm_flashtrace.server.openai import RecordedChat
from vllm_flashtrace.server.session import TraceSession
from vllm_flashtrace.server.traced_handler import Recording, TracedHandler
from vllm_flashtrace.text.sources import chat_documents

_DATA = "data: "
_CITATION_EVENTS = ("citation-start", "citation-end")
# What has none of these words, as most tokens of a stream, is handed on unread.
_READ_EVENTS = ("content-start", "message-end", *_CITATION_EVENTS)


class ChatWithAttribution(CohereChatV2Response):
    """vLLM's answer with our object beside its message."""

    flashtrace: Carried


class TracedCohereChat(TracedHandler, CohereServingChatV2):
    """``/cohere/v2/chat`` with the ``flashtrace`` field."""

    async def create_chat_v2(self, request: Any, raw_request: Any = None) -> Any:
        """Serves a chat; see :meth:`TracedHandler.serve`."""
        return await self.serve("create_chat_v2", request, raw_request)

    async def record(self, request: Any, flashtrace: FlashTraceRequest) -> Recording:
        """A copy that notes the chat request that vLLM makes of the request."""
        handler = _RecordingCohereChat(
            self._stock, flashtrace, "/cohere/v2/chat", _documents(request)
        )
        return Recording(handler, lambda: handler.session(self._service))

    async def attach(self, response: Any, session: TraceSession) -> ChatWithAttribution:
        """VLLM's model of an answer drops unknown keys, so it becomes one that has ours."""
        [attribution] = await session.all_of([0])
        citations = await session.citations(0)
        if citations is not None:
            blocks = response.message.content or ()
            at = next((i for i, block in enumerate(blocks) if block.type == "text"), 0)
            response.message.citations = list(_citations(citations, at))
        return ChatWithAttribution(**vars(response), flashtrace=attribution)

    def attach_to_stream(
        self, events: AsyncGenerator[Any, None], session: Callable[[], TraceSession]
    ) -> AsyncGenerator[Any, None]:
        """The attribution in the event ``message-end``, and the citations before it."""
        return _with_attribution(events, session())


class _RecordingCohereChat(RecordedChat, CohereServingChatV2):
    """The stock handler for one traced request."""


def _documents(request: Any) -> list[Document]:
    """The request's documents, under the ids that vLLM gives them."""
    named = []
    for index, document in enumerate(request.documents or ()):
        data = document if isinstance(document, str) else document.data
        fields = {"text": data} if isinstance(data, str) else dict(data)
        name = None if isinstance(document, str) else document.id
        texts = {key: value for key, value in fields.items() if isinstance(value, str)}
        named.append({**texts, "id": name or f"doc_{index}"})
    return chat_documents(named)


def _citations(citations: Citations, content_index: int) -> Iterator[Citation]:
    for citation in cohere_citations(citations, content_index):
        yield Citation.model_validate(citation)


async def _with_attribution(
    events: AsyncGenerator[str, None], session: TraceSession
) -> AsyncGenerator[str, None]:
    """VLLM's events; where citations are asked for, those that the model made up are left out."""
    cites = session.flashtrace.citations is not None
    text = 0
    try:
        async with aclosing(events):
            async for event in events:
                if not any(kind in event for kind in _READ_EVENTS):
                    yield event
                    continue
                data: dict[str, Any] = json.loads(event.removeprefix(_DATA))
                kind = data["type"]
                if kind in _CITATION_EVENTS and cites:
                    continue
                if kind == "content-start" and _is_text(data):
                    text = data["index"]
                if kind == "message-end" and data["delta"].get("finish_reason") != "ERROR":
                    session.start(0)
                    for each in _citation_events(await session.citations(0) or (), text):
                        yield each
                    data[FIELD] = await session.result(0)
                    event = _write(data)
                yield event
    finally:
        await session.close()


def _citation_events(citations: Citations, content_index: int) -> Iterator[str]:
    for index, citation in enumerate(_citations(citations, content_index)):
        delta: Any = {"message": {"citations": citation.model_dump(exclude_none=True)}}
        start = CitationStartEvent(index=index, delta=delta)
        yield _write(start.model_dump(exclude_none=True))
        yield _write(CitationEndEvent(index=index).model_dump(exclude_none=True))


def _is_text(data: dict[str, Any]) -> bool:
    return bool(data["delta"]["message"]["content"]["type"] == "text")


def _write(data: dict[str, Any]) -> str:
    return f"{_DATA}{json.dumps(data, separators=(',', ':'))}\n\n"
