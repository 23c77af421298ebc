"""Which of vLLM's handlers take the ``flashtrace`` field, and which refuse it.

Invariant: every route that generates text either serves the field or refuses it with HTTP 400.
"""

from __future__ import annotations

from typing import Any

from vllm_flashtrace.server.messages import TracedMessages
from vllm_flashtrace.server.openai import TracedChat, TracedCompletion
from vllm_flashtrace.server.raw_body import refusing
from vllm_flashtrace.server.responses import TracedResponses
from vllm_flashtrace.server.service import TraceService

# Attribute of ``app.state`` that holds the handler.
_TRACED: dict[str, type[Any]] = {
    "openai_serving_chat": TracedChat,
    "openai_serving_completion": TracedCompletion,
    "openai_serving_responses": TracedResponses,
    "anthropic_serving_messages": TracedMessages,
}
# The same, with the method that the route calls and the route.
_REFUSING = (
    (
        "openai_serving_chat_batch",
        "create_batch_chat_completion",
        "/v1/chat/completions/batch",
    ),
    ("cohere_serving_chat_v2", "create_chat_v2", "/cohere/v2/chat"),
    ("serving_tokens", "serve_tokens", "/inference/v1/generate"),
    ("serving_generative_scoring", "create_generative_scoring", "/generative_scoring"),
    ("serving_structured_decisions", "create_decision", "/v1/systemone"),
)


def replace_handlers(state: Any, service: TraceService) -> None:
    """Puts our handlers before vLLM's.

    Args:
        state: ``app.state``, with all of vLLM's handlers in place.
        service: Attribution service of this process.
    """
    for attribute, traced in _TRACED.items():
        stock = getattr(state, attribute, None)
        if stock is not None:
            setattr(state, attribute, traced(stock, service))
    for attribute, method, route in _REFUSING:
        stock = getattr(state, attribute, None)
        if stock is not None:
            setattr(state, attribute, refusing(stock, method, route))
