"""Tiny random models of each supported family, through the engine, against the float64 oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.harness import (
    Engine,
    TraceJob,
    attention_error,
    leaves_transformers_classes_alone,
    relative_l1,
    structure,
)
from tests.engine.test_start_proof import start_reports
from tests.measured import Measured
from tests.oracle import oracle_scores
from tests.tiny_models import (
    FAMILIES,
    FAMILY_NAMES,
    LLAMA4_ENGINE,
    PROVEN_FAMILIES,
    Family,
    make_other_model,
    make_tiny_model,
    make_windowed_llama,
)
from vllm_flashtrace.core.weights import TargetWeights

TOKENS = torch.randint(5, 500, (300,), generator=torch.Generator().manual_seed(1)).tolist()
TARGET = TargetWeights.from_mapping({i: 1.0 + i % 3 for i in [*range(150, 170), *range(250, 300)]})
LIMIT = 1e-3
# Chunks are made of whole blocks.
CHUNKS = {"block_size": 32, **LLAMA4_ENGINE}
ROUNDED_LIMIT = 5e-2


@pytest.mark.parametrize("family", (*FAMILIES, *PROVEN_FAMILIES))
def test_family(family: Family, tmp_path: Path, measured: Measured) -> None:
    folder = make_tiny_model(family, tmp_path / family)
    error, found = _compare(folder, folder, **_engine_args(family))
    measured("families", FAMILY_NAMES[family], float32=error, **found)


EVERY_RUN = ("llama", "gemma2", "gpt_oss")
# An output gate is read in vLLM's own code only.
GATED = ("afmoe", "laguna", "laguna_elements")


@pytest.mark.parametrize(
    "family",
    [
        family if family in EVERY_RUN else pytest.param(family, marks=pytest.mark.long)
        for family in (*FAMILIES, *PROVEN_FAMILIES)
        if family not in (*GATED, "llama4")
    ],
)
def test_in_transformers_code(family: Family, tmp_path: Path, measured: Measured) -> None:
    """Models that vLLM has code of its own for, in the code that it runs others in."""
    folder = make_tiny_model(family, tmp_path / family)
    error, _ = _compare(folder, folder, model_impl="transformers", **_engine_args(family))
    measured("families", FAMILY_NAMES[family], transformers=error)


def test_latent_attention_without_latents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    """The cache holds keys and values of every head, padded with zeros to the size of keys."""
    monkeypatch.setenv("VLLM_MLA_DISABLE", "1")
    folder = make_tiny_model("deepseek_v2", tmp_path / "deepseek_v2")
    error, found = _compare(folder, folder)
    measured("families", "DeepSeek V2, `VLLM_MLA_DISABLE=1`", float32=error, **found)


EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
HEADS = {"head_dim": 32}
OTHERS: dict[str, dict[str, Any]] = {
    "Apertus": {},
    "Arcee": {},
    "Ernie4_5": HEADS,
    "FlexOlmo": EXPERTS,
    "Glm": HEADS,
    "GraniteMoe": EXPERTS,
    "Helium": HEADS,
    "HunYuanDenseV1": HEADS,
    "Jais2": {},
    "Ministral3": HEADS,
    "NanoChat": HEADS,
    "Nemotron": HEADS,
    "Olmo": {},
    "Olmoe": EXPERTS,
    "SeedOss": {},
    "SmolLM3": {},
    "Starcoder2": {},
    "VaultGemma": HEADS,
}
OTHER_NAMES = {
    "Ernie4_5": "ERNIE 4.5",
    "Glm": "GLM",
    "Glm4Moe": "GLM-4.5",
    "HunYuanDenseV1": "HunYuan",
    "Jais2": "Jais 2",
    "Ministral3": "Ministral 3",
    "Olmo": "OLMo",
    "Olmoe": "OLMoE",
    "SeedOss": "Seed-OSS",
    "Starcoder2": "StarCoder2",
    "GPTNeoX": "GPT-NeoX",
    "Cohere2": "Cohere 2",
}
UNLIKE = {
    "BitNet": "contributions do not add up",  # A norm in front of the output projection.
    "Cohere2": "its norm behind attention was not found",  # Attention and MLP are parallel.
    "GPTNeoX": "contributions do not add up",  # They are too.
    "Persimmon": "an unknown output projection",
}


ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
# Models that vLLM has code of its own for, made of what other families have too.
OWN_CODE: dict[str, dict[str, Any]] = {
    **{name: OTHERS[name] for name in ("Ernie4_5", "GraniteMoe", "Ministral3", "Nemotron")},
    "Olmoe": EXPERTS,
    "Glm4Moe": {**HEADS, **ROUTED, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
}


@pytest.mark.long
@pytest.mark.parametrize("name", OWN_CODE)
def test_others(name: str, tmp_path: Path, measured: Measured) -> None:
    _measure_other(name, "vllm", OWN_CODE[name], "float32", tmp_path, measured)


# Kinds of code that other families have too, in other people's models.
@pytest.mark.long
@pytest.mark.parametrize("name", OTHERS)
def test_others_in_transformers_code(name: str, tmp_path: Path, measured: Measured) -> None:
    _measure_other(name, "transformers", OTHERS[name], "transformers", tmp_path, measured)


@pytest.mark.long
@pytest.mark.parametrize("name", UNLIKE)
def test_refused_in_transformers_code(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    folder = make_other_model(name, tmp_path / name)
    leaves_transformers_classes_alone(monkeypatch)
    engine = Engine(
        folder, "a refused model", in_process=True, max_model_len=1024, model_impl="transformers"
    )
    try:
        assert UNLIKE[name] in engine.status()["refusal"]
        assert len(engine.generate([5, 6, 7], 4)) == 4
        measured(
            "families", OTHER_NAMES.get(name, name), block=UNLIKE[name], transformers="refused"
        )
    finally:
        engine.close()


@pytest.mark.long
@pytest.mark.parametrize("family", GATED)
def test_gates_in_transformers_code(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    folder = make_tiny_model(family, tmp_path / family)
    leaves_transformers_classes_alone(monkeypatch)
    options = {"max_model_len": 1024, "model_impl": "transformers"}
    engine = Engine(folder, "a refused model", in_process=True, **options)
    try:
        assert " with an " in engine.status()["refusal"]  # Gate, or unknown projection.
        assert len(engine.generate([5, 6, 7], 4)) == 4
        measured("families", FAMILY_NAMES[family], transformers="refused")
    finally:
        engine.close()


# The method is that of float32: what is new is how much the engine's rounding changes.
@pytest.mark.long
@pytest.mark.parametrize("family", (*FAMILIES, *PROVEN_FAMILIES))
def test_in_bfloat16(family: Family, tmp_path: Path, measured: Measured) -> None:
    """The oracle's weights are rounded as the engine's are, and nothing else of it."""
    from transformers import AutoModelForCausalLM

    folder = make_tiny_model(family, tmp_path / family)
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.bfloat16
    )
    expected = oracle_scores(model, TOKENS, TARGET.positions, TARGET.weights)
    options = {"max_model_len": 1024, "dtype": "bfloat16", **_engine_args(family)}
    with pytest.MonkeyPatch.context() as patch:
        leaves_transformers_classes_alone(patch)
        engine = Engine(folder, "a model family in bfloat16", in_process=True, **options)
    try:
        [proof] = start_reports(engine)
        error = relative_l1(engine.trace(TraceJob(TOKENS, TARGET)).scores, expected)
    finally:
        engine.close()
    print(f"{family}: proof {proof['largest_error']:.1e} of {proof['limit']}")
    measured("families", FAMILY_NAMES[family], bfloat16=error)
    assert proof["refusal"] is None and proof["largest_error"] < proof["limit"] / 2
    assert error <= ROUNDED_LIMIT


def test_sliding_window_in_some_layers(tmp_path: Path, measured: Measured) -> None:
    """A window of 64 in two of four layers, whose cache keeps every token."""
    folder, reference = make_windowed_llama(tmp_path, ("full_attention", "sliding_attention"))
    error, _ = _compare(folder, reference, disable_hybrid_kv_cache_manager=True)
    measured("ways", "windows in some layers, one cache group", against="oracle", scores=error)


def test_chunks_in_a_cache_that_keeps_every_token(tmp_path: Path, measured: Measured) -> None:
    folder = make_tiny_model("llama4", tmp_path / "llama4")
    error, _ = _compare(folder, folder, disable_hybrid_kv_cache_manager=True, **CHUNKS)
    measured("ways", "chunks in some layers, one cache group", against="oracle", scores=error)


def _engine_args(family: Family) -> dict[str, Any]:
    if family == "llama4":
        return CHUNKS
    # Where a CPU has AMX, vLLM has another backend of latent attention, which is refused.
    return {"attention_backend": "CPU_MLA"} if family.startswith("deepseek") else {}


def _measure_other(
    name: str, code: str, sizes: dict[str, Any], column: str, tmp_path: Path, measured: Measured
) -> None:
    """Compares a model that is none of the tiny families, in vLLM's code or Transformers'."""
    folder = make_other_model(name, tmp_path / name, **sizes)
    error, found = _compare(folder, folder, model_impl=code)
    measured("families", OTHER_NAMES.get(name, name), **{column: error}, **found)


def _compare(folder: Path, reference: Path, **engine_args: Any) -> tuple[float, dict[str, str]]:
    """Relative L1 distance of the exact scores, and what was found in the model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        reference, attn_implementation="eager", dtype=torch.float32
    )
    expected = oracle_scores(model, TOKENS, TARGET.positions, TARGET.weights)
    with pytest.MonkeyPatch.context() as patch:
        leaves_transformers_classes_alone(patch)
        engine = Engine(
            folder, "a model family", in_process=True, max_model_len=1024, **engine_args
        )
    try:
        found = structure(start_reports(engine)[0])
        job = TraceJob(TOKENS, TARGET, attention=True)
        report = engine.trace(job)
        exact = report.scores
        pruned = engine.trace(TraceJob(TOKENS, TARGET, exact_fraction=0.9)).scores
    finally:
        engine.close()
    errors = relative_l1(exact, expected), relative_l1(pruned, expected)
    print(f"{folder.name}: relative L1 exact {errors[0]:.2e}, pruned {errors[1]:.2e}")
    assert errors[0] <= LIMIT
    assert errors[1] <= LIMIT
    attention = attention_error(report, model, job)
    print(f"{folder.name}: attention {attention:.1e}")
    assert attention <= LIMIT
    return errors[0], found
