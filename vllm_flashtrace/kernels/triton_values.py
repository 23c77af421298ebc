"""Value vectors of a request's tokens, read from the paged cache inside a kernel.

Invariant: a kernel reads only what the block table names for tokens of the request; what other
slots hold, NaN included, never reaches a result. Values are widened, never rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

EIGHT_BIT_FORMATS = {torch.float8_e4m3fn: "e4m3fn", torch.float8_e5m2: "e5m2"}
_TRITON_TYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}


@dataclass(frozen=True, slots=True)
class Operands:
    """How rows of values are multiplied with columns of ``W_O``.

    Attributes:
        dtype: Type of the factors, which holds both exactly.
        precision: How products of float32 are taken (`tl.dot`'s ``input_precision``).
        padded_dim: Head size rounded up to a power of two.
    """

    dtype: torch.dtype
    precision: str
    padded_dim: int

    @classmethod
    def choose(cls, values: torch.dtype, weight: torch.dtype, head_dim: int) -> Operands:
        """Sixteen-bit factors where they are exact, else float32 at no less than its precision."""
        padded_dim = max(16, triton.next_power_of_2(head_dim))
        if weight in (torch.bfloat16, torch.float16) and values in (weight, *EIGHT_BIT_FORMATS):
            return cls(weight, "ieee", padded_dim)
        return cls(torch.float32, "ieee" if values == weight else "tf32x3", padded_dim)

    @property
    def triton_type(self) -> tl.dtype:
        """`dtype` as a kernel takes it."""
        return _TRITON_TYPES[self.dtype]


@dataclass(frozen=True, slots=True)
class PagedValues:
    """One request's values of one layer.

    Attributes:
        cache: ``[num_blocks, G, block_size, d]``, any strides.
        block_table: int32, ids of the request's blocks.
        scale: Factor on what the cache holds.
    """

    cache: Tensor
    block_table: Tensor
    scale: float

    def arguments(self) -> tuple[Any, ...]:
        """What the kernels take first: ``cache, block_table, scale`` and four strides.

        Eight-bit floats go as bytes: which of them a compiler knows depends on the GPU.
        """
        cache = self.cache.view(torch.uint8) if self.eight_bit else self.cache
        return (cache, self.block_table, float(self.scale), *cache.stride())

    @property
    def eight_bit(self) -> str:
        """The format where the cache holds eight-bit floats, else empty; see `widen`."""
        return EIGHT_BIT_FORMATS.get(self.cache.dtype, "")


@triton.jit
def load_values(
    cache,
    block_table,
    stride_block,
    stride_group,
    stride_slot,
    stride_dim,
    group,
    tokens,
    valid,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
):
    """Value vectors of `tokens` as cached, zero where not `valid`: ``[tokens, PADDED_DIM]``."""
    dims = tl.arange(0, PADDED_DIM)
    block = tl.load(block_table + tokens // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
    rows = block * stride_block + group.to(tl.int64) * stride_group
    rows += (tokens % BLOCK_SIZE).to(tl.int64) * stride_slot
    mask = valid[:, None] & (dims < HEAD_DIM)[None, :]
    stored = tl.load(cache + rows[:, None] + dims[None, :] * stride_dim, mask=mask, other=0)
    return widen(stored, EIGHT_BIT)


@triton.jit
def widen(stored, EIGHT_BIT: tl.constexpr):
    """Bytes of an eight-bit float format as float16, which holds both; other types as they are."""
    if EIGHT_BIT == "e5m2":
        result = (stored.to(tl.uint16) << 8).to(tl.float16, bitcast=True)
    elif EIGHT_BIT == "e4m3fn":
        magnitude = stored.to(tl.uint16) & 0x7F
        # No infinity; the exponent's bias is smaller by eight.
        bits = tl.where(magnitude == 0x7F, 0x7FFF, magnitude << 7)
        bits |= (stored.to(tl.uint16) & 0x80) << 8
        result = bits.to(tl.uint16).to(tl.float16, bitcast=True) * 256
    else:
        result = stored
    return result
