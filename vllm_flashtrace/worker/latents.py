"""Keys and values of multi-head latent attention (MLA), made of what the CPU backend caches.

The cache holds, for a token ``j``, its normed latent ``c_j`` and one rotated key ``p_j`` that all
heads share. Head ``h`` has the key ``[W_UK^h c_j ; p_j]`` and the value ``W_UV^h c_j``. So a layer
prefills: its queries, the scale of their products and its output are those of attention in which
every head has keys and values of its own, and so are the sums of a trace. Its decode steps multiply
query and output with the same two matrices, which changes nothing but the order of the products.

The matrices are read of the layer when they are needed, and the products rounded to the model's
type, as in the layer. Where the layer is quantised, it is applied to the latents itself, as it is
when it prefills: its kernel may round them too. Its decode steps do not, since vLLM makes the two
matrices of dequantised weights for these.

Keys of all heads of a long context would take more memory than there is, so they are made for some
heads at a time, and values for some tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from vllm_flashtrace.worker.cpu_cache import Scratch

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

_PROJECTED = 512
"""Tokens that a quantised layer is applied to at a time."""
# Tokens whose latents are gathered at a time.
_GATHERED = 4096


def latent_keys(
    attention: MLAAttention, block_ids: Sequence[int], length: int, scratch: Scratch, heads: slice
) -> Tensor:
    """The keys of some heads of a request's first ``length`` tokens.

    Args:
        attention: The layer.
        block_ids: At least ``ceil(length / block_size)`` ids of blocks of its cache.
        length: Number of tokens.
        scratch: Where the result lies.
        heads: Which heads.

    Returns:
        float32 ``[heads, P + R, length]``: for every head the part without positions, then the
        shared rotated one.
    """
    size = attention.qk_nope_head_dim
    quantized = up_is_quantized(attention)
    count = len(range(attention.num_heads)[heads])
    keys = scratch.take(count, attention.qk_head_dim, length)
    for first, last in _pieces(0, length):
        latents, rotated = _cached(attention, block_ids, first, last)
        piece = keys[:, :, first:last]
        if quantized:
            for tokens, own_keys, _ in projected(attention, latents):
                piece[:, :size, tokens] = own_keys[heads].transpose(1, 2)
        else:
            up = up_projections(attention)[0][heads]
            for own, matrix in zip(piece, up, strict=True):
                own[:size] = matrix @ latents.t()
        piece[:, size:] = rotated.t()
    return keys


def latent_values(
    attention: MLAAttention, block_ids: Sequence[int], first: int, last: int, scratch: Scratch
) -> Tensor:
    """The values of a request's tokens from ``first`` up to ``last``; arguments as `latent_keys`.

    Returns:
        float32 ``[tokens, H, V]`` that lies in memory as ``[H, tokens, V]``.
    """
    quantized = up_is_quantized(attention)
    values = scratch.take(attention.num_heads, last - first, attention.v_head_dim)
    for start, stop in _pieces(first, last):
        latents, _ = _cached(attention, block_ids, start, stop)
        piece = values[:, start - first : stop - first]
        if quantized:
            for tokens, _, own_values in projected(attention, latents):
                piece[:, tokens] = own_values
        else:
            for own, matrix in zip(piece, up_projections(attention)[1], strict=True):
                own.copy_(latents @ matrix.t())
    return values.transpose(0, 1)


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


def _pieces(first: int, last: int) -> Iterator[tuple[int, int]]:
    for start in range(first, last, _GATHERED):
        yield start, min(start + _GATHERED, last)


def _cached(
    attention: MLAAttention, block_ids: Sequence[int], first: int, last: int
) -> tuple[Tensor, Tensor]:
    """Latents ``[tokens, L]`` and rotated keys ``[tokens, R]``, a copy of what is cached."""
    cache = attention.kv_cache  # [blocks, block_size, L + R]
    size = cache.shape[1]
    start = first // size
    ids = torch.as_tensor(block_ids[start : -(-last // size)])
    tokens = cache[ids].flatten(0, 1)[first - start * size : last - start * size]
    latents, rotated = tokens.split([attention.kv_lora_rank, attention.qk_rope_head_dim], dim=1)
    return latents, rotated
