"""Prefill in one engine and decoding in another (Nixl): traces run in the one that decoded."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.engine.harness import relative_l1
from tests.oracle import oracle_scores
from tests.server.live.test_data_parallel import BLOCK, FIELD, NEW_TOKENS, metrics, prompt, total
from tests.server.live_server import OURS, Server, free_port, serve
from tests.tiny_models import make_tiny_model

pytestmark = [pytest.mark.timeout(600), pytest.mark.long]

LIMIT = 1e-5
HERE = "127.0.0.1"
REMOTE_DECODE = {"do_remote_decode": True, "do_remote_prefill": False}


def serving(folder: Path, role: str) -> Any:
    transfer = {"kv_connector": "NixlConnector", "kv_role": role, "kv_buffer_device": "cpu"}
    return serve(
        OURS,
        str(folder),
        folder.parent / f"{role}.log",
        f"--block-size={BLOCK}",
        "--kv-cache-memory-bytes=64M",
        "--enable-prompt-tokens-details",
        f"--kv-transfer-config={json.dumps(transfer)}",
        VLLM_NIXL_SIDE_CHANNEL_HOST=HERE,
        VLLM_NIXL_SIDE_CHANNEL_PORT=str(free_port()),
    )


def complete(server: Server, tokens: list[int], **body: Any) -> dict[str, Any]:
    body = {"model": "m", "prompt": tokens, "temperature": 0, "ignore_eos": True, **body}
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=300)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def test_traces_of_prompts_that_were_prefilled_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("nixl")
    from transformers import AutoModelForCausalLM

    folder = make_tiny_model("llama", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    roles = ("kv_producer", "kv_consumer")
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        starts = [serving(folder, role) for role in roles]
        prefills, decodes = pool.map(stack.enter_context, starts)
        for seed in (1, 3, 5):
            tokens = prompt(seed)
            handed = complete(prefills, tokens, max_tokens=1, kv_transfer_params=REMOTE_DECODE)
            answer = complete(
                decodes,
                tokens,
                max_tokens=NEW_TOKENS,
                return_token_ids=True,
                kv_transfer_params=handed["kv_transfer_params"],
                flashtrace=FIELD | {"hops": 0},
            )
            [choice] = answer["choices"]
            assert choice["flashtrace"]["status"] == "completed", choice
            positions = torch.arange(len(tokens) + NEW_TOKENS - 8, len(tokens) + NEW_TOKENS)
            sequence = [*tokens, *choice["token_ids"]]
            expected = oracle_scores(model, sequence, positions, torch.ones(8))
            scores = [score["score"] for score in choice["flashtrace"]["scores"]]
            error = relative_l1(torch.tensor(scores), expected[: len(tokens)])
            cached = choice["flashtrace"]["usage"]["cached_tokens"]
            print(f"{cached} of {len(sequence)} tokens cached: relative L1 {error:.1e}")
            assert error <= LIMIT and cached >= (len(tokens) + 7) // BLOCK * BLOCK
        samples = metrics(decodes)
        assert total(samples, "vllm:nixl_xfer_time_seconds_count") == 3
        # But for the token that a step must compute, prompts came from the other engine.
        moved = total(samples, "vllm:external_prefix_cache_hits_total")
        assert moved >= sum(len(prompt(seed)) - 1 for seed in (1, 3, 5))
