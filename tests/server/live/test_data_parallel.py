"""A live server with two engines and two API server processes behind one port.

Every trace runs on the engine that served its completion, and every process answers for every
deferred attribution.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sqlite3
import stat
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

from tests.engine.harness import relative_l1
from tests.oracle import oracle_scores
from tests.server.live_server import OURS, Server, serve
from tests.tiny_models import VOCABULARY, make_tiny_model

pytestmark = pytest.mark.timeout(600)

LIMIT = 5e-4
BLOCK = 32
COMPLETIONS, CONCURRENCY, NEW_TOKENS = 12, 6, 16
# Two hops: over the end of the answer, then over what led to it.
FIELD = {
    "preset": "paper",
    "target": {"tokens": [[NEW_TOKENS - 8, NEW_TOKENS]]},
    "top_k": None,
}
DEFERRED = {"mode": "deferred", "hops": 0}
SHORT = {"model": "m", "prompt": "The code is 4821.", "completion": " It is 4821."}
LONG = {**SHORT, "prompt": [5 + i % 480 for i in range(1900)]}
SHARED = [5 + i % 200 for i in range(3 * BLOCK)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("qwen3", tmp_path_factory.mktemp("dp") / "qwen3")


@pytest.fixture(scope="module")
def two(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two engines, and as many API servers as vLLM then starts by default, which is two."""
    log = tmp_path_factory.mktemp("dp") / "server.log"
    options = [
        "--data-parallel-size=2",
        f"--block-size={BLOCK}",
        "--kv-cache-memory-bytes=128M",
        "--enable-prompt-tokens-details",
    ]
    # An empty store is an unset one: the server chooses its own folder.
    env = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "FLASHTRACE_STORE": ""}
    with serve(OURS, str(folder), log, *options, **env) as running:
        yield running


def prompt(seed: int) -> list[int]:
    """Random tokens; every third prompt begins like the others of its kind."""
    generator = random.Random(seed)
    own = [generator.randrange(5, VOCABULARY - 5) for _ in range(generator.randrange(150, 400))]
    return SHARED + own if seed % 3 == 0 else own


def complete(server: Server, seed: int) -> list[dict[str, Any]]:
    """The attributions of one completion request's choices; some have two, some are streamed."""
    body = {
        "model": "m",
        "prompt": prompt(seed),
        "max_tokens": NEW_TOKENS,
        "min_tokens": NEW_TOKENS,
        "ignore_eos": True,
        "n": 2 if seed % 4 == 0 else 1,
        "temperature": 1.0,
        "seed": seed,
        "stream": seed % 5 == 0,
        "flashtrace": FIELD,
    }
    # One connection per request, so that every API server gets some.
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=300)
    assert response.status_code == 200, response.text
    if not body["stream"]:
        return [choice["flashtrace"] for choice in response.json()["choices"]]
    lines = (line.removeprefix("data: ") for line in response.text.splitlines() if line)
    chunks = [json.loads(line) for line in lines if line != "[DONE]"]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return [choice["flashtrace"] for choice in choices if choice.get("flashtrace")]


def attribute(
    server: Server, tokens: list[int], completion: list[int], rank: int | None = None, hops: int = 1
) -> dict[str, Any]:
    body = {
        "model": "m",
        "prompt": tokens,
        "completion": completion,
        "flashtrace": {**FIELD, "hops": hops},
    }
    headers = {} if rank is None else {"X-data-parallel-rank": str(rank)}
    response = httpx.post(f"{server.url}/v1/attributions", json=body, headers=headers, timeout=300)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    assert found["status"] == "completed", found
    return found


def metrics(server: Server) -> dict[str, float]:
    """Samples by name and labels, over all API servers."""
    found = {}
    for line in httpx.get(f"{server.url}/metrics", timeout=300).text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[name] = float(value)
    return found


def total(samples: dict[str, float], name: str, label: str = "") -> float:
    return sum(v for key, v in samples.items() if key.startswith(f"{name}{{") and label in key)


def test_the_report_names_every_engine(two):
    for _ in range(4):
        status = httpx.get(f"{two.url}/v1/attributions/status", timeout=300).json()
        assert status["status"] == "ready"
        workers = status["engine"]["workers"]
        assert [worker["data_parallel_rank"] for worker in workers] == [0, 1]
        assert len({worker["pid"] for worker in workers}) == 2


def test_every_trace_hits_the_cache_of_its_own_engine(two):
    before = metrics(two)
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        answers = list(pool.map(lambda seed: complete(two, seed), range(COMPLETIONS)))
    for seed, attributions in enumerate(answers):
        assert len(attributions) == (2 if seed % 4 == 0 else 1)
        assert [each["status"] for each in attributions] == ["completed"] * len(attributions)
    after = metrics(two)

    def grown(name: str, label: str = "") -> float:
        return total(after, name, label) - total(before, name, label)

    traces = sum(len(attributions) for attributions in answers)
    queries, hits = (grown(f"flashtrace_prefix_cache_{name}_total") for name in ("queries", "hits"))
    misses = grown("flashtrace_prefix_cache_misses_total")
    per_engine = [grown("vllm:request_success_total", f'engine="{rank}"') for rank in range(2)]
    print(
        f"{traces} traces of {COMPLETIONS} completions at concurrency {CONCURRENCY}: "
        f"{hits:g} of {queries:g} tokens hit, {misses:g} misses; requests per engine {per_engine}",
        file=sys.stderr,
    )
    assert grown("flashtrace_requests_total", 'status="completed"') == traces
    assert misses == 0
    # Of each of a trace's two hops less than a block is computed again.
    assert queries - 2 * traces * BLOCK < hits <= queries
    assert queries > 2 * traces * 150
    assert min(per_engine) > 0.2 * sum(per_engine), "one engine did nearly everything"


def test_existing_texts_stay_on_one_engine(two):
    """Nothing of their first hop is in a cache; the second one finds what the first has left."""
    before = metrics(two)

    def one(seed: int) -> float:
        tokens = prompt(3 * seed + 1001)
        usage = attribute(two, tokens, tokens[:NEW_TOKENS])["usage"]
        assert usage["cached_tokens"] >= len(tokens) - BLOCK
        return float(usage["cached_tokens"])

    with ThreadPoolExecutor(CONCURRENCY) as pool:
        cached = sum(pool.map(one, range(8)))
    after = metrics(two)
    for name, expected in (("hits", cached), ("misses", 0)):
        name = f"flashtrace_prefix_cache_{name}_total"
        assert total(after, name) - total(before, name) == expected


def test_both_engines_give_what_the_formulas_give(two, folder: Path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    for seed in (2003, 2005):
        tokens, completion = prompt(seed), prompt(seed + 1)[:NEW_TOKENS]
        positions = torch.arange(len(tokens) + NEW_TOKENS - 8, len(tokens) + NEW_TOKENS)
        expected = oracle_scores(model, [*tokens, *completion], positions, torch.ones(8))
        for rank in (0, 1, None):
            found = attribute(two, tokens, completion, rank, hops=0)["scores"]
            assert [score["index"] for score in found] == list(range(len(tokens)))
            ours = torch.tensor([score["score"] for score in found])
            error = relative_l1(ours, expected[: len(tokens)])
            print(f"engine {rank} against the oracle: relative L1 {error:.1e}")
            assert error <= LIMIT


def wait(condition: Callable[[], Any], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


def submit(server: Server, body: dict[str, Any]) -> str:
    """One connection per request, so that both processes get some."""
    response = httpx.post(f"{server.url}/v1/attributions", json=body, timeout=300)
    assert response.json()["status"] == "queued", response.text
    return str(response.json()["id"])


def fetch(server: Server, attribution_id: str) -> dict[str, Any]:
    response = httpx.get(f"{server.url}/v1/attributions/{attribution_id}", timeout=300)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


STORE = "attributions.sqlite3"


def store_folder(server: Server) -> Path:
    """Where all processes that have a store open have the same one."""
    processes = psutil.Process(server.pid).children(recursive=True)
    files = {Path(file.path) for each in processes for file in each.open_files()}
    [path] = [file for file in files if file.name == STORE]
    return path.parent


def owners(server: Server) -> int:
    with sqlite3.connect(store_folder(server) / STORE) as db:
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
    choice = httpx.post(f"{two.url}/v1/completions", json=body, timeout=300).json()["choices"][0]
    assert choice["flashtrace"]["status"] == "queued"
    wait(lambda: fetch(two, choice["flashtrace"]["id"])["status"] == "completed")


def test_deleting_through_any_process_stops_the_trace(two):
    for _ in range(4):
        one = submit(two, {**LONG, "flashtrace": {**DEFERRED, "target": "generated"}})
        url = f"{two.url}/v1/attributions/{one}"
        assert httpx.delete(url, timeout=300).status_code == 200
        for _ in range(4):
            assert httpx.get(url, timeout=300).status_code == 404
    running = "vllm:num_requests_running"
    wait(lambda: total(metrics(two), running) == 0)


def test_the_store_is_private(two):
    path = store_folder(two)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert str(path) not in two.log.read_text(errors="replace")


def test_shutdown_with_attributions_in_flight_leaves_nothing(two):
    path = store_folder(two)
    children = psutil.Process(two.pid).children(recursive=True)
    for _ in range(6):
        submit(two, {**LONG, "flashtrace": {**DEFERRED, "hops": 3}})
    os.kill(two.pid, signal.SIGTERM)
    psutil.wait_procs(children, timeout=300)
    wait(lambda: not path.exists())
    assert not [child for child in children if child.is_running()]
    # vLLM itself may log one when it kills an engine that its API servers still listen to.
    assert not re.search(r'File "[^"]*/vllm_flashtrace/', two.log.read_text(errors="replace"))
