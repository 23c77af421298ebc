"""What makes logits of dot products inside a kernel, and which tiles the kernels work in.

Invariant: both kernels over attention make the same logits, so a weight never exceeds one by more
than rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_flashtrace.core.attention_form import AttentionForm
from vllm_flashtrace.kernels.target_rows import PagedRows
from vllm_flashtrace.kernels.triton_values import EIGHT_BIT_FORMATS, Operands, widen

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
