"""What a CUDA worker's attention layers do to their logits, and what of it cannot be reproduced.

Invariant: whatever changes an attention weight is in the form, or the layer is refused by name.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from vllm_flashtrace.base.errors import UnsupportedModelError
from vllm_flashtrace.kernels import AttentionForm
from vllm_flashtrace.patches.recording_attention import RecordingAttention
from vllm_flashtrace.worker.gpu_cache import CacheScales, cache_scales, quantized_dtype
from vllm_flashtrace.worker.layers import TracedLayer


def check_gpu_config(config: VllmConfig) -> None:
    """Refuses engine configurations that only matter on a GPU.

    Raises:
        UnsupportedModelError: Naming the feature in the way.
    """
    offload = config.offload_config
    refusals = {
        "R-SWA attention": config.model_config.rswa_window is not None,
        "attention to later image tokens": bool(config.model_config.is_mm_prefix_lm),
        "non-causal attention": bool(config.attention_config.use_non_causal),
        "weights offloaded to the host": (
            offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0
        ),
        "KV caches on the host (HiSparse)": config.attention_config.hisparse_config is not None,
    }
    for feature, present in refusals.items():
        if present:
            raise UnsupportedModelError(f"traces are not supported with {feature}")


def check_gpu_layer(layer: TracedLayer, flashinfer_quantizes: bool) -> None:
    """Refuses attention layers whose weights the recorder would not reproduce.

    Args:
        layer: The layer.
        flashinfer_quantizes: Whether FlashInfer quantises queries by itself where the cache is fp8.

    Raises:
        UnsupportedModelError: Naming the feature in the way.
    """
    attention: Any = layer.attention
    impl = attention.impl
    backend = attention.attn_backend
    # A backend derived from a recording one (chunked local attention, say) may build other block
    # tables; only the classes that were registered are known.
    if not isinstance(impl, RecordingAttention) or backend.get_impl_cls() is not type(impl):
        raise UnsupportedModelError(
            f"traces are not supported on the {backend.get_name()} backend ({layer.name})"
        )
    if "get_impl_cls" not in vars(backend):
        raise UnsupportedModelError(
            f"traces are not supported on the {backend.__name__} backend ({layer.name})"
        )
    flashinfer = backend.get_name() == "FLASHINFER"
    quantized = quantized_dtype(attention) is not None
    raw_queries = quantized and attention.query_quant is None
    left, right = impl.sliding_window
    refusals = {
        "ALiBi of square roots": bool(getattr(impl, "use_alibi_sqrt", False)),
        "ALiBi on the FLASHINFER backend": flashinfer and impl.alibi_slopes is not None,
        "ALiBi and attention sinks": impl.alibi_slopes is not None and impl.sinks is not None,
        "soft-capped logits on the FLASHINFER backend": flashinfer and bool(impl.logits_soft_cap),
        "chunked local attention": getattr(impl, "chunk_lookback", -1) > -1,
        "attention to later image tokens": bool(attention.use_mm_prefix),
        f"a sliding window of {impl.sliding_window}": right > 0 or (left < 0) != (right < 0),
        "an fp8 KV cache for which FlashInfer quantizes the queries": (
            flashinfer and raw_queries and flashinfer_quantizes
        ),
        # Its kernels then apply the scales of quantised queries to queries that are not.
        "fp8 scales on the FLASHINFER backend without quantized queries": (
            flashinfer and raw_queries and cache_scales(attention) != CacheScales()
        ),
    }
    for feature, present in refusals.items():
        if present:
            raise UnsupportedModelError(f"traces are not supported with {feature} ({layer.name})")


def gpu_attention_form(layer: TracedLayer) -> AttentionForm:
    """How a layer on a recorded CUDA backend forms its attention weights.

    The scales that make numbers out of a quantised K cache and of quantised queries are part of the
    factor on the dot products.
    """
    attention: Any = layer.attention
    impl = attention.impl
    scales = cache_scales(attention)
    query_scale = scales.query if attention.query_quant is not None else 1.0
    left, _ = impl.sliding_window
    device = layer.out_proj.weight.device
    slopes, sinks = impl.alibi_slopes, impl.sinks
    return AttentionForm(
        scale=float(impl.scale) * scales.key * query_scale,
        sliding_window=left + 1 if left >= 0 else None,
        soft_cap=float(impl.logits_soft_cap or 0.0),
        alibi_slopes=slopes.to(device, torch.float32) if slopes is not None else None,
        sinks=sinks.detach().to(device, torch.float32) if sinks is not None else None,
    )


def flashinfer_quantizes_queries(config: VllmConfig) -> bool:
    """Whether FlashInfer turns queries into fp8 inside its ``forward`` where the cache is fp8.

    The rule of ``FlashInferMetadataBuilder.get_q_data_type`` in vLLM 0.32.0.
    """
    if config.attention_config.disable_flashinfer_q_quantization:
        return False
    return bool(
        current_platform.is_device_capability(90)
        or current_platform.is_device_capability_family(100)
    )
