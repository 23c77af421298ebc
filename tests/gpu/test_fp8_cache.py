"""Whole traces over an fp8 KV cache, against an oracle that works with the cache's contents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

from tests import oracle
from tests.engine.harness import relative_l1
from tests.gpu import standin
from tests.gpu.v2_engine import V2Engine, apply_patches, traced, v2_engine

LIMIT = 1e-3
SCALES = {"_q_scale": 0.0175, "_k_scale": 0.0125, "_v_scale": 0.024}


@pytest.fixture(params=["TRITON_ATTN", "FLASH_ATTN", "FLASHINFER"])
def engine(
    request: pytest.FixtureRequest, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[V2Engine]:
    if request.param == "FLASH_ATTN":
        name = "vllm.v1.attention.backends.flash_attn.flash_attn_supports_kv_cache_dtype"
        monkeypatch.setattr(name, lambda *args, **kwargs: True)
    arguments = {"kv_cache_dtype": "fp8"}
    with v2_engine(tiny_llama, monkeypatch, request.param, **arguments) as engine:
        apply_patches(monkeypatch)
        for index, layer in enumerate(layers(engine)):
            for name, scale in SCALES.items():
                scale *= 1 + index / 4
                getattr(layer, name).fill_(scale)
                setattr(layer, f"{name}_float", float(getattr(layer, name)))
        yield engine


def layers(engine: V2Engine) -> list[Any]:
    return list(engine.config.compilation_config.static_forward_context.values())


def quantize_queries(engine: V2Engine, yes: bool) -> None:
    """As ``Attention`` does, or not, by what its backend says it takes."""
    quantize = QuantFP8(static=True, group_shape=GroupShape.PER_TENSOR, compile_native=False)
    for layer in layers(engine):
        layer.impl.supports_quant_query_input = yes
        layer.query_quant = quantize if yes else None


def cached(engine: V2Engine, length: int) -> list[tuple[Tensor, Tensor]]:
    """What the cache of each layer says of the trace: K and V, float64 ``[N, G, d]``."""
    size = engine.steps.block_size
    blocks = torch.tensor(engine.steps.blocks["trace"])
    found = []
    for layer in layers(engine):
        assert layer.kv_cache.dtype == torch.uint8
        numbers = layer.kv_cache.view(torch.float8_e4m3fn).double()[blocks]
        tokens = numbers.transpose(1, 2).reshape(len(blocks) * size, *numbers.shape[1:2], -1)
        keys, values = tokens[:length].split(layer.head_size, -1)
        found.append((keys * layer._k_scale_float, values * layer._v_scale_float))
    return found


def scores_from(
    model: Any, trace: Any, cache: list[tuple[Tensor, Tensor]], queries: list[Tensor] | None
) -> Tensor:
    """The oracle's scores of a model whose attention takes K, V and maybe Q from elsewhere."""
    stock, layer = oracle._attention, iter(range(len(cache)))

    def attention(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Any:
        index = next(layer)
        if queries is not None:
            query = queries[index].transpose(0, 1)
        return stock(query, cache[index][0].transpose(0, 1), value, *others)

    hooks = [
        decoder.self_attn.v_proj.register_forward_hook(
            lambda _, args, output, values=values: values.flatten(1).view_as(output)
        )
        for decoder, (_, values) in zip(model.model.layers, cache, strict=True)
    ]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(oracle, "_attention", attention)
            return trace.oracle(model)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("engine", ["TRITON_ATTN", "FLASH_ATTN"], indirect=True)
def test_scaled_cache(engine: V2Engine, float64_llama: Any) -> None:
    """FlashInfer is not among them: see `test_gpu_model`."""
    trace = traced(100, (60, 100))
    quantize_queries(engine, False)
    engine.step({"trace": 70}, new={"trace": trace.new})
    engine.step({"trace": 30})
    scores = engine.report(trace).scores
    assert relative_l1(scores, scores_from(float64_llama, trace, cached(engine, 100), None)) < LIMIT
    assert relative_l1(scores, trace.oracle(float64_llama)) > 10 * LIMIT


def test_quantized_queries(
    engine: V2Engine, float64_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize_queries(engine, True)
    queries: list[Tensor] = []
    stock = standin.attention_kernel

    def kernel(impl: Any, layer: Any, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert query.dtype == torch.float8_e4m3fn
        queries.append(query.double() * layer._q_scale_float)
        return stock(impl, layer, query, *args, **kwargs)

    impl = type(layers(engine)[0].impl).__mro__[2]
    monkeypatch.setattr(impl, "forward", kernel)
    trace = traced(100, (60, 100))
    engine.step({"trace": 100}, new={"trace": trace.new})
    scores = engine.report(trace).scores
    expected = scores_from(float64_llama, trace, cached(engine, 100), queries)
    assert relative_l1(scores, expected) < LIMIT
