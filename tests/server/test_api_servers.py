"""Deferred attributions on a live server with two API server processes behind one port."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.server.live_server import OURS, Server, serve

pytestmark = pytest.mark.timeout(900)

DEFERRED = {"mode": "deferred", "hops": 0}
SHORT = {"model": "m", "prompt": "The code is 4821.", "completion": " It is 4821."}
LONG = {**SHORT, "prompt": [500 + i % 3000 for i in range(1900)]}


@pytest.fixture(scope="module")
def two(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("two") / "server.log"
    # An empty value is an unset one: the server chooses its own folder.
    with serve(OURS, model_path, log, "--api-server-count=2", FLASHTRACE_STORE="") as running:
        yield running


def wait(condition: Callable[[], Any], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


def submit(server: Server, body: dict[str, Any]) -> str:
    """One connection per request, so that both processes get some."""
    response = httpx.post(f"{server.url}/v1/attributions", json=body, timeout=60)
    assert response.json()["status"] == "queued", response.text
    return str(response.json()["id"])


def fetch(server: Server, attribution_id: str) -> dict[str, Any]:
    response = httpx.get(f"{server.url}/v1/attributions/{attribution_id}", timeout=60)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def folder(server: Server) -> Path:
    children = psutil.Process(server.pid).children(recursive=True)
    [path] = {child.environ().get("FLASHTRACE_STORE") for child in children} - {None, ""}
    return Path(str(path))


def owners(server: Server) -> int:
    with sqlite3.connect(folder(server) / "attributions.sqlite3") as db:
        (count,) = db.execute("SELECT COUNT(DISTINCT owner) FROM attributions").fetchone()
    return int(count)


def test_every_process_finds_what_the_other_one_stored(two):
    body = {**SHORT, "flashtrace": DEFERRED}
    ids = [submit(two, body) for _ in range(8)]
    wait(lambda: all(fetch(two, one)["status"] == "completed" for one in ids))
    while owners(two) < 2:
        ids.append(submit(two, body))
        assert len(ids) < 200
    for one in ids[:8]:
        assert [fetch(two, one) for _ in range(4)] == [fetch(two, one)] * 4


def test_a_completion_answers_before_its_attribution(two):
    body = {"model": "m", "prompt": "One, two,", "max_tokens": 4, "flashtrace": DEFERRED}
    choice = httpx.post(f"{two.url}/v1/completions", json=body, timeout=60).json()["choices"][0]
    assert choice["flashtrace"]["status"] == "queued"
    wait(lambda: fetch(two, choice["flashtrace"]["id"])["status"] == "completed")


def test_deleting_through_any_process_stops_the_trace(two):
    for _ in range(4):
        one = submit(two, {**LONG, "flashtrace": {**DEFERRED, "target": "generated"}})
        url = f"{two.url}/v1/attributions/{one}"
        assert httpx.delete(url, timeout=60).status_code == 200
        for _ in range(4):
            assert httpx.get(url, timeout=60).status_code == 404
    running = "vllm:num_requests_running"
    wait(lambda: _sum(two, running) == 0)


def _sum(server: Server, metric: str) -> float:
    lines = httpx.get(f"{server.url}/metrics", timeout=60).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(metric))


def test_the_store_is_private(two):
    path = folder(two)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert str(path) not in two.log.read_text(errors="replace")


def test_shutdown_with_attributions_in_flight_leaves_nothing(two):
    path = folder(two)
    children = psutil.Process(two.pid).children(recursive=True)
    for _ in range(6):
        submit(two, {**LONG, "flashtrace": {**DEFERRED, "hops": 3}})
    os.kill(two.pid, signal.SIGTERM)
    psutil.wait_procs(children, timeout=60)
    wait(lambda: not path.exists(), 60)
    assert not [child for child in children if child.is_running()]
    # vLLM itself may log one when it kills an engine that its API servers still listen to.
    assert not re.search(r'File "[^"]*/vllm_flashtrace/', two.log.read_text(errors="replace"))
