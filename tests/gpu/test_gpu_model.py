"""How CUDA layers form attention weights, read from implementations as vLLM builds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import set_current_vllm_config

from tests.gpu.standin import BACKENDS, CPU
from tests.gpu.v2_engine import V2Engine, v2_engine
from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.kernels import AttentionForm, SumsTouchedError
from vllm_flashtrace.worker import gpu_model, traced_model
from vllm_flashtrace.worker.clock import HostClock
from vllm_flashtrace.worker.gpu_cache import cache_scales
from vllm_flashtrace.worker.gpu_model import GPUTracedModel, gpu_attention_form

SCALE = 0.3
SLOPES = [0.5, 0.25, 0.125, 0.0625]


@pytest.fixture(scope="module", params=sorted(BACKENDS))
def loaded(request: pytest.FixtureRequest, tiny_llama: Path) -> Iterator[V2Engine]:
    with (
        pytest.MonkeyPatch.context() as patch,
        v2_engine(tiny_llama, patch, request.param) as engine,
    ):
        # FlashAttention asks the device whether it can do these.
        module = "vllm.v1.attention.backends.flash_attn"
        for question in ("flash_attn_supports_sinks", "flash_attn_supports_kv_cache_dtype"):
            patch.setattr(f"{module}.{question}", lambda *args, **kwargs: True, raising=False)
        yield engine


@pytest.fixture
def layer(loaded: V2Engine) -> Any:
    context = loaded.config.compilation_config.static_forward_context
    return context["model.layers.1.self_attn.attn"]


def set_impl(loaded: V2Engine, layer: Any, patch: pytest.MonkeyPatch, **arguments: Any) -> None:
    unset = {"alibi_slopes": None, "sliding_window": None, "kv_cache_dtype": "auto"}
    with set_current_vllm_config(loaded.config):
        impl = layer.attn_backend.get_impl_cls()(4, 32, SCALE, 2, **{**unset, **arguments})
    if hasattr(impl, "process_weights_after_loading"):
        impl.process_weights_after_loading(torch.float32)
    patch.setattr(layer, "impl", impl)


def model_of(loaded: V2Engine) -> GPUTracedModel:
    return GPUTracedModel(loaded.model, loaded.config, CPU)


def form_of(loaded: V2Engine) -> AttentionForm:
    return form_of_layer(model_of(loaded).layers[1])


def form_of_layer(layer: Any) -> AttentionForm:
    return gpu_attention_form(layer, cache_scales(layer.attention))


def test_the_plain_form(loaded: V2Engine) -> None:
    form = form_of(loaded)
    assert form.is_plain and form.scale == pytest.approx(32**-0.5)


@pytest.mark.parametrize("window", [1, 2, 100])
def test_sliding_windows(
    loaded: V2Engine, layer: Any, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_impl(loaded, layer, monkeypatch, sliding_window=window)
    form = form_of(loaded)
    assert form.sliding_window == window
    # The kernels' own form of it: keys from this one on are seen.
    left, right = layer.impl.sliding_window
    assert right == 0 and form.first_visible(500) == 500 - left


def test_sinks(loaded: V2Engine, layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sinks = torch.nn.Parameter(torch.randn(4, dtype=torch.bfloat16))
    set_impl(loaded, layer, monkeypatch, sinks=sinks)
    found = form_of(loaded).sinks
    assert found is not None and found.dtype == torch.float32 and not found.requires_grad
    assert torch.equal(found, sinks.detach().float())


def test_soft_cap_and_alibi(loaded: V2Engine, layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    set_impl(loaded, layer, monkeypatch, logits_soft_cap=30.0, alibi_slopes=SLOPES)
    form = form_of_layer(model_layer(loaded, layer))
    assert form.soft_cap == 30.0 and form.scale == SCALE
    assert form.alibi_slopes is not None and form.alibi_slopes.tolist() == SLOPES


def model_layer(loaded: V2Engine, layer: Any) -> Any:
    """The layer without the checks of a whole model: FlashInfer's are refused, see there."""
    projection = loaded.model.model.layers[1].self_attn.o_proj
    return SimpleNamespace(attention=layer, out_proj=projection, chunk_size=None)


def set_scales(
    layer: Any, patch: pytest.MonkeyPatch, query: float, key: float, value: float
) -> None:
    for name, scale in (("_q_scale", query), ("_k_scale", key), ("_v_scale", value)):
        patch.setitem(layer._buffers, name, torch.tensor(scale))
        patch.setitem(layer.__dict__, f"{name}_float", scale)


def test_scales_of_an_fp8_cache(
    loaded: V2Engine, layer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores take the scales of K and of quantised queries; that of V waits for the proximity."""
    set_impl(loaded, layer, monkeypatch, kv_cache_dtype="fp8")
    monkeypatch.setattr(layer, "kv_cache_dtype", "fp8")
    set_scales(layer, monkeypatch, 0.5, 0.25, 0.125)
    monkeypatch.setattr(layer, "query_quant", None)
    assert form_of_layer(model_layer(loaded, layer)).scale == SCALE * 0.25
    monkeypatch.setattr(layer, "query_quant", object())
    model = model_of(loaded)
    reading = model._reading(1)
    assert form_of_layer(model.layers[1]).scale == SCALE * 0.25 * 0.5
    assert (reading.scales.value, reading.dtype) == (0.125, torch.float8_e4m3fn)


def test_queries_of_another_type_than_expected(loaded: V2Engine) -> None:
    query = torch.zeros(4, 4, 32).to(torch.float8_e4m3fn)
    with pytest.raises(TraceError, match=r"queries of layer 1 are torch\.float8_e4m3fn"):
        model_of(loaded).heads_of(1, query)


def test_nothing_derived_from_weights_outlives_them(
    loaded: V2Engine, layer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_impl(loaded, layer, monkeypatch, kv_cache_dtype="fp8")
    monkeypatch.setattr(layer, "kv_cache_dtype", "fp8")
    monkeypatch.setattr(layer, "query_quant", object())
    model, weight = model_of(loaded), loaded.model.model.layers[1].self_attn.o_proj.weight
    before = model.output_projection(1)
    assert before.weight.data_ptr() == weight.data_ptr() and before.column_norms is None
    assert model._reading(1).scales.value == 1
    set_scales(layer, monkeypatch, 0.5, 0.25, 0.125)
    assert model._reading(1).scales.value == 0.125
    old = weight.data
    weight.data = old * 2
    try:
        after = model.output_projection(1)
        assert after.weight.data_ptr() == weight.data_ptr() != before.weight.data_ptr()
    finally:
        weight.data = old


def test_adapters_have_matrices_of_their_own(
    loaded: V2Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call for all layers without an adapter, else one for each while its matrix lasts."""
    model, calls = model_of(loaded), []
    monkeypatch.setattr(
        gpu_model, "replace_by_proximities", lambda layers, traces: calls.append(layers)
    )
    model.replace_by_proximities([], [], None)
    model.replace_by_proximities([], [], 3)  # No adapter can change a projection of this model.
    model.layers = [dataclasses.replace(layer, adapters=layer.block) for layer in model.layers]
    changed = model.layers[2].block
    monkeypatch.setattr(
        traced_model,
        "added_weight",
        lambda adapters, *_: torch.full((128, 128), 0.5) if adapters is changed else None,
    )
    model.replace_by_proximities([], [], 3)
    assert [[one.index for one in layers] for layers in calls] == [
        [0, 1, 2, 3], [0, 1, 2, 3], [0], [1], [2], [3],
    ]  # fmt: skip
    bases = [layer.out_proj.weight for layer in model.layers]
    assert all(one.weight.data_ptr() == bases[one.index].data_ptr() for one in calls[0])
    assert all(torch.equal(calls[2 + i][0].weight, bases[i]) for i in (0, 1, 3))
    assert torch.equal(calls[4][0].weight, bases[2] + 0.5)
    with monkeypatch.context() as patch:
        patch.setattr(traced_model, "added_weight", None)
        with pytest.raises(SumsTouchedError, match="not callable"):
            model.replace_by_proximities([], [], 3)


def test_what_a_runner_asks(loaded: V2Engine) -> None:
    model = model_of(loaded)
    assert isinstance(model.clock, HostClock) and model.part.whole and model.batched
    assert model.layer_index("model.layers.3.self_attn.attn") == 3
    assert model.layer_index("draft.layers.3.self_attn.attn") is None
    assert model.accumulator_limit_bytes(5) == 5 << 20
    assert model.accumulator_limit_bytes(None) > 0
    backend = loaded.runner.attn_groups[0][0].backend
    assert backend.get_name() in BACKENDS and model.layers[0].attention.attn_backend is backend
