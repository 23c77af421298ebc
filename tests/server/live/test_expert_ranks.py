"""Data parallelism of experts, whose engines compute every step together, and load balancers.

A rank that has nothing to do computes dummy batches meanwhile. Behind an external or a hybrid load
balancer there are several servers, each with engines of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.engine.harness import relative_l1
from tests.expert_collectives import ExpertCollectives
from tests.oracle import oracle_scores
from tests.server.live.test_data_parallel import (
    BLOCK,
    NEW_TOKENS,
    attribute,
    complete,
    metrics,
    prompt,
    total,
)
from tests.server.live_server import OURS, Server, free_port, serve
from tests.tiny_models import Family, make_tiny_model

pytestmark = pytest.mark.timeout(600)

LIMIT = 1e-5
EXPERTS = "--enable-expert-parallel"
RANKS = "--tensor-parallel-size=2"


@contextmanager
def served(folder: Path, layouts: list[list[str]], *options: str) -> Iterator[list[Server]]:
    """A server for each layout, which start together."""
    kind = f"{ExpertCollectives.__module__}.{ExpertCollectives.__name__}"
    options = (
        *(f"--worker-extension-cls={kind}", f"--block-size={BLOCK}", *options),
        *("--kv-cache-memory-bytes=64M", "--enable-prompt-tokens-details"),
    )
    env = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "FLASHTRACE_STORE": ""}
    logs = [folder.parent / f"server{place}.log" for place in range(len(layouts))]
    starting = [
        serve(OURS, str(folder), log, *layout, *options, worker_process=RANKS in layout, **env)
        for log, layout in zip(logs, layouts, strict=True)
    ]
    with ExitStack() as stack, ThreadPoolExecutor(len(starting)) as pool:
        yield list(pool.map(stack.enter_context, starting))


def check(server: Server, folder: Path, ranks: list[int | None]) -> None:
    """Compares traces with the oracle: each alone, then all beside requests that decode."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )

    def scores(seed: int, rank: int | None) -> torch.Tensor:
        found = attribute(server, prompt(seed), prompt(seed + 1)[:NEW_TOKENS], rank, hops=0)
        return torch.tensor([score["score"] for score in found["scores"]])

    jobs = [(2003 + 2 * place, rank) for place, rank in enumerate([*ranks, *ranks])]
    found = [scores(*job) for job in jobs[: len(ranks)]]
    with ThreadPoolExecutor(12) as pool:
        beside = [pool.submit(decode, server, seed) for seed in range(4)]
        found += pool.map(lambda job: scores(*job), jobs[len(ranks) :])
        assert [each.result() for each in beside] == [40] * 4
    for (seed, rank), ours in zip(jobs, found, strict=True):
        tokens = prompt(seed)
        positions = torch.arange(len(tokens) + NEW_TOKENS - 8, len(tokens) + NEW_TOKENS)
        sequence = [*tokens, *prompt(seed + 1)[:NEW_TOKENS]]
        expected = oracle_scores(model, sequence, positions, torch.ones(8))
        error = relative_l1(ours, expected[: len(tokens)])
        print(f"engine {rank} against the oracle: relative L1 {error:.1e}")
        assert error <= LIMIT


def decode(server: Server, seed: int) -> int:
    body = {"model": "m", "prompt": prompt(seed + 50)[:60], "max_tokens": 40, "ignore_eos": True}
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=300)
    return int(response.json()["usage"]["completion_tokens"])


def check_completions(server: Server) -> None:
    """Traces find what their completions have left in the cache of an engine."""
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda seed: complete(server, seed), range(1, 5)))
    assert {each["status"] for attributions in answers for each in attributions} == {"completed"}
    samples = metrics(server)
    assert total(samples, "flashtrace_prefix_cache_misses_total") == 0
    assert total(samples, "flashtrace_prefix_cache_hits_total") > 4 * 100


def status(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{server.url}/v1/attributions/status", timeout=300).json()
    return found


def proven_ranks(server: Server) -> list[int]:
    found = status(server)
    assert found["status"] == "ready", found
    workers = found["engine"]["workers"]
    assert max(worker["proof"]["largest_error"] for worker in workers) < 1e-5
    return [worker["data_parallel_rank"] for worker in workers]


long = pytest.mark.long


@pytest.mark.parametrize(
    ("options", "workers"),
    [
        pytest.param([EXPERTS], 1, id="experts"),
        pytest.param([], 1, id="experts in parts", marks=long),
        pytest.param([EXPERTS, RANKS], 2, id="experts by sequence", marks=long),
    ],
)
def test_engines_in_step(tmp_path: Path, options: list[str], workers: int) -> None:
    folder = make_tiny_model("qwen3_moe", tmp_path / "model")
    layout = ["--data-parallel-size=2", "--api-server-count=1", *options]
    with served(folder, [layout]) as [server]:
        assert proven_ranks(server) == sorted([0, 1] * workers)
        check(server, folder, [0, 1, None])
        check_completions(server)
    log = server.log.read_text(errors="replace")
    assert "Using allgather_reducescatter all2all manager" in log


@pytest.mark.parametrize("family", ["qwen3_moe", pytest.param("llama", marks=long)])
def test_behind_a_load_balancer(tmp_path: Path, family: Family) -> None:
    """Two engines behind one server, which balances by itself, and one behind another."""
    folder = make_tiny_model(family, tmp_path / "model")
    common = [
        "--data-parallel-size=3",
        "--data-parallel-address=127.0.0.1",
        f"--data-parallel-rpc-port={free_port()}",
        "--api-server-count=1",
        *([] if family == "llama" else [EXPERTS]),
    ]
    hybrid = [*common, "--data-parallel-size-local=2", "--data-parallel-hybrid-lb"]
    # vLLM makes an external one of it, since it has one engine.
    external = [*common, "--data-parallel-size-local=1", "--data-parallel-start-rank=2"]
    with served(folder, [hybrid, external]) as [two, one]:
        assert (proven_ranks(two), proven_ranks(one)) == ([0, 1], [2])
        check(two, folder, [0, 1])
        check(one, folder, [None])
        check_completions(two)
        check_completions(one)


@long
def test_a_divided_stream_is_refused(tmp_path: Path) -> None:
    """vLLM's DeepSeek leaves each tensor-parallel rank a part of the rows behind attention."""
    folder = make_tiny_model("deepseek_v3", tmp_path / "model")
    layout = ["--data-parallel-size=2", "--api-server-count=1", RANKS]
    with served(folder, [[*layout, EXPERTS, "--attention-backend=CPU_MLA"]]) as [server]:
        workers = status(server)["engine"]["workers"]
        assert all("divide the residual stream" in worker["refusal"] for worker in workers)
        assert decode(server, 0) == 40
