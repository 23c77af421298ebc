"""Reads keys and values out of the CPU backend's paged cache.

The CPU attention kernels keep a block as two halves, K then V, each ``block_size * head_size``
elements in an order that depends on the instruction set, the dtype and the sizes. The order is not
public. It is learned instead: a scratch block is written through vLLM's own cache-write operator
with values that encode their own index, and read back raw. Every order seen so far splits positions
and dimensions into digits of fixed strides (tiles), so that reading is a view and a copy.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from vllm import _custom_ops as ops

from vllm_flashtrace.base.errors import UnsupportedModelError

# Integers below are held exactly by float32, float16 and bfloat16, and by both eight-bit floats.
_DIGIT, _DIGIT_OF_EIGHT_BITS = 128, 8


@dataclass(frozen=True, slots=True)
class BlockOrder:
    """How one half of a block is laid out.

    Attributes:
        sizes: Shape of the half as stored, outermost digit first.
        positions: Axes of ``sizes`` that make up the position, most significant first.
        dims: Axes of ``sizes`` that make up the dimension, most significant first.
    """

    sizes: tuple[int, ...]
    positions: tuple[int, ...]
    dims: tuple[int, ...]

    @classmethod
    def from_offsets(cls, offsets: torch.Tensor) -> BlockOrder | None:
        """Finds the digits of an order, or None if it has none.

        Args:
            offsets: int64 ``[block_size, head_size]``, where each element lies in the half.
        """
        if not torch.equal(offsets, offsets[:, :1] + offsets[:1]):
            return None
        positions, dims = _digits(offsets[:, 0].tolist()), _digits(offsets[0].tolist())
        if positions is None or dims is None:
            return None
        digits = sorted(positions + dims, key=lambda digit: -digit.stride)
        stride = 1
        for digit in reversed(digits):
            if digit.stride != stride:
                return None
            stride *= digit.size
        return cls(
            tuple(digit.size for digit in digits),
            tuple(digits.index(digit) for digit in positions),
            tuple(digits.index(digit) for digit in dims),
        )


@dataclass(frozen=True, slots=True)
class BlockOrders:
    """The orders of both halves of a block."""

    keys: BlockOrder
    values: BlockOrder


@functools.cache
def learn_block_order(
    isa: str,
    dtype: torch.dtype,
    block_size: int,
    head_size: int,
    cached: tuple[str, torch.dtype] | None = None,
) -> BlockOrders:
    """Learns the element order of a cache block.

    Args:
        isa: The instruction set that the kernels are chosen by.
        dtype: Type of keys and values.
        block_size: Tokens of a block.
        head_size: Numbers of a key or value.
        cached: For a cache of eight-bit floats, vLLM's name of its type, and the type.

    Raises:
        UnsupportedModelError: The read-back is not a permutation made of tiles.
    """
    size = block_size * head_size
    index = torch.arange(size)
    code = torch.zeros(2, size, dtype=torch.int64)
    place, base = 1, _DIGIT if cached is None else _DIGIT_OF_EIGHT_BITS
    while place < size:
        digit = (index // place) % base
        written = digit.view(block_size, 1, head_size).to(dtype)
        code += place * _write_and_read_raw(written, isa, cached)
        place *= base
    orders = []
    for half in code:
        offsets = torch.full((size,), -1, dtype=torch.int64)
        valid = (half >= 0) & (half < size)
        offsets[half[valid]] = index[valid]
        order = None
        if bool((offsets >= 0).all()):
            order = BlockOrder.from_offsets(offsets.view(block_size, head_size))
        if order is None:
            raise UnsupportedModelError(
                f"the KV cache layout of the CPU kernel {isa!r} ({dtype}, block size {block_size}, "
                f"head size {head_size}) could not be learned"
            )
        orders.append(order)
    return BlockOrders(keys=orders[0], values=orders[1])


class Scratch:
    """Memory that reads use one after another; fresh pages would cost more than the copy."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def take(self, *shape: int) -> torch.Tensor:
        """float32 tensor of a shape, with any contents; ends the life of the one taken before."""
        size = math.prod(shape)
        if self._memory.numel() < size:
            self._memory = torch.empty(size)
        return self._memory[:size].view(shape)

    def release(self) -> None:
        """Returns the memory."""
        self._memory = torch.empty(0)


def read_keys(
    kv_cache: torch.Tensor,
    block_ids: Sequence[int],
    length: int,
    orders: BlockOrders,
    scratch: Scratch,
) -> torch.Tensor:
    """Gathers the keys of a request's first ``length`` tokens from its blocks.

    Args:
        kv_cache: A layer's cache, ``[num_blocks, G, block_size, 2 * head_size]``, of floats of any
            width.
        block_ids: At least ``ceil(length / block_size)`` ids.
        length: Number of tokens.
        orders: Element orders of a block.
        scratch: Where the result lies.

    Returns:
        float32 ``[G, head_size, length]``, ready for a product with queries.
    """
    dims, positions = _shifted(orders.keys.dims), _shifted(orders.keys.positions)
    axes = (1, *dims, 0, *positions)
    out = _gather(kv_cache, block_ids, length, 0, orders.keys, axes, scratch)
    return out.view(kv_cache.shape[1], kv_cache.shape[3] // 2, -1)[:, :, :length]


def read_values(
    kv_cache: torch.Tensor,
    block_ids: Sequence[int],
    length: int,
    orders: BlockOrders,
    scratch: Scratch,
) -> torch.Tensor:
    """Gathers the values of a request's first ``length`` tokens; arguments as `read_keys`.

    Returns:
        float32 ``[length, G, head_size]`` that lies in memory as ``[G, length, head_size]``.
    """
    dims, positions = _shifted(orders.values.dims), _shifted(orders.values.positions)
    axes = (1, 0, *positions, *dims)
    out = _gather(kv_cache, block_ids, length, 1, orders.values, axes, scratch)
    plain = out.view(kv_cache.shape[1], -1, kv_cache.shape[3] // 2)
    return plain[:, :length].transpose(0, 1)


def _gather(
    kv_cache: torch.Tensor,
    block_ids: Sequence[int],
    length: int,
    half: int,
    order: BlockOrder,
    axes: tuple[int, ...],
    scratch: Scratch,
) -> torch.Tensor:
    """Copies halves of a request's blocks, ``[blocks, G, *sizes]``, with their axes permuted."""
    ids = block_ids[: -(-length // kv_cache.shape[2])]
    shape = (len(ids), kv_cache.shape[1], *order.sizes)
    out = scratch.take(*(shape[axis] for axis in axes))
    for first, count, start in _runs(ids):
        source = _half(kv_cache, first, count, half).unflatten(2, order.sizes).permute(axes)
        out.narrow(axes.index(0), start, count).copy_(source)
    return out


def _half(kv_cache: torch.Tensor, first: int, count: int, half: int) -> torch.Tensor:
    """Raw halves of adjacent blocks, a view ``[count, G, block_size * head_size]``."""
    num_blocks, num_kv_heads, block_size, double = kv_cache.shape
    halves = kv_cache.view(num_blocks, num_kv_heads, 2, block_size * double // 2)
    return halves[first : first + count, :, half]


def _runs(block_ids: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Runs of ids that ascend by one: ``(first id, count, place of the first)``."""
    start = 0
    for place in range(1, len(block_ids) + 1):
        if place == len(block_ids) or block_ids[place] != block_ids[place - 1] + 1:
            yield block_ids[start], place - start, start
            start = place


def _shifted(axes: tuple[int, ...]) -> tuple[int, ...]:
    """Axes of a half among ``[blocks, G, *sizes]``."""
    return tuple(axis + 2 for axis in axes)


@dataclass(frozen=True, slots=True)
class _Digit:
    size: int
    stride: int


def _digits(offsets: list[int]) -> list[_Digit] | None:
    """Writes ``offsets[i]`` as a sum of ``digit * stride``, most significant digit first."""
    if offsets[0] != 0:
        return None
    digits: list[_Digit] = []
    rest = offsets
    while len(rest) > 1:
        stride = rest[1]
        size = 2
        while size < len(rest) and rest[size] == size * stride:
            size += 1
        size = math.gcd(size, len(rest))
        if size < 2:
            return None
        digits.append(_Digit(size, stride))
        rest = rest[::size]
    digits.reverse()
    rebuilt = [0]
    for digit in reversed(digits):
        rebuilt = [i * digit.stride + low for i in range(digit.size) for low in rebuilt]
    return digits if rebuilt == offsets else None


def _write_and_read_raw(
    codes: torch.Tensor, isa: str, cached: tuple[str, torch.dtype] | None
) -> torch.Tensor:
    """Writes one block ``[block_size, 1, head_size]`` through vLLM.

    Returns:
        Both halves raw, int64 ``[2, block_size * head_size]``.
    """
    block_size, _, head_size = codes.shape
    name, stored = ("auto", codes.dtype) if cached is None else cached
    kept = codes.dtype if cached is None else torch.uint8
    block = torch.zeros(1, 1, 2 * block_size, head_size, dtype=kept)
    key_cache, value_cache = block.chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(
        codes,
        codes,
        key_cache,
        value_cache,
        torch.arange(block_size),
        isa,
        k_scale=1.0,
        v_scale=1.0,
        kv_cache_dtype=name,
    )
    halves = block.view(stored).view(2, block_size * head_size)
    return halves.float().round().to(torch.int64)
