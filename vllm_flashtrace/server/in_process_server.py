"""vLLM's API server without a socket: its routes, ours among them, called in this process.

Invariant: a request is answered exactly as ``vllm-flashtrace serve`` with the same options would
answer it; the engine belongs to this object and ends with it.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from vllm_flashtrace.server.engine_app import engine_app, read_engine_options


class InProcessServer:
    """A started server; see :func:`in_process_server`."""

    def __init__(self, app: Any, client: Any, engine: Any, model: str) -> None:
        """Wraps what :func:`in_process_server` started."""
        self._app = app
        self._client = client
        self._engine = engine
        self.model = model

    @property
    def refusal(self) -> str | None:
        """Why the model cannot be traced; None if it can."""
        service = getattr(self._app.state, "flashtrace", None)
        if service is None:
            return "the FlashTrace plugin is off"
        unsupported: str | None = service.unsupported
        return unsupported

    @property
    def is_dead(self) -> bool:
        """Whether the engine has failed and answers nothing any more."""
        return bool(self._engine.errored)

    async def post(self, route: str, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        """Sends one request.

        Args:
            route: E.g. ``/v1/completions``.
            body: Of the request, as JSON.

        Returns:
            HTTP status and decoded body of the answer.
        """
        response = await self._client.post(
            route,
            content=json.dumps(body).encode(),
            headers={"content-type": "application/json"},
        )
        return response.status_code, response.json()


@asynccontextmanager
async def in_process_server(
    argv: Sequence[str], adjust: Callable[[Namespace], None], *, neighbours: int = 0
) -> AsyncIterator[InProcessServer]:
    """Starts an engine with vLLM's routes around it, for as long as the block lasts.

    Args:
        argv: Options of ``vllm serve``.
        adjust: Changes the parsed options in place before anything starts.
        neighbours: Other engines that share the machine's memory; matters where nobody sized the
            KV cache.

    Raises:
        ValueError: An option is bad; the message is one line.
        Exception: Whatever vLLM raises when an engine does not start.
    """
    import httpx

    try:
        args = read_engine_options(argv, neighbours)
    except ValueError as error:
        raise ValueError(f"engine options: {error}") from None
    adjust(args)
    async with engine_app(args) as (app, engine):
        model = (args.served_model_name or [args.model])[0]
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://in-process", timeout=None
        ) as client:
            yield InProcessServer(app, client, engine, model)


def known_fields(route: str) -> frozenset[str] | None:
    """Fields that vLLM knows in a body for ``route``, which ignores others; None if it does not."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    models = {
        "/v1/chat/completions": ChatCompletionRequest,
        "/v1/completions": CompletionRequest,
    }
    model = models.get(route)
    return None if model is None else frozenset(model.model_fields)
