"""A live server with two engines: every trace runs on the engine that served its completion."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.engine.harness import relative_l1
from tests.oracle import oracle_scores
from tests.server.live_server import OURS, Server, serve
from tests.tiny_models import VOCABULARY, make_tiny_model

pytestmark = pytest.mark.timeout(600)

LIMIT = 5e-4
BLOCK = 32
COMPLETIONS, CONCURRENCY, NEW_TOKENS = 40, 8, 16
# Two hops: over the end of the answer, then over what led to it.
FIELD = {"target": {"tokens": [[NEW_TOKENS - 8, NEW_TOKENS]]}, "hops": 1, "top_k": None}
SHARED = [5 + i % 200 for i in range(3 * BLOCK)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("qwen3", tmp_path_factory.mktemp("dp") / "qwen3")


@pytest.fixture(scope="module")
def two_engines(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two engines, and as many API servers as vLLM then starts by default, which is two."""
    log = tmp_path_factory.mktemp("dp") / "server.log"
    options = [
        "--data-parallel-size=2",
        f"--block-size={BLOCK}",
        "--kv-cache-memory-bytes=128M",
        "--enable-prompt-tokens-details",
    ]
    with serve(
        OURS, str(folder), log, *options, VLLM_CPU_OMP_THREADS_BIND="0|1", FLASHTRACE_STORE=""
    ) as running:
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
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)
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
    response = httpx.post(f"{server.url}/v1/attributions", json=body, headers=headers, timeout=120)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    assert found["status"] == "completed", found
    return found


def metrics(server: Server) -> dict[str, float]:
    """Samples by name and labels, over all API servers."""
    found = {}
    for line in httpx.get(f"{server.url}/metrics", timeout=60).text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[name] = float(value)
    return found


def total(samples: dict[str, float], name: str, label: str = "") -> float:
    return sum(v for key, v in samples.items() if key.startswith(f"{name}{{") and label in key)


def test_the_report_names_every_engine(two_engines):
    for _ in range(4):
        status = httpx.get(f"{two_engines.url}/v1/attributions/status", timeout=60).json()
        assert status["status"] == "ready"
        workers = status["engine"]["workers"]
        assert [worker["data_parallel_rank"] for worker in workers] == [0, 1]
        assert len({worker["pid"] for worker in workers}) == 2


def test_every_trace_hits_the_cache_of_its_own_engine(two_engines):
    before = metrics(two_engines)
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        answers = list(pool.map(lambda seed: complete(two_engines, seed), range(COMPLETIONS)))
    for seed, attributions in enumerate(answers):
        assert len(attributions) == (2 if seed % 4 == 0 else 1)
        assert [each["status"] for each in attributions] == ["completed"] * len(attributions)
    after = metrics(two_engines)

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


def test_existing_texts_stay_on_one_engine(two_engines):
    """Nothing of their first hop is in a cache; the second one finds what the first has left."""
    before = metrics(two_engines)

    def one(seed: int) -> float:
        tokens = prompt(3 * seed + 1001)
        usage = attribute(two_engines, tokens, tokens[:NEW_TOKENS])["usage"]
        assert usage["cached_tokens"] >= len(tokens) - BLOCK
        return float(usage["cached_tokens"])

    with ThreadPoolExecutor(CONCURRENCY) as pool:
        cached = sum(pool.map(one, range(16)))
    after = metrics(two_engines)
    for name, expected in (("hits", cached), ("misses", 0)):
        name = f"flashtrace_prefix_cache_{name}_total"
        assert total(after, name) - total(before, name) == expected


def test_both_engines_give_what_the_formulas_give(two_engines, folder: Path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    for seed in (2003, 2005):
        tokens, completion = prompt(seed), prompt(seed + 1)[:NEW_TOKENS]
        positions = torch.arange(len(tokens) + NEW_TOKENS - 8, len(tokens) + NEW_TOKENS)
        expected = oracle_scores(model, [*tokens, *completion], positions, torch.ones(8))
        for rank in (0, 1, None):
            found = attribute(two_engines, tokens, completion, rank, hops=0)["scores"]
            assert [score["index"] for score in found] == list(range(len(tokens)))
            ours = torch.tensor([score["score"] for score in found])
            error = relative_l1(ours, expected[: len(tokens)])
            print(f"engine {rank} against the oracle: relative L1 {error:.1e}")
            assert error <= LIMIT
