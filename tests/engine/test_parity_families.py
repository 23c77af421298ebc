"""Tiny random models of each supported family, through the engine, against the float64 oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.engine.harness import Engine, TraceJob, relative_l1
from tests.oracle import oracle_scores
from tests.tiny_models import make_tiny_model
from vllm_flashtrace.core.weights import TargetWeights

LIMIT = 1e-3


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_family(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_tiny_model(family, tmp_path / family)
    token_ids = torch.randint(5, 500, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    weights = TargetWeights.from_mapping(
        {i: 1.0 + i % 3 for i in [*range(150, 170), *range(250, 300)]}
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    expected = oracle_scores(model, token_ids, weights.positions, weights.weights)
    engine = Engine(folder, max_model_len=1024)
    try:
        exact = engine.trace(TraceJob(token_ids, weights)).scores
        pruned = engine.trace(TraceJob(token_ids, weights, exact_fraction=0.9)).scores
    finally:
        engine.close()
    errors = relative_l1(exact, expected), relative_l1(pruned, expected)
    print(f"{family}: relative L1 exact {errors[0]:.2e}, pruned {errors[1]:.2e}")
    assert errors[0] <= LIMIT
    assert errors[1] <= LIMIT
