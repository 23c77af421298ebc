"""Keys and values in the paged cache of a CUDA backend.

Whatever the physical layout (``vllm.v1.kv_cache_layout.KVCacheLayout``), vLLM binds to a layer a
logical view ``[num_blocks, G, block_size, 2 * head_size]`` with K and V side by side in the last
dimension; FlashAttention, Triton attention and FlashInfer slice that view. So do the views here,
by strides and without a copy. ``view * scale`` is the tensor the attention kernel works with;
caches of which that does not hold are refused by name. The types and scales of caches of eight
bits (`quantized_dtype`, `cache_scales`) are read alike for the CPU backend.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import KVQuantMode, get_kv_quant_mode

from vllm_flashtrace.base.errors import UnsupportedModelError

_E4M3 = ("fp8", "fp8_e4m3")
_E5M2 = ("fp8_e5m2",)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class KeyValueViews(NamedTuple):
    """Both halves of a layer's cache, ``[num_blocks, G, block_size, head_size]`` each."""

    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, slots=True)
class CacheScales:
    """Per-tensor factors that make numbers out of what is stored: ``number = stored * factor``.

    Attributes:
        query: Of queries, if they reach the kernel quantised.
        key: Of the K cache.
        value: Of the V cache.
    """

    query: float = 1.0
    key: float = 1.0
    value: float = 1.0


def key_value_views(attention: Any, dtype: torch.dtype | None) -> KeyValueViews:
    """Views into the cache that is bound to a layer.

    Args:
        attention: A ``vllm.model_executor.layers.attention.Attention`` with its cache bound.
        dtype: What :func:`quantized_dtype` says of it.

    Raises:
        UnsupportedModelError: The cache is not of the shape or dtype it should be.
    """
    cache, size = attention.kv_cache, attention.head_size
    expected = (attention.num_kv_heads, 2 * size)
    if cache.dim() != 4 or (cache.shape[1], cache.shape[3]) != expected:
        raise UnsupportedModelError(
            f"traces are not supported with a KV cache of shape {tuple(cache.shape)}; expected "
            f"[blocks, {expected[0]}, tokens, {expected[1]}]"
        )
    if dtype is not None and cache.dtype != dtype:
        if cache.element_size() != dtype.itemsize:
            raise UnsupportedModelError(
                f"traces are not supported with a {cache.dtype} KV cache for {dtype}"
            )
        cache = cache.view(dtype)
    elif dtype is None and cache.dtype not in _FLOATS:
        raise UnsupportedModelError(f"traces are not supported with a {cache.dtype} KV cache")
    return KeyValueViews(cache[..., :size], cache[..., size:])


def quantized_dtype(attention: Any) -> torch.dtype | None:
    """What the bytes of a quantised cache are; None if the cache is not quantised.

    FlashAttention and Triton attention store and read the platform's fp8 format; FlashInfer and the
    CPU backend go by the name of the cache dtype.

    Raises:
        UnsupportedModelError: The cache is quantised in a way that is not read here.
    """
    name = attention.kv_cache_dtype
    mode = get_kv_quant_mode(name)
    if mode == KVQuantMode.NONE:
        return None
    if mode == KVQuantMode.FP8_PER_TENSOR:
        if name in _E4M3:
            return current_platform.fp8_dtype()
        if name in _E5M2 and attention.attn_backend.get_name() in ("CPU_ATTN", "FLASHINFER"):
            return torch.float8_e5m2
    raise UnsupportedModelError(
        f"traces are not supported with KV cache dtype {name} on the "
        f"{attention.attn_backend.get_name()} backend"
    )


def cache_scales(attention: Any) -> CacheScales:
    """The factors of a layer, as its kernel applies them.

    Raises:
        UnsupportedModelError: There is a factor per head, one that an unquantised cache should not
            have, or one that is not a positive number.
    """
    for name in ("_q_scale", "_k_scale", "_v_scale"):
        if getattr(attention, name).numel() != 1:
            raise UnsupportedModelError("traces are not supported with KV cache scales per head")
    scales = CacheScales(
        float(attention._q_scale_float),
        float(attention._k_scale_float),
        float(attention._v_scale_float),
    )
    if quantized_dtype(attention) is None and scales != CacheScales():
        raise UnsupportedModelError(
            f"traces are not supported with scales {scales} for a KV cache that is not quantized"
        )
    if not all(0 < scale < math.inf for scale in (scales.query, scales.key, scales.value)):
        raise UnsupportedModelError(f"traces are not supported with KV cache scales {scales}")
    return scales
