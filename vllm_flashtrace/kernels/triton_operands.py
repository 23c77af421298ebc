"""Queries, keys and values inside a Triton kernel: reading the paged cache, forming logits.

Value vectors of a request's tokens, read from the paged cache inside a kernel.

Invariant: a kernel reads only what the block table names for tokens of the request; what other
slots hold, NaN included, never reaches a result. Values are widened, never rounded.

What makes logits of dot products inside a kernel, and which tiles the kernels work in.

Invariant: both kernels over attention make the same logits, so a weight never exceeds one by more
than rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_flashtrace.core.attention import AttentionForm
from vllm_flashtrace.kernels.target_rows import PagedRows

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


LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def operands_of(query: Tensor, key_cache: Tensor) -> Operands:
    """How queries are multiplied with keys; float16 holds eight-bit floats exactly."""
    dtype = torch.float16 if query.dtype in EIGHT_BIT_FORMATS else query.dtype
    return Operands.choose(key_cache.dtype, dtype, query.shape[2])


def tile_key(operands: Operands) -> tuple[int, int]:
    """What tiles are chosen by: bytes of an operand and padded head size, at least 64."""
    return operands.dtype.itemsize, max(64, operands.padded_dim)


def common_arguments(
    query: Tensor, key_cache: Tensor, rows: PagedRows, form: AttentionForm
) -> tuple[Any, ...]:
    """What both kernels take first, in the order of their parameters."""
    tables = rows.on_device
    nothing = tables.log_weights  # A pointer that is not followed.
    return (
        _stored(query),
        *query.stride(),
        _stored(key_cache),
        *key_cache.stride(),
        tables.block_tables,
        tables.block_tables.stride(0),
        tables.rows,
        tables.positions,
        nothing if form.alibi_slopes is None else form.alibi_slopes,
        form.scale * LOG2E.value / (form.soft_cap or 1.0),
        form.soft_cap,
    )


def common_constants(
    query: Tensor, key_cache: Tensor, rows: PagedRows, form: AttentionForm, operands: Operands
) -> dict[str, Any]:
    """Compile-time numbers of both kernels."""
    return {
        "SHARED": rows.num_heads // rows.num_kv_heads,
        "HEAD_DIM": query.shape[2],
        "PADDED_DIM": operands.padded_dim,
        "BLOCK_SIZE": key_cache.shape[2],
        "WINDOW": window_of(form),
        "HAS_CAP": form.soft_cap > 0,
        "HAS_ALIBI": form.alibi_slopes is not None,
        "EIGHT_BIT": EIGHT_BIT_FORMATS.get(key_cache.dtype, ""),
        "EIGHT_BIT_QUERY": EIGHT_BIT_FORMATS.get(query.dtype, ""),
        "OPERANDS": operands.triton_type,
        "PRECISION": operands.precision,
    }


def window_of(form: AttentionForm) -> int:
    """The sliding window, 0 for none."""
    return form.sliding_window or 0


def _stored(tensor: Tensor) -> Tensor:
    """Eight-bit floats go as bytes: which of them a compiler knows depends on the GPU."""
    return tensor.view(torch.uint8) if tensor.dtype in EIGHT_BIT_FORMATS else tensor


@triton.jit
def load_queries(
    query,
    stride_token,
    stride_head,
    stride_dim,
    places,
    heads,
    valid,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
):
    """Query vectors of the step's tokens at `places`, zero where not `valid`."""
    dims = tl.arange(0, PADDED_DIM)
    offsets = places.to(tl.int64) * stride_token + heads * stride_head
    mask = valid[:, None] & (dims < HEAD_DIM)[None, :]
    stored = tl.load(query + offsets[:, None] + dims[None, :] * stride_dim, mask=mask, other=0)
    return widen(stored, EIGHT_BIT)


@triton.jit
def unit_of(scale, HAS_CAP: tl.constexpr, HAS_ALIBI: tl.constexpr):
    """What `shaped_logits` is to be multiplied with to give logits to base 2."""
    return 1.0 if HAS_CAP or HAS_ALIBI else scale


@triton.jit
def shaped_logits(dots, scale, soft_cap, HAS_CAP: tl.constexpr):
    """Dot products, capped if there is a cap; `scale` and cap as `common_arguments` gives them.

    Without a cap the factor is left to the subtraction that follows, which then costs no more.
    """
    logits = dots
    if HAS_CAP:
        # tanh by the exponential: an overflow gives 1, as it should.
        logits = (soft_cap * LOG2E) * (1 - 2 / (tl.exp2(dots * (2 * scale)) + 1))
    return logits


@triton.jit
def masked_logits(
    dots,
    distances,
    slopes,
    scale,
    soft_cap,
    WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
):
    """As `shaped_logits`, and ``-inf`` where a query does not see a key.

    `distances` says how many tokens a key lies behind its query.
    """
    logits = shaped_logits(dots, scale, soft_cap, HAS_CAP)
    if HAS_ALIBI:
        logits = logits if HAS_CAP else logits * scale
        logits -= (slopes * LOG2E) * distances.to(tl.float32)
    visible = distances >= 0
    if WINDOW > 0:
        visible &= distances < WINDOW
    return tl.where(visible, logits, float("-inf"))


def on_device_of(tensor: Tensor) -> Any:
    """Makes a tensor's device the current one; does nothing off CUDA."""
    return torch.cuda.device_of(tensor)
