"""A live server with far too few KV blocks, under everything at once, with clients who leave."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import httpx
import pytest

from benchmarks.load import DEV_MODE, plugin_server
from benchmarks.mixed_load import fetch_deferred, make_request, rest, send_all
from tests.tiny_models import make_tiny_model

FEW_BLOCKS = [
    "--enforce-eager",
    "--max-model-len=1024",
    "--max-num-seqs=48",
    "--num-gpu-blocks-override=12",
    "--no-enable-prefix-caching",
]
REQUESTS, CONCURRENCY = 80, 16
# Together they need more blocks than there are: one of them, or of the rest, is preempted.
GROWING = [
    {"model": "m", "prompt": f"Count from {i}:", "max_tokens": 700, "ignore_eos": True}
    for i in range(3)
]


@pytest.mark.long
@pytest.mark.timeout(900)
async def test_preemptions_and_leaving_clients(tmp_path: Path) -> None:
    # What is tested is the scheduling, so a tiny model will do.
    model = make_tiny_model("qwen3", tmp_path / "qwen3")
    requests = [make_request(index, seed=1) for index in range(REQUESTS)]
    # Longer than the API server of a busy machine takes to ask for a result.
    # Nor is a trace of theirs overtaken by its time in the queue.
    config = {"result_ttl_seconds": 15.0, "max_waiting_seconds": 300.0}
    with plugin_server(model, tmp_path / "server.log", FEW_BLOCKS, config, **DEV_MODE) as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=600) as client:
            growing = [client.post("/v1/completions", json=body) for body in GROWING]
            *answers, _ = await asyncio.gather(
                *growing, send_all(client, requests, CONCURRENCY, lambda: None)
            )
            await fetch_deferred(client, requests)
            left = await rest(client, server)
            metrics = (await client.get("/metrics")).text
    assert not [f"{request.kind}: {request.fault}" for request in requests if request.fault]
    assert {answer.status_code for answer in answers} == {200}
    assert not any(left.values()), left
    preemptions = re.findall(r"^vllm:num_preemptions_total{[^}]*} (\S+)$", metrics, re.MULTILINE)
    assert sum(map(float, preemptions)) > 0
    assert sum(request.status is None for request in requests) > 0
    finished = [found for request in requests for found in request.found.values()]
    assert len(finished) > REQUESTS // 2
    # A random model says nothing now and then.
    codes = {(found.get("error") or {}).get("code") for found in finished}
    assert codes <= {None, "empty_target"}
    completed = [found for found in finished if found["status"] == "completed"]
    assert len(completed) > REQUESTS // 2
