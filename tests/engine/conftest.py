"""Engines shared by the tests of this folder; each is started when the first test needs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.harness import SMOLLM2_KV_BYTES, TARGET, TOKENS, Engine
from tests.oracle import oracle_scores
from tests.tiny_models import make_tiny_model
from vllm_flashtrace.commands.demo import FILLER


@pytest.fixture(scope="package")
def smollm2(smollm2_folder: Path) -> Iterator[Engine]:
    """SmolLM2 in float32, eager, with prefix caching."""
    engine = Engine(
        smollm2_folder,
        "SmolLM2, float32, eager: real weights",
        kv_cache_memory_bytes=SMOLLM2_KV_BYTES,
    )
    yield engine
    engine.close()


@pytest.fixture(scope="package")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="package")
def tiny(tiny_folder: Path) -> Iterator[Engine]:
    """A tiny model, for what does not depend on the weights: faults and scheduling."""
    engine = Engine(
        tiny_folder,
        "a tiny model: faults and scheduling",
        distributed_executor_backend="mp",
        max_model_len=1024,
    )
    yield engine
    engine.close()


@pytest.fixture(scope="package")
def crowded(tiny_folder: Path) -> Iterator[Engine]:
    """The same model with small steps, few KV blocks and no prefix cache."""
    engine = Engine(
        tiny_folder,
        "small steps and few KV blocks: chunks and preemptions",
        enable_prefix_caching=False,
        max_num_batched_tokens=160,
        num_gpu_blocks_override=17,
        max_num_seqs=16,
        max_model_len=1024,
    )
    yield engine
    engine.close()


@pytest.fixture(scope="package")
def hf_smollm2(smollm2_folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        smollm2_folder, attn_implementation="eager", dtype=torch.float32
    )


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    """The Hugging Face model of a module's fixture `folder`, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )


@pytest.fixture(scope="module")
def expected(reference: Any) -> torch.Tensor:
    """What the oracle gives for the harness's tokens and target."""
    return oracle_scores(reference, TOKENS, TARGET.positions, TARGET.weights)


@pytest.fixture(scope="package")
def trace_tokens(smollm2: Engine) -> list[int]:
    """A natural text of about 600 tokens."""
    return text_tokens(smollm2, 600)


def text_tokens(engine: Engine, count: int, salt: str = "") -> list[int]:
    """Deterministic prose of exactly ``count`` tokens; ``salt`` makes it a different text."""
    words = [
        f"{salt}In the year {1200 + 7 * i} the town number {i} had {13 * i % 97} bridges. {FILLER} "
        for i in range(count)
    ]
    tokenizer = engine.llm.get_tokenizer()
    token_ids: list[int] = []
    for sentence in words:
        token_ids += tokenizer.encode(sentence, add_special_tokens=False)
        if len(token_ids) >= count:
            break
    return token_ids[:count]
