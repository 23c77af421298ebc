"""Operations on a live server: status, sleep, cache resets, and the kill switch."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.server.live_server import (
    OURS,
    PLAIN_REQUESTS,
    Server,
    ask,
    assert_same,
    metric_names,
    openapi,
    serve,
)

pytestmark = pytest.mark.timeout(1200)

PROMPT = "The capital of France is Paris. The capital of Italy is Rome. " * 12
FIELD = {"hops": 1, "target": "generated", "top_k": None}


def complete(server: Server, prompt: str = PROMPT) -> dict[str, Any]:
    body = {"model": "m", "prompt": prompt, "max_tokens": 8, "temperature": 0, "flashtrace": FIELD}
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def post(server: Server, path: str) -> Any:
    response = httpx.post(f"{server.url}{path}", timeout=300)
    response.raise_for_status()
    return response


def scores(choice: dict[str, Any]) -> list[float]:
    trace = choice["flashtrace"]
    assert trace["status"] == "completed", trace
    return [score["score"] for score in sorted(trace["scores"], key=lambda s: s["index"])]


def test_status_names_patches_in_every_process(server):
    report = httpx.get(f"{server.url}/v1/attributions/status", timeout=300).json()
    assert report["status"] == "ready"
    [worker] = report["engine"]["workers"]
    assert worker["runner"] == "V1"
    assert worker["attention_backends"] == ["CPU_ATTN"]
    assert worker["rank"] == 0 and worker["tensor_parallel_size"] == 1
    assert worker["accumulator_bytes"] == worker["recording"] == 0
    patches = [set(process["patches"]) for process in worker["processes"]]
    assert len(patches) >= 2
    assert all(names == patches[0] and "scheduler_share" in names for names in patches)
    assert {process["pid"] for process in report["processes"]} == {server.pid}


def test_a_trace_asked_for_while_the_engine_sleeps_is_made_when_it_wakes(server):
    awake = complete(server)
    post(server, "/sleep?level=1")
    try:
        assert httpx.get(f"{server.url}/is_sleeping").json() == {"is_sleeping": True}
        with ThreadPoolExecutor() as pool:
            later = [pool.submit(complete, server) for _ in range(2)]
            report = httpx.get(f"{server.url}/v1/attributions/status", timeout=300).json()
            assert report["status"] == "ready"
            assert not any(future.done() for future in later)
            post(server, "/wake_up")
            answers = [future.result(timeout=120) for future in later]
    finally:
        post(server, "/wake_up")
    for answer in answers:
        assert answer["text"] == awake["text"]
        assert scores(answer) == pytest.approx(scores(awake), rel=1e-3, abs=1e-6)


def test_resets_of_the_prefix_cache_while_traces_run(server):
    prompts = [f"Note {i}. {PROMPT}" for i in range(3)]
    calm = [complete(server, prompt) for prompt in prompts]
    resets, stop = 0, threading.Event()

    def disturb() -> None:
        nonlocal resets
        while not stop.is_set():
            post(server, "/reset_prefix_cache?reset_running_requests=true")
            resets += 1
            time.sleep(0.2)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        with ThreadPoolExecutor() as pool:
            disturbed = list(pool.map(lambda prompt: complete(server, prompt), prompts))
    finally:
        stop.set()
        thread.join()
    assert resets > 1
    for before, after in zip(calm, disturbed, strict=True):
        assert after["text"] == before["text"]
        assert scores(after) == pytest.approx(scores(before), rel=1e-3, abs=1e-6)


@pytest.fixture(scope="module")
def switched_off(
    stock_surface: dict[str, Any], model_path: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("off") / "server.log"
    with serve(OURS, model_path, log, VLLM_FLASHTRACE_DISABLE="1") as running:
        yield running


def test_switched_off_the_server_is_stock_vllm(switched_off, stock_surface):
    for (path, body), stock in zip(PLAIN_REQUESTS, stock_surface["answers"], strict=True):
        assert_same(ask(switched_off, path, body), stock)
    assert metric_names(switched_off) == stock_surface["metrics"]
    assert openapi(switched_off) == stock_surface["openapi"]
    assert httpx.get(f"{switched_off.url}/v1/attributions/status").status_code == 404
    assert "Unknown vLLM environment" not in switched_off.log.read_text(errors="replace")
