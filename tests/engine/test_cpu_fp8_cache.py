"""Keys and values that the CPU backend caches as eight-bit floats."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import oracle
from tests.engine.harness import (
    TARGET,
    TOKENS,
    Engine,
    TraceJob,
    relative_l1,
    tiny_folder,
)
from tests.engine.test_start_proof import LAYER, LIMIT, decoder, proven
from tests.oracle import oracle_scores
from tests.quantized_models import truncated
from vllm_flashtrace.base.errors import UnsupportedModelError
from vllm_flashtrace.worker import cpu_model
from vllm_flashtrace.worker.gpu_cache import CacheScales
from vllm_flashtrace.worker.runner import runner_model

pytestmark = pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM stores eight bits with AVX-512 only"
)

SCALES = {"_k_scale": 0.0125, "_v_scale": 0.024}

folder = tiny_folder("llama")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with served(folder, "fp8", "float32") as engine:
        yield engine


@contextmanager
def served(folder: Path, name: str, dtype: str) -> Iterator[Engine]:
    engine = Engine(
        folder,
        f"{name} cache",
        in_process=True,
        max_model_len=1024,
        max_num_batched_tokens=160,
        kv_cache_dtype=name,
        dtype=dtype,
    )
    engine.on_worker(set_scales)
    try:
        yield engine
    finally:
        engine.close()


def scales(layer: int) -> list[float]:
    return [scale * (1 + layer / 4) for scale in SCALES.values()]


def set_scales(worker: Any) -> None:
    """As a checkpoint may have them, another for each layer."""
    context = worker.vllm_config.compilation_config.static_forward_context
    for index, layer in enumerate(context.values()):
        for name, scale in zip(SCALES, scales(index), strict=True):
            getattr(layer, name).fill_(scale)
            setattr(layer, f"{name}_float", scale)


def expected(model: Any, kind: torch.dtype) -> Tensor:
    """The oracle's scores of a model whose keys and values are turned into eight bits."""
    stock, layer = oracle._attention, iter(range(100))

    def rounded(numbers: Tensor, scale: float) -> Tensor:
        return truncated(numbers / scale, kind).to(numbers.dtype) * scale

    def attention(query: Tensor, key: Tensor, *others: Any) -> Any:
        return stock(query, rounded(key, scales(next(layer))[0]), *others)

    def rounds(index: int) -> Callable[..., Tensor]:
        return lambda _, args, output: rounded(output, scales(index)[1])

    hooks = [
        decoder.self_attn.v_proj.register_forward_hook(rounds(index))
        for index, decoder in enumerate(model.model.layers)
    ]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(oracle, "_attention", attention)
            return oracle_scores(model, TOKENS, TARGET.positions, TARGET.weights)
    finally:
        for hook in hooks:
            hook.remove()


# First, since there is one such engine at a time.
@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_bits_of_fraction(folder: Path, reference: Any, dtype: str) -> None:
    with served(folder, "fp8_e5m2", dtype) as engine:
        report = proven(engine)
        assert report["refusal"] is None
        scores = engine.trace(TraceJob(TOKENS, TARGET)).scores
    error = relative_l1(scores, expected(reference, torch.float8_e5m2))
    print(f"fp8_e5m2, {dtype}: {report['largest_error']:.1e}, {error:.1e}")
    assert error <= (3e-2 if dtype == "float32" else 0.1)


def test_scores(engine: Engine, reference: Any) -> None:
    """In chunks. What float32 takes to another number of eight bits changes others behind it."""
    report = proven(engine)
    assert report["refusal"] is None and report["found"]["kv_cache"] == ["fp8"]
    assert report["limit"] == LIMIT and report["largest_error"] < LIMIT / 10
    scores = engine.trace(TraceJob(TOKENS, TARGET)).scores
    error = relative_l1(scores, expected(reference, torch.float8_e4m3fn))
    exact = oracle_scores(reference, TOKENS, TARGET.positions, TARGET.weights)
    unrounded = relative_l1(scores, exact)
    print(f"{report['largest_error']:.1e}, {error:.1e}, from unrounded {unrounded:.1e}")
    assert error <= 3e-2 < unrounded


BREAKS: dict[str, Callable[[CacheScales], CacheScales]] = {
    "scale of the keys 1 % too large": lambda s: replace(s, key=s.key * 1.01),
    "scale of the values 1 % too large": lambda s: replace(s, value=s.value * 1.01),
    "scales of each other": lambda s: replace(s, key=s.value, value=s.key),
    "no scales": lambda s: CacheScales(),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_wrong_scale_is_seen(engine: Engine, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, stock = decoder(engine).self_attn.attn, cpu_model._scales

    def read(attention: Any) -> CacheScales:
        found = stock(attention)
        return BREAKS[name](found) if attention is layer else found

    monkeypatch.setattr(cpu_model, "_scales", read)
    report = proven(engine)
    print(f"| {name} | {report['largest_error']:.2g} |")
    assert f"failed in layer {LAYER} (" in report["refusal"]
    assert report["largest_error"] > 5 * LIMIT


def test_numbers_of_another_type_are_seen(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_model, "quantized_dtype", lambda attention: torch.float8_e5m2)
    report = proven(engine)
    print(f"| two bits of fraction for three | {report['refusal']} |")
    assert report["refusal"] is not None and report["largest_error"] is None


def test_scales_per_head_are_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = decoder(engine).self_attn.attn
    monkeypatch.setattr(layer, "_k_scale", torch.ones(2))
    assert "KV cache scales per head" in engine.on_worker(refusal)


def refusal(worker: Any) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        runner_model(worker.model_runner)
    return caught.value.message
