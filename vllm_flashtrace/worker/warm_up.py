"""Compiles the Triton kernels of traces while a GPU worker starts.

Later a compilation would stop the engine for seconds, vLLM's JIT monitor would warn of it, and in
its mode ``error`` the trace would fail. Triton keeps what it compiles on disk
(``TRITON_CACHE_DIR``), so only the first start on a machine takes the whole time.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from vllm.platforms import current_platform

from vllm_flashtrace.base.errors import UnsupportedModelError
from vllm_flashtrace.base.logs import log_unexpected, logger
from vllm_flashtrace.worker.cache_groups import cache_groups
from vllm_flashtrace.worker.gpu_model import GPUTracedModel, quantizes_queries
from vllm_flashtrace.worker.layers import TracedLayer
from vllm_flashtrace.worker.runner import KERNELS_ATTRIBUTE


def warm_up_kernels(worker: Any) -> None:
    """Compiles every kernel that traces can launch on a GPU worker; never raises.

    Does nothing for a model that cannot be traced. What cannot be compiled is compiled, or fails,
    with the first trace that needs it.

    Args:
        worker: vLLM's worker, its model loaded and its KV cache bound.
    """
    runner = worker.model_runner
    if runner.device.type != "cuda":
        return
    began = time.perf_counter()
    try:
        model = GPUTracedModel(runner.get_model(), runner.vllm_config, runner.device)
        cache_groups(runner.kv_cache_config, model.layers)
        variants, failures = compile_kernels(model, runner.vllm_config.model_config.dtype)
    except UnsupportedModelError:
        return  # Said where the first trace is refused.
    except Exception as error:
        log_unexpected("compiling the kernels of traces", error)
        variants, failures = 0, [repr(error)]
    seconds = time.perf_counter() - began
    report = {"compiled": variants, "seconds": round(seconds, 3), "failures": failures}
    setattr(runner, KERNELS_ATTRIBUTE, report)
    logger.info("FlashTrace: %d kernels compiled in %.1f s", variants, seconds)
    if failures:
        logger.warning(
            "FlashTrace: %d kernels could not be compiled before the first trace: %s",
            len(failures),
            "; ".join(failures),
        )


def compile_kernels(model: GPUTracedModel, dtype: torch.dtype) -> tuple[int, list[str]]:
    """Compiles every kernel that traces of a model can launch; launches none.

    Args:
        model: The model.
        dtype: Type of its activations.

    Returns:
        The number of variants, and what could not be compiled.
    """
    from vllm_flashtrace.kernels.triton_operands import compiling
    from vllm_flashtrace.kernels.triton_variants import (
        LayerTensors,
        launch_every_variant,
        target_rows_of_every_kind,
    )

    kinds = None
    with compiling() as compilation, torch.inference_mode():
        for index, layer in enumerate(model.layers):
            keys, values = model.kernel_views(index)
            quantized = quantizes_queries(layer)
            tensors = LayerTensors(
                query=torch.empty(
                    1,
                    model.shape.num_heads,
                    layer.heads.keys,
                    dtype=current_platform.fp8_dtype() if quantized else dtype,
                    device=model.device,
                ),
                keys=keys,
                values=values,
                stream=torch.empty(1, model.shape.hidden_size, dtype=dtype, device=model.device),
                weights=_projections(layer, dtype),
                form=model.attention_form(index),
                scaled=layer.block_norm is not None,
            )
            kinds = kinds or target_rows_of_every_kind(tensors)
            launch_every_variant(tensors, kinds)
        model.fingerprint.take()
    return len(compilation.kernels), compilation.failures


def _projections(layer: TracedLayer, dtype: torch.dtype) -> list[torch.Tensor]:
    """``W_O`` as the kernels may get it, see `TracedModel.output_projection`."""
    projection = layer.out_proj
    shape = projection.output_size_per_partition, projection.input_size_per_partition
    if layer.quantization is None:
        weight = projection.weight.detach()
    else:
        weight = torch.empty(shape, dtype=dtype, device="meta")
    other = torch.empty(shape, dtype=torch.float32, device="meta")
    if layer.block_norm is not None:
        return [other]
    return [weight] if layer.adapters is None else [weight, other]
