"""The ``vllm.endpoint_plugins`` entry point: puts attribution into vLLM's API server.

The end of an API server process, for what outlives its requests.

Invariant: deferred attributions are stopped after the last request and before the engine.

Which of vLLM's handlers take the ``flashtrace`` field, and which refuse it.

Invariant: every route that generates text either serves the field or refuses it with HTTP 400.

Invariant: after ``init_state`` a request without the ``flashtrace`` field is still served by the
handler object that vLLM made, and a model that cannot be traced costs the server nothing but a
400 for requests that ask for a trace.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from vllm_flashtrace.base.process import enabled
from vllm_flashtrace.server.attributions import router
from vllm_flashtrace.server.deferred import DeferredAttributions
from vllm_flashtrace.server.messages import TracedMessages, refusing
from vllm_flashtrace.server.openai import TracedChat, TracedCompletion
from vllm_flashtrace.server.openapi import describe_field
from vllm_flashtrace.server.page import page_router
from vllm_flashtrace.server.responses import TracedResponses
from vllm_flashtrace.server.session import TraceService
from vllm_flashtrace.server.sqlite_store import make_store
from vllm_flashtrace.server.status import StatusReport
from vllm_flashtrace.server.status import router as status_router
from vllm_flashtrace.trace.config import FlashTraceConfig
from vllm_flashtrace.trace.tracer import AsyncTracer


def close_service_with(app: FastAPI) -> None:
    """Closes the attribution service when ``app`` shuts down."""
    stock = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[Any]:
        async with stock(app) as state:
            try:
                yield state
            finally:
                service = getattr(app.state, "flashtrace", None)
                if service is not None:
                    await service.close()

    app.router.lifespan_context = lifespan


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


logger = logging.getLogger("vllm.flashtrace")


class FlashTraceEndpoint:
    """vLLM's ``EndpointPlugin`` protocol."""

    name = "flashtrace"
    required_tasks: tuple[str, ...] | None = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Adds our routes and their schema; ``--api-key`` guards everything under ``/v1``."""
        if enabled():
            app.include_router(status_router)  # Before /v1/attributions/{id}.
            app.include_router(router)
            describe_field(app)
            close_service_with(app)
            self._app = app

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Replaces vLLM's handlers; called after all of them exist.

        Args:
            engine_client: vLLM's ``EngineClient``.
            state: ``app.state``; its ``flashtrace_store``, if set, makes the store of deferred
                attributions.
            args: Server arguments, unused.

        Raises:
            ValueError: Our section of ``--additional-config`` is bad; the server does not start.
        """
        if not enabled():
            return
        config = FlashTraceConfig.from_additional_config(
            engine_client.vllm_config.additional_config
        )
        if config.page:
            self._app.include_router(page_router())
        tracer = AsyncTracer(engine_client, config)
        unsupported = await tracer.support()
        if unsupported is not None:
            logger.warning("FlashTrace is off: this model cannot be traced: %s", unsupported)
        deferred = DeferredAttributions(
            make_store(config, getattr(state, "flashtrace_store", None)),
            places=config.max_concurrent_traces,
            on_change=tracer.observer.metrics.store_entries,
        )
        service = TraceService(tracer, config.limits, deferred, unsupported)
        state.flashtrace = service
        state.flashtrace_status = StatusReport(tracer, unsupported, engine_client.model_config)
        replace_handlers(state, service)
