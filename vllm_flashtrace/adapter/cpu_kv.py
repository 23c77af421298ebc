"""Reads keys and values out of the CPU backend's paged cache.

Invariant: what is read equals what the attention layer wrote, element by element.

The CPU attention kernels keep a block as two halves, K then V, each ``block_size * head_size``
elements in an order that depends on the instruction set, the dtype and the sizes. The order is not
public. It is learned instead: a scratch block is written through vLLM's own cache-write operator
with values that encode their own index, and read back raw.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from vllm import _custom_ops as ops

from vllm_flashtrace.errors import UnsupportedModelError

# Every cache dtype that is read (float32, float16, bfloat16) holds these integers exactly.
_DIGIT = 128


@dataclass(frozen=True, slots=True)
class BlockOrder:
    """Where element ``(position, dim)`` of a block lies, for K and for V.

    Attributes:
        keys: int64 ``[block_size * head_size]``; entry ``p * head_size + d`` is an offset.
        values: The same for the V half.
    """

    keys: torch.Tensor
    values: torch.Tensor


@functools.cache
def learn_block_order(isa: str, dtype: torch.dtype, block_size: int, head_size: int) -> BlockOrder:
    """Learns the element order of a cache block.

    Raises:
        UnsupportedModelError: The read-back is not a permutation.
    """
    size = block_size * head_size
    index = torch.arange(size)
    code = torch.zeros(2, size, dtype=torch.int64)
    place = 1
    while place < size:
        digit = (index // place) % _DIGIT
        code += place * _write_and_read_raw(digit, isa, dtype, block_size, head_size)
        place *= _DIGIT
    orders = []
    for half in code:
        order = torch.full((size,), -1, dtype=torch.int64)
        valid = (half >= 0) & (half < size)
        order[half[valid]] = index[valid]
        if bool((order < 0).any()):
            raise UnsupportedModelError(
                f"the KV cache layout of the CPU kernel {isa!r} ({dtype}, block size {block_size}, "
                f"head size {head_size}) could not be learned"
            )
        orders.append(order)
    return BlockOrder(keys=orders[0], values=orders[1])


def read_blocks(
    kv_cache: torch.Tensor, block_ids: torch.Tensor, length: int, order: BlockOrder, *, keys: bool
) -> torch.Tensor:
    """Gathers the first ``length`` tokens of a request from its blocks.

    Args:
        kv_cache: A layer's cache, ``[num_blocks, G, block_size, 2 * head_size]``.
        block_ids: int64 ``[ceil(length / block_size)]``.
        length: Number of tokens.
        order: Element order of a block.
        keys: Read K if true, else V.

    Returns:
        ``[length, G, head_size]`` in the cache's dtype.
    """
    num_blocks, num_kv_heads, block_size, double = kv_cache.shape
    head_size = double // 2
    halves = kv_cache.view(num_blocks, num_kv_heads, 2, block_size * head_size)
    raw = halves[block_ids, :, 0 if keys else 1]
    plain = raw[..., order.keys if keys else order.values]
    plain = plain.view(-1, num_kv_heads, block_size, head_size)
    return plain.permute(0, 2, 1, 3).reshape(-1, num_kv_heads, head_size)[:length]


def _write_and_read_raw(
    digit: torch.Tensor, isa: str, dtype: torch.dtype, block_size: int, head_size: int
) -> torch.Tensor:
    """Writes one block of codes through vLLM and returns both halves raw, int64 ``[2, size]``."""
    block = torch.zeros(1, 1, 2 * block_size, head_size, dtype=dtype)
    key_cache, value_cache = block.chunk(2, dim=2)
    codes = digit.view(block_size, 1, head_size).to(dtype).contiguous()
    ops.cpu_attn_reshape_and_cache(
        codes,
        codes,
        key_cache,
        value_cache,
        torch.arange(block_size),
        isa,
        k_scale=1.0,
        v_scale=1.0,
        kv_cache_dtype="auto",
    )
    return block.view(2, block_size * head_size).float().round().to(torch.int64)
