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

from vllm_flashtrace.plugin import enabled
from vllm_flashtrace.server.attributions import router
from vllm_flashtrace.server.choose_store import make_store
from vllm_flashtrace.server.deferred import DeferredAttributions
from vllm_flashtrace.server.handlers import replace_handlers
from vllm_flashtrace.server.lifespan import close_service_with
from vllm_flashtrace.server.openapi import describe_field
from vllm_flashtrace.server.page import page_router
from vllm_flashtrace.server.service import TraceService
from vllm_flashtrace.server.status import StatusReport
from vllm_flashtrace.server.status import router as status_router
from vllm_flashtrace.trace.config import FlashTraceConfig
from vllm_flashtrace.trace.tracer import AsyncTracer

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
