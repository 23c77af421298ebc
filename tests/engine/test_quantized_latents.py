"""DeepSeek V3 with quantised weights: what makes keys and values of latents is quantised too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.harness import Engine, TraceJob, relative_l1
from tests.engine.test_latent_attention import BACKEND, found_refusal
from tests.engine.test_quantized import TOKENS, WEIGHTS, matrix_error, needs, served
from tests.engine.test_start_proof import LAYER, decoder, proven
from tests.measured import Measured
from tests.oracle import oracle_scores
from tests.quantized_models import SCHEMES, make_quantized_model
from vllm_flashtrace.worker import latents, start_proof

BLOCKS = "FP8 in blocks"

# Where latents are rounded, float32 takes some to another side than the oracle does.
CASES = {
    "compressed-tensors FP8 W8A8 in blocks": ("float32", 3e-2),
    "compressed-tensors FP8 W8A8": ("float32", 3e-2),
    "FP8 per tensor, static activations": ("float32", 5e-2),
    "compressed-tensors W4A16": ("float32", 1e-3),
    "GPTQ": ("float32", 1e-3),
    "AWQ": ("float32", 1e-3),
    "FP8 in blocks, activations in 16 bits": ("bfloat16", 5e-2),
}


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("latents") / "blocks"
    return make_quantized_model(SCHEMES[BLOCKS], folder, torch.float32, "deepseek_v3")


# What differs between these and the others is how the layer is applied, which is vLLM's matter.
MORE = {"compressed-tensors FP8 W8A8 in blocks", "FP8 per tensor, static activations"}
MORE |= {"GPTQ", "AWQ"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.long] if name in MORE else []) for name in CASES],
)
def test_scheme(name: str, tmp_path: Path, measured: Measured) -> None:
    kind, limit = CASES[name]
    dtype = getattr(torch, kind)
    if kind == "bfloat16":
        needs("fp8_scaled_mm_cpu")
    folder, model = make_quantized_model(SCHEMES[name], tmp_path, dtype, "deepseek_v3")
    expected = oracle_scores(model, TOKENS, WEIGHTS.positions, WEIGHTS.weights)
    with served(folder, dtype, **BACKEND) as engine:
        proof = compare(engine, name, kind, model, expected, limit, measured)
    assert proof["found"]["up_projection_quantization"] == proof["found"]["quantization"]


def test_int8_of_all_but_the_up_projection(tmp_path: Path, measured: Measured) -> None:
    """Of which vLLM's CPU build cannot make the matrices that decode, having packed the weight."""
    name, skipped = "compressed-tensors int8 W8A8", "kv_b_proj"
    scheme = SCHEMES[name]
    config = {**scheme.config, "ignore": ["lm_head", f"re:.*{skipped}"]}
    scheme = replace(scheme, config=config, skipped=(skipped,))
    folder, model = make_quantized_model(scheme, tmp_path, torch.float32, "deepseek_v3")
    expected = oracle_scores(model, TOKENS, WEIGHTS.positions, WEIGHTS.weights)
    with served(folder, torch.float32, **BACKEND) as engine:
        row = f"{name}, `kv_b_proj` not quantised"
        proof = compare(engine, row, "float32", model, expected, 3e-2, measured)
    assert proof["found"]["up_projection_quantization"] == []


def compare(
    engine: Engine,
    name: str,
    kind: str,
    model: Any,
    expected: Tensor,
    limit: float,
    measured: Measured,
) -> dict[str, Any]:
    proof = proven(engine)
    dense = [layer.self_attn.o_proj.weight.detach() for layer in model.model.layers]
    matrix = max(engine.on_worker(matrix_error, *layer) for layer in enumerate(dense))
    error = relative_l1(engine.trace(TraceJob(TOKENS, WEIGHTS)).scores, expected)
    attention = engine.on_worker(attention_errors)
    row = name if kind == "float32" else f"{name}, {kind}"
    numbers = {"attention": attention, "proof": proof["largest_error"], "scores": error}
    measured("quantized_latents", row, **numbers)
    assert proof["refusal"] is None and proof["found"]["latent_attention"]
    assert matrix <= (1e-6 if kind == "float32" else 2**-8)
    assert attention <= (1e-5 if kind == "float32" else 1e-2)
    assert error <= limit
    return proof


def attention_errors(worker: Any) -> float:
    runner = worker.model_runner
    proof = start_proof._prepared(runner, None)
    assert proof is not None
    proof.run(worker)
    return float(proof.errors[:, 0].max())


@pytest.fixture(scope="module")
def engine(blocks: tuple[Path, Any]) -> Iterator[Engine]:
    with served(blocks[0], torch.float32, max_num_seqs=8, **BACKEND) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(blocks: tuple[Path, Any]) -> Tensor:
    return oracle_scores(blocks[1], TOKENS, WEIGHTS.positions, WEIGHTS.weights)


def test_blocks(
    engine: Engine, blocks: tuple[Path, Any], expected: Tensor, measured: Measured
) -> None:
    proof = compare(engine, BLOCKS, "float32", blocks[1], expected, 3e-2, measured)
    assert proof["found"]["up_projection_quantization"] == [BLOCKS]


def test_beside_requests_that_decode(
    engine: Engine, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their rows are made with dequantised matrices, a trace's are not."""
    alone = engine.trace(TraceJob(TOKENS, WEIGHTS)).scores
    monkeypatch.setattr(latents, "_PROJECTED", 64)
    prompts = [TOKENS[start : start + 100] for start in (0, 150)]
    [report] = engine.trace_many([TraceJob(TOKENS, WEIGHTS)], prompts, 8)
    assert relative_l1(report.scores, alone) <= 1e-6
    assert relative_l1(report.scores, expected) <= 3e-2


Weights = tuple[Tensor, Tensor]


def with_scale(scale: Tensor, rows: slice, columns: slice) -> Tensor:
    wrong = scale.clone()
    wrong[rows, columns] *= 1.05
    return wrong


def swapped(tensor: Tensor, size: int) -> Tensor:
    """Two blocks of inputs in each other's place."""
    return torch.cat([tensor[:, size : 2 * size], tensor[:, :size], tensor[:, 2 * size :]], 1)


def transposed(weight: Tensor) -> Tensor:
    """Each head's matrix read in the order of its transpose."""
    heads = weight.view(4, -1, weight.shape[1])
    return heads.flatten(1).unflatten(1, heads.shape[:0:-1]).transpose(1, 2).reshape(weight.shape)


# What is read of `kv_b_proj`, eight bits ``[out, in]`` and the scales of blocks of 32 by 32.
BREAKS: dict[str, Callable[[Tensor, Tensor], Weights]] = {
    "one scale of `W_UK` 5 % too large": lambda w, s: (w, with_scale(s, slice(0, 1), slice(3, 4))),
    "one scale of `W_UV` 5 % too large": lambda w, s: (w, with_scale(s, slice(2, 3), slice(3, 4))),
    "scales of two blocks swapped": lambda w, s: (w, swapped(s, 1)),
    "two blocks swapped": lambda w, s: (swapped(w, 32), swapped(s, 1)),
    "matrix of each head transposed": lambda w, s: (transposed(w), s),
    "heads in another order": lambda w, s: (w.roll(96, 0), s.roll(3, 0)),
}


def assert_seen(
    engine: Engine, name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    """The proof refuses, in one layer, what ``wrong`` makes of `latents.projected`."""
    attention = decoder(engine).self_attn.mla_attn.mla_attn
    stock = latents.projected
    good = proven(engine)
    assert good["refusal"] is None
    right = engine.trace(TraceJob(TOKENS, WEIGHTS)).scores

    def projected(layer: Any, given: Tensor) -> Any:
        return wrong(layer, given) if layer is attention else stock(layer, given)

    monkeypatch.setattr(latents, "projected", projected)
    scores = engine.trace(TraceJob(TOKENS, WEIGHTS)).scores
    report = proven(engine)
    error = float(engine.on_worker(attention_errors))
    measured("breaks_quantized_latents", name, error=error, scores=relative_l1(scores, right))
    assert f"failed in layer {LAYER} (" in report["refusal"]
    assert start_proof._MEASURES["attention"] in report["refusal"]
    assert error > 5e-4


@pytest.mark.parametrize("name", BREAKS)
def test_a_wrong_matrix_is_seen(
    engine: Engine, name: str, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    stock = latents.projected

    def wrong(attention: Any, given: Tensor) -> Any:
        layer = attention.kv_b_proj
        weight, scale = layer.weight.data, layer.weight_scale_inv.data
        changed, factors = BREAKS[name](weight.view(torch.int8), scale)
        layer.weight.data = changed.contiguous().view(weight.dtype)
        layer.weight_scale_inv.data = factors
        try:
            yield from list(stock(attention, given))
        finally:
            layer.weight.data, layer.weight_scale_inv.data = weight, scale

    assert_seen(engine, name, wrong, monkeypatch, measured)


def test_matrices_that_decode_are_seen(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    """vLLM keeps them dequantised; latents are not rounded for these."""

    def wrong(attention: Any, given: Tensor) -> Any:
        keys = given @ attention.W_UK_T.transpose(1, 2)
        yield slice(0, len(given)), keys, given @ attention.W_UV

    assert_seen(engine, "latents that are not rounded", wrong, monkeypatch, measured)


def test_a_scale_of_all_rows_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8DynamicTensorSym

    layer = decoder(engine).self_attn.mla_attn.mla_attn.kv_b_proj
    config = layer.quant_method.fp8_linear.config
    monkeypatch.setattr(config, "activation_quant_key", kFp8DynamicTensorSym)
    message = found_refusal(engine)
    assert "an up-projection of latents that rounds them by one scale for all of a step" in message


def test_other_schemes_are_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = decoder(engine).self_attn.mla_attn.mla_attn.kv_b_proj
    monkeypatch.setattr(layer, "quant_method", object())
    assert "an up-projection of latents quantized by object" in found_refusal(engine)
