"""LoRA adapters on the way from ``v`` to the residual stream.

Invariant: an adapter's output projection is read from the slot that its request was computed with,
in the step in which the trace ends, while the slot still holds that adapter.

Adapters on other projections need no care: what they do to queries, keys, values and the stream is
in what is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.lora.layers import RowParallelLinearWithLoRA

from vllm_flashtrace.base.errors import TraceError, UnsupportedModelError


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


def added_weight(
    layer: Any, adapter: int, slot_of: Callable[[int], int] | None
) -> torch.Tensor | None:
    """What an adapter adds to ``W_O``, float32 ``[D, H * d]`` of this rank's heads.

    Args:
        layer: The :class:`~vllm_flashtrace.worker.layers.TracedLayer`.
        adapter: The adapter's id.
        slot_of: Where adapters are.

    Returns:
        None where no adapter can change this projection.

    Raises:
        TraceError: ``recording_failed``: the adapter is not where it should be.
    """
    if layer.adapters is None:
        return None
    if slot_of is None:
        raise TraceError("recording_failed", "the adapters of this worker are not known")
    slot = slot_of(adapter)
    (down,), (up,) = layer.adapters.lora_a_stacked, layer.adapters.lora_b_stacked
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
