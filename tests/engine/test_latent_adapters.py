"""Completions of a DeepSeek V3 made with LoRA adapters, whose latent attention is traced."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.harness import Engine, TraceJob, relative_l1
from tests.engine.test_latent_attention import BACKEND
from tests.engine.test_lora import RANK, TARGET, TOKENS, Adapter, adapter_of, make_adapter
from tests.engine.test_quantized import served
from tests.oracle import oracle_scores
from tests.quantized_models import SCHEMES, make_quantized_model
from tests.tiny_models import make_tiny_model

LORA = {"enable_lora": True, "max_loras": 2, "max_lora_rank": RANK}
LIMIT = 1e-5
TARGETS = ["o_proj", "q_b_proj", "q_a_proj", "kv_a_proj_with_mqa", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents") / "base"
    return make_tiny_model("deepseek_v3", folder, experts=False)


@pytest.fixture(scope="module")
def plain(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


@pytest.fixture(scope="module")
def engine(base: Path) -> Iterator[Engine]:
    engine = Engine(
        base, "LoRA of latent attention", in_process=True, max_model_len=1024, **BACKEND, **LORA
    )
    yield engine
    engine.close()


def errors(engine: Engine, cases: list[Adapter]) -> list[float]:
    jobs = [TraceJob(TOKENS, TARGET, lora_request=case.request) for case in cases]
    found = []
    for case, report in zip(cases, engine.trace_many(jobs), strict=True):
        expected = oracle_scores(case.model, TOKENS, TARGET.positions, TARGET.weights)
        found.append(relative_l1(report.scores, expected))
    print([f"{error:.1e}" for error in found])
    return found


def test_every_projection(engine: Engine, base: Path, plain: Any) -> None:
    """First the base model beside an adapter, as in `test_lora`; then more adapters than slots."""
    adapters = [
        make_adapter(base, base.parent / name, number, [name])
        for number, name in enumerate(TARGETS, 1)
    ]
    adapters.append(make_adapter(base, base.parent / "all", len(TARGETS) + 1, TARGETS))
    assert max(errors(engine, [adapters[0], Adapter(None, plain)])) <= LIMIT
    assert max(errors(engine, adapters)) <= LIMIT


def test_what_vllm_leaves_out_is_left_out(engine: Engine, base: Path, plain: Any) -> None:
    """Its latent attention applies the up-projection without its adapter, and so does a trace."""
    adapter = make_adapter(base, base.parent / "up", 9, ["kv_b_proj"])
    given = TraceJob(TOKENS, TARGET, lora_request=adapter.request)
    scores = engine.trace(given).scores
    without = engine.trace(TraceJob(TOKENS, TARGET)).scores
    assert torch.equal(scores, without)
    expected = oracle_scores(plain, TOKENS, TARGET.positions, TARGET.weights)
    assert relative_l1(scores, expected) <= LIMIT
    adapted = oracle_scores(adapter.model, TOKENS, TARGET.positions, TARGET.weights)
    assert relative_l1(adapted, expected) > 0.1


def test_quantised_weights(tmp_path: Path) -> None:
    scheme = SCHEMES["GPTQ"]
    folder, model = make_quantized_model(scheme, tmp_path / "base", torch.float32, "deepseek_v3")
    adapter = adapter_of(model, tmp_path / "adapter", 1, ["o_proj", "q_b_proj"])
    with served(folder, torch.float32, **BACKEND, **LORA) as engine:
        assert max(errors(engine, [adapter])) <= LIMIT
