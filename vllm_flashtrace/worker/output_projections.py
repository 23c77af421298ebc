"""The output projection ``W_O`` of an attention block: its matrix, packed or not, and adapters.

LoRA adapters matter here only: what they do to queries, keys, values and the stream is in what is
recorded. A matrix that is quantised is the subject of `quantized`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.lora.layers import RowParallelLinearWithLoRA
from vllm.model_executor.layers.linear import RowParallelLinear

from vllm_flashtrace.base.errors import TraceError, UnsupportedModelError


def projection_name(block: nn.Module) -> str:
    """Name of an attention block's one row-parallel projection, else the usual name."""
    kinds = (RowParallelLinear, RowParallelLinearWithLoRA)
    found = [name for name, child in block.named_children() if isinstance(child, kinds)]
    return found[0] if len(found) == 1 else "o_proj"


def base_projection(projection: nn.Module | None) -> tuple[nn.Module | None, nn.Module | None]:
    """An output projection without its adapters, and the module that holds them, if any.

    Raises:
        UnsupportedModelError: The adapters are cut over ranks in a way that is not read here.
    """
    if not isinstance(projection, RowParallelLinearWithLoRA):
        return projection, None
    if type(projection) is not RowParallelLinearWithLoRA:
        raise UnsupportedModelError("traces are not supported with fully sharded LoRA adapters")
    return projection.base_layer, projection


def output_projection(projection: Any) -> torch.Tensor:
    """``W_O`` as the linear layer keeps it, ``[D, H * d]``, in the model's dtype.

    With tensor parallelism these are the columns of this rank's own heads. A matrix that is packed
    (see `packed_kernel`) is got by applying the projection to the identity. The bias is not part of
    it: it belongs to no token.
    """
    if packed_kernel(projection) is None:
        return projection.weight.detach()
    rows = projection.input_size_per_partition
    identity = torch.eye(rows, dtype=projection.params_dtype)
    with torch.inference_mode():
        return projection.quant_method.apply(projection, identity).t().contiguous()


def packed_kernel(module: nn.Module) -> Callable[..., Any] | None:
    """What the CPU backend computes a linear layer with, if it has packed the matrix.

    vLLM then empties ``weight`` and keeps the packed matrix in the closure of a function, where
    nothing writes to it: the same function is the same matrix. A function that closes over nothing
    reads ``weight``.

    Returns:
        None where the layer computes with ``weight``.
    """
    kernel = vars(module).get("cpu_linear")
    return kernel if getattr(kernel, "__closure__", None) else None


def added_weight(
    adapters: Any, adapter: int, slot_of: Callable[[int], int] | None
) -> torch.Tensor | None:
    """What an adapter adds to ``W_O``, float32 ``[D, H * d]`` of this rank's heads.

    Args:
        adapters: What holds the adapters of the output projection, see `base_projection`.
        adapter: The adapter's id.
        slot_of: Tells which slot of the model's modules holds an adapter. Asked in the step in
            which the trace ends, while the slot still holds the adapter of its request.

    Returns:
        None where no adapter can change this projection.

    Raises:
        TraceError: ``recording_failed``: the adapter is not where it should be.
    """
    if adapters is None:
        return None
    if slot_of is None:
        raise TraceError("recording_failed", "the adapters of this worker are not known")
    slot = slot_of(adapter)
    (down,), (up,) = adapters.lora_a_stacked, adapters.lora_b_stacked
    product: torch.Tensor = up[slot, 0].float() @ down[slot, 0].float()
    return product


def adapter_slot(runner: Any, adapter: int) -> int:
    """Where the modules of a runner's model hold an adapter.

    Args:
        runner: A V1 or V2 model runner.
        adapter: The adapter's id (``LoRARequest.lora_int_id``).

    Raises:
        TraceError: ``recording_failed``: the adapter is not active.
    """
    slots = runner.lora_manager._adapter_manager.lora_index_to_id
    if adapter not in slots:
        raise TraceError("recording_failed", f"LoRA adapter {adapter} is not active")
    index: int = slots.index(adapter)
    return index
