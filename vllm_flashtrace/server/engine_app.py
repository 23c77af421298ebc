"""vLLM's HTTP application with an engine of its own, and calls to it without a socket.

The application is the one that ``vllm-flashtrace serve`` with the same options listens with, so a
request is answered exactly as that server would answer it. Engine and application end together,
the application first.
"""

from __future__ import annotations

import contextlib
import io
import json
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from vllm_flashtrace.server.launcher import apply_cpu_defaults, refuse_bad_options
from vllm_flashtrace.server.sqlite_store import StoreMaker


@asynccontextmanager
async def engine_app(
    args: Namespace, store: StoreMaker | None = None
) -> AsyncIterator[tuple[Any, Any]]:
    """Starts an engine and the application on it, for as long as the block lasts.

    Args:
        args: From :func:`read_engine_options`.
        store: Makes the store of deferred attributions; None for one of this process's own.

    Yields:
        The application, whose lifespan has begun, and the engine's client.

    Raises:
        Exception: Whatever vLLM raises when an engine does not start.
    """
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.entrypoints.launchers.app import build_app
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    if args.tool_parser_plugin:
        ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
    async with build_async_engine_client(args) as engine:
        tasks = await engine.get_supported_tasks()
        app = build_app(args, tasks, engine.model_config)
        app.state.flashtrace_store = store
        await init_app_state(engine, app.state, args, tasks)
        async with app.router.lifespan_context(app):
            yield app, engine


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
        from vllm_flashtrace.server.session import service_of

        service = service_of(self._app.state)
        return "the FlashTrace plugin is off" if service is None else service.unsupported

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


def read_engine_options(argv: Sequence[str], neighbours: int) -> Namespace:
    """The options of an engine that is to start in this process.

    Args:
        argv: What comes after ``vllm serve``.
        neighbours: Other engines that share the machine's memory; matters where nobody sized the
            KV cache.

    Raises:
        ValueError: An option is bad; the message is one line.
    """
    args, parser = parse_engine_options(argv)
    sized = args.kv_cache_memory_bytes is not None
    apply_cpu_defaults(args, parser)
    if not sized and args.kv_cache_memory_bytes is not None:
        args.kv_cache_memory_bytes //= neighbours + 1
    if engine_workers(args) > 1 and args.distributed_executor_backend is None:
        # Where vLLM finds itself in a Ray actor it would let Ray place the workers.
        args.distributed_executor_backend = "mp"
    return args


def parse_engine_options(argv: Sequence[str]) -> tuple[Namespace, Any]:
    """Parses what comes after ``vllm serve``.

    Returns:
        The options and their parser.

    Raises:
        ValueError: An option is bad; the message is one line.
        SystemExit: For ``--help``.
    """
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm"))
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = parser.parse_args(list(argv))
            if getattr(args, "model_tag", None) is not None:
                args.model = args.model_tag
            validate_parsed_serve_args(args)
            refuse_bad_options(args)
    except SystemExit as stopped:
        if stopped.code == 0:
            raise
        lines = said.getvalue().strip().splitlines() or [str(stopped.code)]
        raise ValueError(lines[-1]) from None
    return args, parser


def engine_workers(args: Namespace) -> int:
    """Worker processes, and on a GPU machine devices, of one engine."""
    return int(args.tensor_parallel_size * args.pipeline_parallel_size)


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
