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

from vllm_flashtrace.adapter.engine_app import engine_workers, parse_engine_options
from vllm_flashtrace.serving.launcher import apply_cpu_defaults


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
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.entrypoints.launchers.app import build_app

    args = _parse(argv, neighbours)
    adjust(args)
    async with build_async_engine_client(args) as engine:
        tasks = await engine.get_supported_tasks()
        app = build_app(args, tasks, engine.model_config)
        await init_app_state(engine, app.state, args, tasks)
        model = (args.served_model_name or [args.model])[0]
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://in-process", timeout=None
        ) as client:
            try:
                yield InProcessServer(app, client, engine, model)
            finally:
                if (service := getattr(app.state, "flashtrace", None)) is not None:
                    await service.close()


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


def _parse(argv: Sequence[str], neighbours: int) -> Namespace:
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    try:
        args, parser = parse_engine_options(argv)
    except ValueError as error:
        raise ValueError(f"engine options: {error}") from None
    sized = args.kv_cache_memory_bytes is not None
    apply_cpu_defaults(args, parser)
    if not sized and args.kv_cache_memory_bytes is not None:
        args.kv_cache_memory_bytes //= neighbours + 1
    if engine_workers(args) > 1 and args.distributed_executor_backend is None:
        # Where vLLM finds itself in a Ray actor it would let Ray place the workers.
        args.distributed_executor_backend = "mp"
    if args.tool_parser_plugin:
        ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
    return args
