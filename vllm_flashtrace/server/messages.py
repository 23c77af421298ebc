"""``/v1/messages``, vLLM's form of Anthropic's Messages API, with the ``flashtrace`` field.

vLLM itself turns the request into a chat request and the chat's answer into a message; that chat
request is only looked at here. Positions in messages count its messages: the system prompt first,
then one message per turn, with each tool result as a message of its own before the turn it came in.

Written against vLLM 0.32.0: ``AnthropicServingMessages`` is a chat handler that calls its own
``create_chat_completion``, and its request model drops unknown keys.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any

from pydantic import SerializeAsAny
from vllm.entrypoints.anthropic.protocol import AnthropicContentBlock, AnthropicMessagesResponse
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages

from vllm_flashtrace.api.request import FlashTraceRequest, refuse_citations
from vllm_flashtrace.server.anthropic_documents import documents_of_request
from vllm_flashtrace.server.citation_forms import cited_blocks
from vllm_flashtrace.server.large_objects import Carried
from vllm_flashtrace.server.openai import RecordedChat
from vllm_flashtrace.server.session import TraceSession
from vllm_flashtrace.server.streams import with_attribution_of_message
from vllm_flashtrace.server.traced_handler import Recording, TracedHandler


class MessageWithAttribution(AnthropicMessagesResponse):
    """vLLM's message with our object beside its content."""

    content: list[SerializeAsAny[AnthropicContentBlock]]
    flashtrace: Carried


class TracedMessages(TracedHandler, AnthropicServingMessages):
    """``/v1/messages`` with the ``flashtrace`` field."""

    async def create_messages(self, request: Any, raw_request: Any = None) -> Any:
        """Serves a message; see :meth:`TracedHandler.serve`."""
        return await self.serve("create_messages", request, raw_request)

    async def record(self, request: Any, flashtrace: FlashTraceRequest) -> Recording:
        """A copy that notes the chat request that vLLM makes of the request."""
        refuse_citations(flashtrace, "/v1/messages", forms=True)
        handler = _RecordingMessages(
            self._stock, flashtrace, "/v1/messages", documents_of_request()
        )
        return Recording(handler, lambda: handler.session(self._service))

    async def attach(self, response: Any, session: TraceSession) -> MessageWithAttribution:
        """VLLM's model of a message drops unknown keys, so it becomes one that has ours."""
        [attribution] = await session.all_of([0])
        citations = await session.citations(0)
        if citations is not None:
            response.content = [
                cited
                for block in response.content
                for cited in (
                    cited_blocks(block.text or "", citations) if block.type == "text" else [block]
                )
            ]
        return MessageWithAttribution(**vars(response), flashtrace=attribution)

    def attach_to_stream(
        self, events: AsyncGenerator[Any, None], session: Callable[[], TraceSession]
    ) -> AsyncGenerator[Any, None]:
        """One more event before ``message_stop``."""
        return with_attribution_of_message(events, session())


class _RecordingMessages(RecordedChat, AnthropicServingMessages):
    """The stock handler for one traced request."""
