"""Block tables and cache views: what the adapters read is what vLLM's kernels read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)

from tests.gpu.standin import CPU, stock_halves
from tests.gpu.v2_engine import V2Engine, v2_engine
from vllm_flashtrace.base.errors import TraceError, UnsupportedModelError
from vllm_flashtrace.worker import runner as runner_v2
from vllm_flashtrace.worker.cache_groups import CacheGroups, cache_groups, keeps_blocks
from vllm_flashtrace.worker.gpu_cache import key_value_views
from vllm_flashtrace.worker.runner import kernel_block_table


@pytest.fixture(scope="module")
def loaded(tiny_llama: Path) -> Iterator[V2Engine]:
    """FlashInfer with blocks of 128 tokens, which it reads as two of 64."""
    with (
        pytest.MonkeyPatch.context() as patch,
        v2_engine(tiny_llama, patch, "FLASHINFER", block_size=128) as engine,
    ):
        yield engine


@pytest.fixture
def layer(loaded: V2Engine) -> Any:
    context = loaded.config.compilation_config.static_forward_context
    return context["model.layers.2.self_attn.attn"]


@pytest.mark.parametrize("split", [64, 32, 16])
def test_kernel_blocks_are_those_of_vllm(loaded: V2Engine, split: int) -> None:
    """The table that `AttentionGroup` puts into the metadata of a step."""
    [bound] = loaded.runner.attn_groups[0]
    group = type(bound)(bound.backend, bound.layer_names, bound.kv_cache_spec, 0)
    with set_current_vllm_config(loaded.config):
        group.create_metadata_builders(loaded.config, CPU, split)
    assert group.kernel_block_size == split
    table = torch.randperm(500)[:24].view(3, 8).int()
    ours = kernel_block_table(table, [group])
    assert ours.dtype == torch.int32
    assert torch.equal(ours, group.map_to_kernel_block_table(table))
    assert torch.equal(kernel_block_table(table[1], [group]), ours[1])


def test_blocks_that_are_not_split(loaded: V2Engine) -> None:
    [bound] = loaded.runner.attn_groups[0]
    group = type(bound)(bound.backend, bound.layer_names, bound.kv_cache_spec, 0)
    table = torch.arange(8, dtype=torch.int32).view(2, 4)
    assert kernel_block_table(table, [group]) is table


def test_views_are_those_of_the_kernels(layer: Any) -> None:
    """The same memory as the expression of the stock backends, without a copy."""
    views = key_value_views(layer, None)
    keys, values = stock_halves(layer.impl, layer.kv_cache)
    for view, stock in zip(views, (keys, values), strict=True):
        assert view.transpose(1, 2).shape == stock.shape
        assert view.transpose(1, 2).stride() == stock.stride()
        assert view.data_ptr() == stock.data_ptr()


CACHES: dict[str, tuple[torch.Tensor, str]] = {
    "padding": (torch.zeros(8, 2, 32, 72), "a KV cache of shape (8, 2, 32, 72)"),
    "heads": (torch.zeros(8, 4, 32, 64), "a KV cache of shape (8, 4, 32, 64)"),
    "K and V apart": (torch.zeros(2, 8, 32, 2, 32), "a KV cache of shape (2, 8, 32, 2, 32)"),
    "bytes": (torch.zeros(8, 2, 32, 64, dtype=torch.uint8), "a torch.uint8 KV cache"),
}


@pytest.mark.parametrize("case", CACHES)
def test_caches_at_run_time(
    loaded: V2Engine, layer: Any, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, feature = CACHES[case]
    monkeypatch.setitem(layer.__dict__, "kv_cache", cache)
    with pytest.raises(UnsupportedModelError) as caught:
        key_value_views(layer, None)
    assert feature in caught.value.message
    monkeypatch.setitem(layer.__dict__, "kv_cache", torch.zeros(8, 2, 32, 64, dtype=torch.float16))
    with pytest.raises(UnsupportedModelError, match=r"float16 KV cache for torch\.float8"):
        key_value_views(layer, torch.float8_e4m3fn)


def test_groups_of_a_cache() -> None:
    sizes = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
    full = KVCacheGroupSpec(["a"], FullAttentionSpec(**sizes))
    draft = KVCacheGroupSpec(["draft"], FullAttentionSpec(**sizes))
    windowed = KVCacheGroupSpec(["c"], SlidingWindowSpec(**sizes, sliding_window=64))
    chunked = KVCacheGroupSpec(["b"], ChunkedLocalAttentionSpec(**sizes, attention_chunk_size=16))
    layers: Any = [SimpleNamespace(name=name) for name in ("a", "c", "b")]
    groups = cache_groups(KVCacheConfig(4, [], [draft, windowed, full, chunked]), layers)
    assert (groups.numbers, groups.places) == ((1, 2, 3), (1, 0, 2))
    assert [groups.layers(place) for place in range(3)] == [[1], [0], [2]]
    every = KVCacheGroupSpec(["b"], FullAttentionSpec(**sizes, non_causal=True))
    with pytest.raises(UnsupportedModelError, match="causal attention only"):
        cache_groups(KVCacheConfig(4, [], [every]), layers[2:])
    with pytest.raises(UnsupportedModelError, match="does not hold c"):
        cache_groups(KVCacheConfig(4, [], [full]), layers)
    for blocks, fits in ((9, False), (10, False), (11, True)):  # Five each, and the empty one.
        for freeing in (windowed, chunked):
            assert keeps_blocks(KVCacheConfig(blocks, [], [full, freeing]), 64) == fits
    assert keeps_blocks(KVCacheConfig(2, [], [full]), 64)


def test_block_tables_that_are_refused(loaded: V2Engine) -> None:
    [group] = loaded.runner.attn_groups[0]
    table = torch.zeros(1, 4, dtype=torch.int32)
    half = type(group)(group.backend, ["a"], group.kv_cache_spec, 0, kernel_block_size=16)
    packed = type(group)(
        group.backend, ["a"], group.kv_cache_spec, 0, kernel_block_size=16, kernel_block_stride=8
    )
    with pytest.raises(UnsupportedModelError, match="blocks of different sizes"):
        kernel_block_table(table, [group, half])
    with pytest.raises(UnsupportedModelError, match="packed kernel blocks"):
        kernel_block_table(table, [packed])
    groups = CacheGroups((0,), (0,), frozenset(group.layer_names))
    split = SimpleNamespace(pcp_manager=object(), attn_groups=loaded.runner.attn_groups)
    with pytest.raises(UnsupportedModelError, match="prefill context parallelism"):
        list(runner_v2.batch_rows_v2(split, None, [table], groups))


def test_a_v2_batch_that_contradicts_itself(loaded: V2Engine) -> None:
    batch = SimpleNamespace(
        req_ids=["a", "b"],
        query_start_loc_np=np.array([0, 5, 9]),
        num_computed_tokens_np=np.array([0, 10]),
        num_scheduled_tokens=np.array([5, 3]),
    )
    [group] = loaded.runner.attn_groups[0]
    groups = CacheGroups((0,), (0,), frozenset(group.layer_names))
    tables = [torch.zeros(2, 4, dtype=torch.int32)]
    rows = runner_v2.batch_rows_v2(loaded.runner, batch, tables, groups)
    assert next(rows).stop == 5
    with pytest.raises(TraceError, match="request b has 4 rows for 3 tokens"):
        next(rows)
