"""Keys and values are read back from the paged cache exactly as vLLM wrote them."""

from __future__ import annotations

import pytest
import torch

from tests.quantized_models import truncated

KV_HEADS, NUM_BLOCKS = 2, 6


EIGHT_BITS = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_size", [32, 64, 80, 128, 256])
@pytest.mark.parametrize("block_size", [32, 128, 512])
@pytest.mark.parametrize("block_ids", [[4, 1, 3], [2, 3, 4], [4, 0, 1]])
def test_what_was_written_is_read(
    dtype: torch.dtype, head_size: int, block_size: int, block_ids: list[int]
) -> None:
    read_back("auto", dtype, head_size, block_size, block_ids)


@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="vLLM stores it with AVX-512 only")
@pytest.mark.parametrize("name", EIGHT_BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_size", [32, 128])
def test_eight_bits(name: str, dtype: torch.dtype, head_size: int) -> None:
    read_back(name, dtype, head_size, 128, [4, 1, 3])


def read_back(
    name: str, dtype: torch.dtype, head_size: int, block_size: int, block_ids: list[int]
) -> None:
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    from vllm_flashtrace.worker.cpu_cache import (
        Scratch,
        learn_block_order,
        read_keys,
        read_values,
    )

    isa = _get_attn_isa(dtype, block_size, head_size, name)
    stored = EIGHT_BITS.get(name, dtype)
    k_scale, v_scale = (1.0, 1.0) if name == "auto" else (0.5, 2.0)
    length = 2 * block_size + 7
    blocks = torch.tensor(block_ids)
    keys = torch.randn(length, KV_HEADS, head_size).to(dtype)
    values = torch.randn(length, KV_HEADS, head_size).to(dtype)
    shape = (NUM_BLOCKS, KV_HEADS, block_size, 2 * head_size)
    cache = torch.zeros(shape, dtype=dtype if name == "auto" else torch.uint8)
    halves = cache.view(NUM_BLOCKS, KV_HEADS, 2 * block_size, head_size).chunk(2, dim=2)
    positions = torch.arange(length)
    slots = blocks[positions // block_size] * block_size + positions % block_size
    ops.cpu_attn_reshape_and_cache(
        keys, values, *halves, slots, isa, k_scale=k_scale, v_scale=v_scale, kv_cache_dtype=name
    )

    scratch = Scratch()
    cached = None if name == "auto" else (name, stored)
    orders = learn_block_order(isa, dtype, block_size, head_size, cached)
    read = read_keys(cache.view(stored), block_ids, length, orders, scratch)
    assert read.dtype == torch.float32
    if name != "auto":
        keys, values = truncated(keys / k_scale, stored), truncated(values / v_scale, stored)
    assert torch.equal(read, keys.float().permute(1, 2, 0))
    read = read_values(cache.view(stored), block_ids, length, orders, scratch)
    assert torch.equal(read, values.float())
