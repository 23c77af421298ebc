"""Latent attention (MLA) on the GPU path."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import MLAAttention
from vllm.v1.kv_cache_layout import KVCacheLayout

from tests.engine.harness import relative_l1
from tests.engine.test_quantized import kernels_that_run_here
from tests.gpu.latent_backends import LATENT_BACKENDS
from tests.gpu.standin import CPU
from tests.gpu.test_start_proof import proof
from tests.gpu.v2_engine import (
    LIMIT,
    V2Engine,
    apply_patches,
    assert_exact,
    exact_error,
    traced,
    untraced,
    v2_engine,
)
from tests.measured import Measured
from tests.oracle import as_float64
from tests.quantized_models import SCHEMES, make_quantized_model
from tests.tiny_models import FAMILY_NAMES, make_tiny_model
from vllm_flashtrace.base.errors import TraceError, UnsupportedModelError
from vllm_flashtrace.core.hops import FurtherHops, TracedTarget
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.kernels import AttentionForm
from vllm_flashtrace.trace.wire import TraceSpec
from vllm_flashtrace.worker import gpu_latents, gpu_model, latents, runner, traced_model
from vllm_flashtrace.worker.gpu_model import GPUTracedModel

BLOCK_SIZES = {"CUTLASS_MLA": 128, "FLASHINFER_MLA": 32, "FLASHMLA": 128}
"""Tokens of a block, where it is not any multiple of 16; FLASHMLA reads two blocks of 64."""


@pytest.fixture(scope="module", autouse=True)
def _patched() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        apply_patches(patch)
        patch.setattr(runner, "check_architecture", lambda _: None)  # Only some engines are proven.
        yield


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A tiny DeepSeek V3, and the same in transformers, in float64."""
    from transformers import AutoModelForCausalLM

    folder = make_tiny_model("deepseek_v3", tmp_path_factory.mktemp("deepseek_v3"))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return folder, as_float64(reference)


@pytest.fixture(scope="module")
def loaded(deepseek: tuple[Path, Any]) -> Iterator[V2Engine]:
    with (
        pytest.MonkeyPatch.context() as patch,
        v2_engine(deepseek[0], patch, "TRITON_MLA", block_size=16) as engine,
    ):
        yield engine


@pytest.mark.parametrize("backend", sorted(LATENT_BACKENDS))
def test_every_backend(
    backend: str, deepseek: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    """Two traces in chunks, beside a request that decodes; so do chunks on some backends."""
    folder, reference = deepseek
    first, second = traced(150, (90, 150)), traced(70, (20, 24), (60, 70), seed=3)
    size = BLOCK_SIZES.get(backend, 16)
    with v2_engine(folder, monkeypatch, backend, block_size=size) as engine:
        report = proof(engine)
        assert report["refusal"] is None and report["largest_error"] < 1e-5, report
        assert report["found"]["latent_attention"]
        engine.step({"other": 20}, new={"other": untraced(60, 1)})
        new = {"first": first.new, "second": second.new}
        engine.step({"other": 1, "second": 40, "first": 100}, new=new)
        engine.step({"other": 1, "second": 30, "first": 49})
        engine.step({"other": 1, "first": 1})
        errors = [exact_error(engine, trace, reference) for trace in (first, second)]
    measured("gpu_backends", backend, deepseek=max(errors))
    measured("families", FAMILY_NAMES["deepseek_v3"], gpu="adapter")


def test_bfloat16(
    deepseek: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    """One row is computed as decodes are, which round other products than prefills."""
    trace = traced(150, (90, 150))
    with v2_engine(
        deepseek[0], monkeypatch, "TRITON_MLA", block_size=16, dtype="bfloat16"
    ) as engine:
        report = proof(engine)
        assert report["refusal"] is None and report["largest_error"] < 0.01, report
        engine.step({"trace": 100}, new={"trace": trace.new})
        engine.step({"trace": 49})
        engine.step({"trace": 1})
        error = relative_l1(engine.report(trace).scores, trace.oracle(deepseek[1]))
    measured("gpu_backends", "TRITON_MLA, bfloat16", deepseek=error)
    assert error < 0.03


@pytest.mark.parametrize("layout", list(KVCacheLayout), ids=lambda layout: layout.name)
def test_every_layout_in_parts(
    loaded: V2Engine,
    layout: KVCacheLayout,
    deepseek: tuple[Path, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The room holds one head of the longest context: one, or three, at a time of these."""
    monkeypatch.setattr(gpu_latents, "ROOM_BYTES", 1)
    monkeypatch.setattr(gpu_model, "ROOM_BYTES", 1)
    monkeypatch.setattr(latents, "_GATHERED", 100)
    stock, made = gpu_latents.LatentRoom.keys, []

    def keys(self: Any, attention: Any, table: Tensor, tokens: int, heads: slice) -> Tensor:
        made.append((tokens, heads.stop - heads.start))
        return stock(self, attention, table, tokens, heads)

    monkeypatch.setattr(gpu_latents.LatentRoom, "keys", keys)
    engine = V2Engine(loaded.model, loaded.config, layout)
    short, long = traced(300, (200, 300)), traced(700, (650, 700), seed=2)
    engine.step({"short": 280}, new={"short": short.new})
    engine.step({"short": 20, "long": 600}, new={"long": long.new})
    engine.step({"long": 100})
    for trace in (short, long):
        assert_exact(engine, trace, deepseek[1])
    assert set(made) == {(280, 3), (280, 1), (300, 3), (300, 1), (700, 1)}


@pytest.mark.parametrize("spans", [((20, 61),), ((20, 40), (45, 61))], ids=["near", "apart"])
def test_further_hops(loaded: V2Engine, deepseek: tuple[Path, Any], spans: Any) -> None:
    """Rows are kept, and weighed layer by layer."""
    further = FurtherHops(TargetWeights.from_spans(spans).positions, hops=2)
    target = traced(100, (70, 80), (90, 100))
    spec = TraceSpec.create([TracedTarget(target.weights, further)], 100, exact_fraction=1.0)
    trace = dataclasses.replace(target, spec=spec)
    engine = V2Engine(loaded.model, loaded.config, loaded.layout)
    engine.step({"trace": 50}, new={"trace": trace.new})
    engine.step({"trace": 50})
    report = assert_exact(engine, trace, deepseek[1])
    assert len(report.later_scores) == 2
    scores, mass = report.scores, 1.0
    for later in report.later_scores:
        weights, mass = further.after(scores, mass)
        assert weights is not None
        exact = dataclasses.replace(target, weights=weights).oracle(deepseek[1])
        assert relative_l1(later, exact) < LIMIT
        scores = later


def test_a_fault_behind_the_first_part(
    loaded: V2Engine, deepseek: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was added cannot be taken back: the step's traces fail, later ones do not."""
    monkeypatch.setattr(gpu_latents, "ROOM_BYTES", 1)
    monkeypatch.setattr(gpu_model, "ROOM_BYTES", 1)
    stock = gpu_latents.LatentRoom.keys
    first, second, third = traced(300, (290, 300)), traced(40, (30, 40)), traced(40, (35, 40))
    engine = V2Engine(loaded.model, loaded.config, loaded.layout)
    with monkeypatch.context() as patch:

        def keys(self: Any, attention: Any, table: Tensor, tokens: int, heads: slice) -> Tensor:
            if heads.start == 3:
                raise RuntimeError("no more heads")
            return stock(self, attention, table, tokens, heads)

        patch.setattr(gpu_latents.LatentRoom, "keys", keys)
        engine.step(
            {"second": 40, "first": 300, "other": 5},
            new={"first": first.new, "second": second.new, "other": untraced(9, 1)},
        )
    for trace in (first, second):
        with pytest.raises(TraceError, match="no more heads"):
            engine.report(trace)
    engine.step({"third": 40, "other": 4}, new={"third": third.new})
    assert_exact(engine, third, deepseek[1])


def _cached(change: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    stock = latents._cached
    return lambda patch: patch.setattr(latents, "_cached", lambda *args: change(*stock(*args)))


def _projections(change: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    stock = latents.up_projections
    return lambda patch: patch.setattr(
        latents, "up_projections", lambda attention: change(*stock(attention))
    )


def _scaled(factor: float) -> Callable[[pytest.MonkeyPatch], None]:
    def form(layer: Any) -> AttentionForm:
        return AttentionForm(scale=float(layer.attention.impl.scale) * factor)

    return lambda patch: patch.setattr(gpu_model, "latent_form", form)


FAULTS = {
    "W_UK of other heads": _projections(lambda keys, values: (keys.flip(0), values)),
    "W_UV of other heads": _projections(lambda keys, values: (keys, values.flip(0))),
    "W_UV 0.1 % too large": _projections(lambda keys, values: (keys, values * 1.001)),
    "rotated part of the keys": _cached(lambda latents, rotated: (latents, rotated * 0)),
    "latents of the next token": _cached(lambda latents, rotated: (latents.roll(1, 0), rotated)),
    "scale 1 % too large": _scaled(1.01),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_proof_sees(loaded: V2Engine, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = V2Engine(loaded.model, loaded.config, loaded.layout)
    FAULTS[fault](monkeypatch)
    refusal = proof(engine)["refusal"]
    assert refusal is not None and "the proof at the start failed in layer 0" in refusal
    print(f"{fault}: {refusal}")


@pytest.mark.parametrize("backend", ["TRITON_MLA", "FLASH_ATTN_MLA"])
def test_quantised_weights(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up- and output projection; on the second backend chunks decode, with other matrices."""
    scheme = SCHEMES["compressed-tensors W4A16"]
    folder, model = make_quantized_model(scheme, tmp_path, torch.float32, "deepseek_v3")
    reference = as_float64(model)
    first, second = traced(150, (90, 150)), traced(70, (20, 24), (60, 70), seed=3)
    monkeypatch.setattr(latents, "_PROJECTED", 32)
    with (
        kernels_that_run_here(torch.float32),
        v2_engine(folder, monkeypatch, backend, block_size=16) as engine,
    ):
        report = proof(engine)
        assert report["refusal"] is None and report["largest_error"] < 1e-5, report
        assert report["found"]["up_projection_quantization"] == ["compressed-tensors WNA16"]
        new = {"first": first.new, "second": second.new, "other": untraced(60, 1)}
        engine.step({"other": 20, "second": 40, "first": 100}, new=new)
        engine.step({"other": 1, "second": 30, "first": 49})
        engine.step({"other": 1, "first": 1})
        for trace in (first, second):
            scores = assert_exact(engine, trace, reference).scores
            print(f"{backend}: {relative_l1(scores, trace.oracle(reference)):.1e}")


def test_latents_that_are_rounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that decode would have others than those that prefill."""
    folder, _ = make_quantized_model(
        SCHEMES["FP8 in blocks"], tmp_path, torch.float32, "deepseek_v3"
    )
    with (
        kernels_that_run_here(torch.float32),
        v2_engine(folder, monkeypatch, "TRITON_MLA", block_size=16) as engine,
    ):
        assert "an up-projection of latents that rounds them (FP8 in blocks)" in refusal(engine)


def test_adapters_have_matrices_of_their_own(
    loaded: V2Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, weights = GPUTracedModel(loaded.model, loaded.config, CPU), []
    monkeypatch.setattr(
        gpu_latents.LatentRoom,
        "replace_by_proximities",
        lambda _, layer, index, weight, traces: weights.append(weight),
    )
    model.layers = [dataclasses.replace(layer, adapters=layer.block) for layer in model.layers]
    monkeypatch.setattr(traced_model, "added_weight", lambda *_: torch.full((128, 192), 0.5))
    model.replace_by_proximities([], [], 3)
    for one, layer in zip(weights, model.layers, strict=True):
        torch.testing.assert_close(one, layer.out_proj.weight + 0.5)


def refusal(loaded: V2Engine) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        GPUTracedModel(loaded.model, loaded.config, CPU)
    return caught.value.message


def attention_layers(loaded: V2Engine) -> list[Any]:
    context = loaded.config.compilation_config.static_forward_context
    return [layer for layer in context.values() if isinstance(layer, MLAAttention)]


def _named(name: str) -> Any:
    return SimpleNamespace(get_name=lambda: name)


REFUSED: dict[str, tuple[str, Any, str]] = {
    **{
        name: ("attn_backend", _named(name), f"latent attention (MLA) on the {name} backend")
        for name in ("CPU_MLA", "FLASHMLA_SPARSE", "FLASHINFER_MLA_SPARSE", "TOKENSPEED_MLA",
                     "ROCM_AITER_MLA")
    },
    "latents of 16 bits": ("kv_cache", torch.zeros(3, 16, 576, dtype=torch.bfloat16),
                           "latents of KV cache dtype auto"),
    "latents of bytes": ("kv_cache", torch.zeros(3, 16, 656, dtype=torch.uint8),
                         "latents of KV cache dtype auto"),
    "shape": ("kv_cache", torch.zeros(3, 16, 640), "a cache of latents of shape (3, 16, 640)"),
    "scales": ("_k_scale_float", 0.5, "for a KV cache that is not quantized"),
    "sparse": ("use_sparse", True, "sparse attention"),
    "window": ("sliding_window", 128, "a sliding window of latent attention"),
    "head size": ("qk_head_dim", 88, "queries of 88 numbers a head in latent attention"),
    "non-causal": ("non_causal_multi_token_decode", True, "non-causal attention"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(loaded: V2Engine, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, value, feature = REFUSED[case]
    for layer in attention_layers(loaded):
        monkeypatch.setattr(layer, name, value)
    assert feature in refusal(loaded)


@pytest.mark.parametrize("dtype", ["fp8", "fp8_e4m3", "fp8_ds_mla", "nvfp4_ds_mla"])
def test_quantized_latents(loaded: V2Engine, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in attention_layers(loaded):
        monkeypatch.setattr(layer, "kv_cache_dtype", dtype)
        monkeypatch.setattr(layer, "kv_cache", torch.zeros(3, 16, 576, dtype=torch.uint8))
    assert f"KV cache dtype {dtype}" in refusal(loaded)


def test_latent_attention_in_some_layers(loaded: V2Engine) -> None:
    model = GPUTracedModel(loaded.model, loaded.config, CPU)
    other = dataclasses.replace(model.layers[1], attention=nn.Identity())
    model.layers = [model.layers[0], other]
    with pytest.raises(UnsupportedModelError, match="latent attention in some of the layers"):
        model._latent_room()


def test_nothing_made_of_weights_outlives_them(
    loaded: V2Engine, deepseek: tuple[Path, Any]
) -> None:
    """The layer decodes with copies of its weights, so only prefilled rows follow new ones."""
    engine = V2Engine(loaded.model, loaded.config, loaded.layout)
    first, second = traced(90, (70, 90)), traced(90, (70, 90), seed=2)
    engine.step({"first": 90}, new={"first": first.new})
    assert_exact(engine, first, deepseek[1])
    ours = loaded.model.model.layers[1].self_attn.mla_attn.kv_b_proj.weight
    theirs = deepseek[1].model.layers[1].self_attn.kv_b_proj.weight
    before = ours.data.clone(), theirs.data.clone()
    try:
        ours.data.copy_(before[0].flip(1)), theirs.data.copy_(before[1].flip(1))
        engine.step({"second": 90}, new={"second": second.new})
        assert_exact(engine, second, deepseek[1])
    finally:
        ours.data.copy_(before[0]), theirs.data.copy_(before[1])
