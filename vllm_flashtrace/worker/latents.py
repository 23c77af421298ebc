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
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from vllm_flashtrace.worker.cpu_cache import Scratch

_PROJECTED = 512
"""Tokens that a quantised layer is applied to at a time."""


def latent_keys(
    attention: MLAAttention, block_ids: Sequence[int], length: int, scratch: Scratch
) -> Tensor:
    """The keys of a request's first ``length`` tokens.

    Args:
        attention: The layer.
        block_ids: At least ``ceil(length / block_size)`` ids of blocks of its cache.
        length: Number of tokens.
        scratch: Where the result lies.

    Returns:
        float32 ``[H, P + R, length]``: for every head the part without positions, then the shared
        rotated one.
    """
    latents, rotated = _cached(attention, block_ids, length)
    size = attention.qk_nope_head_dim
    keys = scratch.take(attention.num_heads, attention.qk_head_dim, length)
    if up_is_quantized(attention):
        for tokens, own_keys, _ in projected(attention, latents):
            keys[:, :size, tokens] = own_keys.transpose(1, 2)
    else:
        for own, up in zip(keys, up_projections(attention)[0], strict=True):
            own[:size] = up @ latents.t()
    keys[:, size:] = rotated.t()
    return keys


def latent_values(
    attention: MLAAttention, block_ids: Sequence[int], length: int, scratch: Scratch
) -> Tensor:
    """The values of a request's first ``length`` tokens; arguments as `latent_keys`.

    Returns:
        float32 ``[length, H, V]`` that lies in memory as ``[H, length, V]``.
    """
    latents, _ = _cached(attention, block_ids, length)
    values = scratch.take(attention.num_heads, length, attention.v_head_dim)
    if up_is_quantized(attention):
        for tokens, _, own_values in projected(attention, latents):
            values[:, tokens] = own_values
    else:
        for own, up in zip(values, up_projections(attention)[1], strict=True):
            own.copy_(latents @ up.t())
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


def _cached(
    attention: MLAAttention, block_ids: Sequence[int], length: int
) -> tuple[Tensor, Tensor]:
    """Latents ``[length, L]`` and rotated keys ``[length, R]``, a copy of what is cached."""
    cache = attention.kv_cache  # [blocks, block_size, L + R]
    ids = torch.as_tensor(block_ids[: -(-length // cache.shape[1])])
    tokens = cache[ids].flatten(0, 1)[:length]
    latents, rotated = tokens.split([attention.kv_lora_rank, attention.qk_rope_head_dim], dim=1)
    return latents, rotated
