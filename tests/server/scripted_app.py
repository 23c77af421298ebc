"""vLLM's own HTTP application, built by vLLM's own code, on a scripted engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.server.fake_engine import FakeEngine


@dataclass
class App:
    """vLLM's own application on a scripted engine."""

    app: Any
    engine: Any
    client: httpx.AsyncClient

    async def post(self, path: str, **body: Any) -> httpx.Response:
        return await self.client.post(path, json={"model": "m", **body})

    async def chat(self, **body: Any) -> httpx.Response:
        body.setdefault("messages", [{"role": "user", "content": "What is the code?"}])
        return await self.post("/v1/chat/completions", **body)

    async def complete(self, **body: Any) -> httpx.Response:
        body.setdefault("prompt", "The code is 4821. Repeat:")
        return await self.post("/v1/completions", **body)


async def build(model_path: str, *options: str, **worker: Any) -> App:
    """The server's own options; ``worker`` is what :class:`FakeEngine` says of its workers."""
    arguments = ["--model", model_path, "--served-model-name", "m", "--max-model-len", "2048"]
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([*arguments, *options])
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    engine = FakeEngine(config, **worker)
    app = build_app(args, ("generate",), config.model_config)
    await init_app_state(engine, app.state, args, ("generate",))
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return App(app, engine, httpx.AsyncClient(transport=transport, base_url="http://test"))
