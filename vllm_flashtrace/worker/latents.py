"""Keys and values of multi-head latent attention (MLA), made of what the cache holds.

The cache holds, for a token ``j``, its normed latent ``c_j`` and one rotated key ``p_j`` that all
heads share. Head ``h`` has the key ``[W_UK^h c_j ; p_j]`` and the value ``W_UV^h c_j``. So a layer
prefills: its queries, the scale of their products and its output are those of attention in which
every head has keys and values of its own, and so are the sums of a trace. Its decode steps multiply
query and output with the same two matrices, which changes nothing but the order of the products.

The matrices are read of the layer when they are needed, and the products rounded to the model's
type, as in the layer. Where the layer is quantised, it is applied to the latents itself, as it is
when it prefills, for all heads of some tokens, of which those that are asked for are copied: its
kernel may round them too. Its decode steps do not, since vLLM makes the two matrices of dequantised
weights for these.

Keys of all heads of a long context would take more memory than there is, so they are made for some
heads at a time, and values for some tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

CPU_LATENT_BACKEND = "CPU_MLA"
GPU_LATENT_BACKENDS = (
    "CUTLASS_MLA",
    "FLASHINFER_MLA",
    "FLASHMLA",
    "FLASH_ATTN_MLA",
    "TRITON_MLA",
)
LATENT_BACKENDS = (CPU_LATENT_BACKEND, *GPU_LATENT_BACKENDS)
"""The backends of latent attention whose caches are read."""

# Tokens that a quantised layer is applied to at a time.
_PROJECTED = 512
# Tokens whose latents are gathered at a time.
_GATHERED = 4096


def write_keys(
    attention: MLAAttention,
    block_table: Tensor,
    tokens: int,
    heads: slice,
    out: Tensor,
    *,
    one_launch: bool = False,
) -> None:
    """Makes the keys of some heads of a request's first tokens.

    Args:
        attention: The layer.
        block_table: int32 or int64, at least ``ceil(tokens / block_size)`` blocks of its cache.
        tokens: Number of tokens.
        heads: Which heads.
        out: ``[heads, >= tokens, P + R]`` of any strides, in float32 or the model's type: gets for
            every head the part without positions, then the shared rotated one.
        one_launch: Whether one product serves all heads, as suits a GPU; ``out`` is then of the
            model's type.
    """
    size = attention.qk_nope_head_dim
    quantized = up_is_quantized(attention)
    for first, last in _pieces(0, tokens):
        latents, rotated = _cached(attention, block_table, first, last)
        piece = out[:, first:last]
        if quantized:
            for some, keys, _ in projected(attention, latents):
                piece[:, some, :size] = keys[heads]
        else:
            _project(latents, up_projections(attention)[0][heads], piece[..., :size], one_launch)
        piece[..., size:] = rotated


def write_values(
    attention: MLAAttention,
    block_table: Tensor,
    first: int,
    last: int,
    out: Tensor,
    *,
    one_launch: bool = False,
) -> None:
    """Makes the values of all heads of a request's tokens from ``first`` up to ``last``.

    Args:
        attention: See `write_keys`.
        block_table: See `write_keys`.
        first: The first token.
        last: The one behind the last.
        out: ``[H, >= last - first, V]``, see `write_keys`.
        one_launch: See `write_keys`.
    """
    quantized = up_is_quantized(attention)
    for start, stop in _pieces(first, last):
        latents, _ = _cached(attention, block_table, start, stop)
        piece = out[:, start - first : stop - first]
        if quantized:
            for some, _, values in projected(attention, latents):
                piece[:, some] = values
        else:
            _project(latents, up_projections(attention)[1], piece, one_launch)


def up_projection(attention: MLAAttention) -> Any:
    """The layer that makes keys and values of latents, without adapters: vLLM applies none here."""
    layer = attention.kv_b_proj
    return getattr(layer, "base_layer", layer)


def up_is_quantized(attention: MLAAttention) -> bool:
    """Whether `up_projection` is quantised."""
    return not isinstance(up_projection(attention).quant_method, UnquantizedLinearMethod)


def projected(attention: MLAAttention, latents: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Keys and values that a quantised layer makes of latents, in its own arithmetic.

    Args:
        attention: The layer.
        latents: ``[tokens, L]``.

    Yields:
        Some of the tokens, their keys without the rotated part ``[H, n, P]``, and their values
        ``[H, n, V]``.
    """
    layer = up_projection(attention)
    sizes = [attention.qk_nope_head_dim, attention.v_head_dim]
    for first in range(0, len(latents), _PROJECTED):
        some = latents[first : first + _PROJECTED].contiguous()
        with torch.inference_mode():
            product = layer.quant_method.apply(layer, some)
        by_head = product.unflatten(1, (attention.num_heads, -1)).transpose(0, 1)
        keys, values = by_head.split(sizes, dim=2)
        yield slice(first, first + len(some)), keys, values


def up_projections(attention: MLAAttention) -> tuple[Tensor, Tensor]:
    """``W_UK`` ``[H, P, L]`` and ``W_UV`` ``[H, V, L]`` of this rank's heads as they are now."""
    weight: Tensor = up_projection(attention).weight.detach()
    by_head = weight.unflatten(0, (attention.num_heads, -1))
    keys, values = by_head.split([attention.qk_nope_head_dim, attention.v_head_dim], dim=1)
    return keys, values


def _project(latents: Tensor, up: Tensor, out: Tensor, one_launch: bool) -> None:
    """Writes ``up_h c_j`` ``[heads, tokens, size]`` of ``[tokens, L]`` and ``[heads, size, L]``."""
    if one_launch:
        torch.bmm(latents.expand(len(up), -1, -1), up.transpose(1, 2), out=out)
        return
    for own, matrix in zip(out, up, strict=True):
        # In the order in which it lies in memory, since a copy that transposes costs more.
        if own.stride(0) == 1:
            own.t().copy_(matrix @ latents.t())
        else:
            own.copy_(latents @ matrix.t())


def _pieces(first: int, last: int) -> Iterator[tuple[int, int]]:
    for start in range(first, last, _GATHERED):
        yield start, min(start + _GATHERED, last)


def _cached(
    attention: MLAAttention, block_table: Tensor, first: int, last: int
) -> tuple[Tensor, Tensor]:
    """Latents ``[tokens, L]`` and rotated keys ``[tokens, R]``, a copy of what is cached."""
    cache = attention.kv_cache  # [blocks, block_size, L + R]
    size = cache.shape[1]
    start = first // size
    blocks = cache.index_select(0, block_table[start : -(-last // size)])
    tokens = blocks.view(-1, cache.shape[2])[first - start * size : last - start * size]
    latents, rotated = tokens.split([attention.kv_lora_rank, attention.qk_rope_head_dim], dim=1)
    return latents, rotated
