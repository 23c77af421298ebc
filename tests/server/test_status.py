"""``GET /v1/attributions/status``."""

from __future__ import annotations

import asyncio
import os
from importlib import metadata
from typing import Any

import pytest
import vllm

from tests.server.scripted_app import App, build
from vllm_flashtrace.server import status
from vllm_flashtrace.trace.config import FlashTraceConfig

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def report(app: App, code: int = 200) -> dict[str, Any]:
    response = await app.client.get("/v1/attributions/status")
    assert response.status_code == code, response.text
    return response.json()


async def test_a_server_that_can_attribute_is_ready(app):
    got = await report(app)
    assert got["object"] == "flashtrace.status"
    assert got["status"] == "ready"
    assert got["versions"]["vllm_flashtrace"] == metadata.version("vllm-flashtrace")
    assert got["versions"]["vllm"] == vllm.__version__
    assert got["model"]["name"] == "m"
    assert got["model"]["supported"] and got["model"]["reason"] is None
    assert got["model"]["architectures"] == ["LlamaForCausalLM"]
    assert got["engine"]["platform"] == "cpu"
    assert got["limits"]["max_hops"] == FlashTraceConfig().max_hops
    assert set(FlashTraceConfig.model_fields) <= got["limits"].keys()
    assert got["load"]["running"] == got["load"]["waiting"] == 0
    assert got["uptime_seconds"] > 0


async def test_the_patches_of_this_process_are_named(app):
    own = [e for e in (await report(app))["processes"] if e["pid"] == os.getpid()]
    assert {"attention_backends", "worker_rpc", "prefix_cache"} <= set(own[0]["patches"])


async def test_what_workers_say_and_the_options_in_force_are_passed_on(plugins, model_path):
    option = '{"flashtrace": {"max_hops": 3}}'
    worker = {"recording": 2, "worker": {"rank": 0, "runner": "V1"}}
    app = await build(model_path, "--additional-config", option, status=worker)
    got = await report(app)
    await app.client.aclose()
    assert got["engine"]["workers"] == [
        {"rank": 0, "runner": "V1", "refusal": None, "recording": 2}
    ]
    assert got["limits"]["max_hops"] == 3


async def test_load_is_that_of_now(app):
    app.engine.trace_gate.clear()
    task = asyncio.create_task(app.post("/v1/attributions", prompt="Hi", completion="there"))
    async with asyncio.timeout(20):
        while not app.engine.traces:
            await asyncio.sleep(0.005)
    assert (await report(app))["load"]["running"] == 1
    app.engine.trace_gate.set()
    await task
    assert (await report(app))["load"]["running"] == 0


async def test_an_engine_that_does_not_answer_is_unavailable(app, monkeypatch):
    async def silent(*args: Any, **kwargs: Any) -> list[bytes]:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(status, "ENGINE_SECONDS", 0.05)
    monkeypatch.setattr(app.engine, "collective_rpc", silent)
    got = await report(app, 503)
    assert got["status"] == "engine_unavailable"
    assert got["engine"]["error"] == "no answer within 0.05 s"
    monkeypatch.setattr(status, "ENGINE_SECONDS", 60)
    monkeypatch.setattr(app.engine, "errored", True)
    got = await report(app, 503)
    assert got["engine"]["error"] == "the engine has stopped"
