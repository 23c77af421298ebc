"""The ``vllm.endpoint_plugins`` entry point: puts attribution into vLLM's API server.

Invariant: after ``init_state`` a request without the ``flashtrace`` field is still served by the
handler object that vLLM made, and a model that cannot be traced costs the server nothing but a
400 for requests that ask for a trace.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from typing import Any

from fastapi import FastAPI

from vllm_flashtrace.adapter.serving import TracedChat, TracedCompletion, refusing
from vllm_flashtrace.config import FlashTraceConfig
from vllm_flashtrace.plugin import enabled
from vllm_flashtrace.serving.attributions import router
from vllm_flashtrace.serving.service import TraceService
from vllm_flashtrace.tracer import AsyncTracer

logger = logging.getLogger("vllm.flashtrace")


class FlashTraceEndpoint:
    """vLLM's ``EndpointPlugin`` protocol."""

    name = "flashtrace"
    required_tasks: tuple[str, ...] | None = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Adds ``POST /v1/attributions``; ``--api-key`` guards everything under ``/v1``."""
        if enabled():
            app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Replaces vLLM's handlers; called after all of them exist.

        Args:
            engine_client: vLLM's ``EngineClient``.
            state: ``app.state``.
            args: Server arguments, unused.

        Raises:
            ValueError: Our section of ``--additional-config`` is bad; the server does not start.
        """
        if not enabled():
            return
        config = FlashTraceConfig.from_additional_config(
            engine_client.vllm_config.additional_config
        )
        tracer = AsyncTracer(engine_client, config)
        unsupported = await tracer.support()
        if unsupported is not None:
            logger.warning("FlashTrace is off: this model cannot be traced: %s", unsupported)
        service = TraceService(tracer, config.limits, unsupported)
        state.flashtrace = service
        if state.openai_serving_chat is not None:
            state.openai_serving_chat = TracedChat(state.openai_serving_chat, service)
        if state.openai_serving_completion is not None:
            state.openai_serving_completion = TracedCompletion(
                state.openai_serving_completion, service
            )
        for attribute, method, route in (
            ("openai_serving_responses", "create_responses", "/v1/responses"),
            (
                "openai_serving_chat_batch",
                "create_batch_chat_completion",
                "/v1/chat/completions/batch",
            ),
        ):
            handler = getattr(state, attribute, None)
            if handler is not None:
                setattr(state, attribute, refusing(handler, method, route, service))
