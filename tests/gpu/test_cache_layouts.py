"""Whole traces in every layout of the KV cache that vLLM may give a backend."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.v1.kv_cache_layout import KVCacheLayout

from tests.gpu.standin import BACKENDS
from tests.gpu.v2_engine import (
    V2Engine,
    apply_patches,
    assert_exact,
    exact_error,
    traced,
    untraced,
    v2_engine,
)
from tests.measured import Measured
from tests.tiny_models import FAMILY_NAMES

LAYOUTS = pytest.mark.parametrize("layout", list(KVCacheLayout), ids=lambda layout: layout.name)


@pytest.fixture(scope="module", autouse=True)
def _patched() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        apply_patches(patch)
        yield


@pytest.fixture(scope="module", params=sorted(BACKENDS))
def loaded(request: pytest.FixtureRequest, tiny_llama: Path) -> Iterator[V2Engine]:
    """A model on each backend."""
    with (
        pytest.MonkeyPatch.context() as patch,
        v2_engine(tiny_llama, patch, request.param) as engine,
    ):
        yield engine


@pytest.fixture(scope="module")
def split(tiny_llama: Path) -> Iterator[V2Engine]:
    """A model whose backend, FlashInfer, reads blocks of 128 tokens as two of 64."""
    with (
        pytest.MonkeyPatch.context() as patch,
        v2_engine(tiny_llama, patch, "FLASHINFER", block_size=128) as engine,
    ):
        yield engine


def in_layout(loaded: V2Engine, layout: KVCacheLayout, monkeypatch: pytest.MonkeyPatch) -> V2Engine:
    return V2Engine(loaded.model, loaded.config, layout)


@LAYOUTS
def test_every_backend(
    loaded: V2Engine,
    layout: KVCacheLayout,
    float64_llama: Any,
    monkeypatch: pytest.MonkeyPatch,
    measured: Measured,
    request: pytest.FixtureRequest,
) -> None:
    """Two chunks, with another request before and between them."""
    engine, trace = in_layout(loaded, layout, monkeypatch), traced(90, (50, 75), (80, 84))
    engine.step({"other": 5}, new={"other": untraced(60, 1)})
    engine.step({"trace": 61, "other": 7}, new={"trace": trace.new})
    engine.step({"other": 11, "trace": 29})
    error = exact_error(engine, trace, float64_llama)
    if layout is KVCacheLayout.LBNHC:  # That of vLLM.
        measured("gpu_backends", request.node.callspec.params["loaded"], llama=error)
        measured("families", FAMILY_NAMES["llama"], gpu="adapter")


def test_layouts_differ_in_memory(loaded: V2Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six layouts are six ways for a layer's cache to lie in memory."""
    strides = set()
    for layout in KVCacheLayout:
        in_layout(loaded, layout, monkeypatch)
        context = loaded.config.compilation_config.static_forward_context
        strides.add(next(iter(context.values())).kv_cache.stride())
    assert len(strides) == len(KVCacheLayout)


@pytest.mark.parametrize(
    "layout", [KVCacheLayout.LBHNC, KVCacheLayout.LBNHC], ids=lambda layout: layout.name
)
def test_blocks_that_kernels_split(
    split: V2Engine, layout: KVCacheLayout, float64_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM splits blocks only where they are dense."""
    engine, trace = in_layout(split, layout, monkeypatch), traced(300, (140, 150), (260, 300))
    [group] = engine.runner.attn_groups[0]
    assert (group.kv_cache_spec.block_size, group.kernel_block_size) == (128, 64)
    engine.step({"other": 20}, new={"other": untraced(40, 1)})
    engine.step({"other": 3, "trace": 200}, new={"trace": trace.new})
    engine.step({"trace": 100})
    assert_exact(engine, trace, float64_llama)
