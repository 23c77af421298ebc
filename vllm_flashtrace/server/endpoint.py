"""The ``vllm.endpoint_plugins`` entry point: puts attribution into vLLM's API server.

Every route that generates text either serves the ``flashtrace`` field or refuses it with HTTP 400.
A model that cannot be traced costs the server nothing but a 400 for requests that ask for a trace.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from vllm_flashtrace.api.request import FIELD, FlashTraceRequest
from vllm_flashtrace.base.logs import logger
from vllm_flashtrace.base.process import enabled
from vllm_flashtrace.server.anthropic_documents import AnthropicDocuments
from vllm_flashtrace.server.attributions import router
from vllm_flashtrace.server.deferred import DeferredAttributions
from vllm_flashtrace.server.http_errors import log_client_mistakes_as_info
from vllm_flashtrace.server.large_objects import LargeObjects
from vllm_flashtrace.server.messages import TracedMessages
from vllm_flashtrace.server.openai import TracedChat, TracedCompletion
from vllm_flashtrace.server.page import page_router
from vllm_flashtrace.server.responses import TracedResponses
from vllm_flashtrace.server.session import TraceService, service_of
from vllm_flashtrace.server.sqlite_store import make_store
from vllm_flashtrace.server.status import StatusReport
from vllm_flashtrace.server.status import router as status_router
from vllm_flashtrace.server.traced_handler import TracedHandler, refusing
from vllm_flashtrace.trace.config import FlashTraceConfig
from vllm_flashtrace.trace.tracer import AsyncTracer


class FlashTraceEndpoint:
    """vLLM's ``EndpointPlugin`` protocol."""

    name = "flashtrace"
    required_tasks: tuple[str, ...] | None = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Adds our routes and their schema; ``--api-key`` guards everything under ``/v1``."""
        if enabled():
            app.include_router(status_router)  # Before /v1/attributions/{id}.
            app.include_router(router)
            app.add_middleware(LargeObjects)
            app.add_middleware(AnthropicDocuments)
            describe_field(app)
            close_service_with(app)
            log_client_mistakes_as_info()
            self._app = app

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Replaces vLLM's handlers; called after all of them exist.

        Args:
            engine_client: vLLM's ``EngineClient``.
            state: ``app.state``; its ``flashtrace_store``, if set, makes the store of deferred
                attributions.
            args: Server arguments.

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
        tracer = AsyncTracer(
            engine_client,
            config,
            cache_details=bool(getattr(args, "enable_prompt_tokens_details", False)),
        )
        unsupported = await tracer.support()
        if unsupported is not None:
            logger.warning("FlashTrace is off: this model cannot be traced: %s", unsupported)
        deferred = DeferredAttributions(
            make_store(config, getattr(state, "flashtrace_store", None)),
            places=config.concurrent_traces(engine_client.vllm_config),
            on_change=tracer.observer.metrics.store_entries,
        )
        service = TraceService(tracer, config.limits, deferred, unsupported)
        state.flashtrace = service
        state.flashtrace_status = StatusReport(tracer, unsupported, engine_client.model_config)
        replace_handlers(state, service)


# Attribute of ``app.state`` that holds the handler.
_TRACED: dict[str, type[TracedHandler]] = {
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
    traced_handlers = dict(_TRACED)
    if getattr(state, "cohere_serving_chat_v2", None) is not None:
        from vllm_flashtrace.server.cohere_chat import TracedCohereChat  # Needs Cohere's package.

        traced_handlers["cohere_serving_chat_v2"] = TracedCohereChat
    for attribute, traced in traced_handlers.items():
        stock = getattr(state, attribute, None)
        if stock is not None:
            setattr(state, attribute, traced(stock, service))
    for attribute, method, route in _REFUSING:
        stock = getattr(state, attribute, None)
        if stock is not None:
            setattr(state, attribute, refusing(stock, method, route))


def close_service_with(app: FastAPI) -> None:
    """Ends deferred attributions when ``app`` shuts down, after its last request."""
    stock = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[Any]:
        async with stock(app) as state:
            try:
                yield state
            finally:
                service = service_of(app.state)
                if service is not None:
                    await service.close()

    app.router.lifespan_context = lifespan


_REF = "#/components/schemas/"
_COMPONENT = FlashTraceRequest.__name__
_FIELD_SCHEMA: dict[str, Any] = {
    "anyOf": [{"$ref": _REF + _COMPONENT}, {"type": "boolean"}, {"type": "null"}],
    "title": "FlashTrace",
    "description": "Asks which prompt tokens the completion came from; true means all defaults.",
}
_DESCRIBED_ROUTES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/cohere/v2/chat",
    "/v1/attributions",
)


def describe_field(app: FastAPI) -> None:
    """Adds the field to the schema that ``app`` generates for ``/openapi.json``.

    Only the description changes: the models that validate bodies stay as they are.
    """
    stock = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = stock()
            field = FlashTraceRequest.model_json_schema(ref_template=_REF + "{model}")
            schemas = schema.setdefault("components", {}).setdefault("schemas", {})
            schemas.update({**field.pop("$defs", {}), _COMPONENT: field})
            for model in _body_models(schema):
                properties = schemas[model]["properties"]
                properties[FIELD] = {**properties.get(FIELD, {}), **_FIELD_SCHEMA}
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _body_models(schema: dict[str, Any]) -> Iterator[str]:
    """Component names of the request bodies of the routes that take the field."""
    for route in _DESCRIBED_ROUTES:
        content = schema["paths"].get(route, {}).get("post", {}).get("requestBody", {})
        body = content.get("content", {}).get("application/json", {}).get("schema", {})
        if "$ref" in body:
            yield body["$ref"].removeprefix(_REF)
