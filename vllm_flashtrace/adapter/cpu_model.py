"""The loaded model of a CPU worker, as the recorder sees it.

Invariant: keys and values come from the paged cache of the forward pass that is running, so they
may be read only while its forward context is set.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context

from vllm_flashtrace.adapter.cpu_kv import (
    BlockOrders,
    Scratch,
    learn_block_order,
    read_keys,
    read_values,
)
from vllm_flashtrace.adapter.model import check_config, find_layers, output_projection
from vllm_flashtrace.adapter.taps import has_taps
from vllm_flashtrace.capture.step import BatchRow
from vllm_flashtrace.capture.trace import ModelShape
from vllm_flashtrace.core.proximity import OutputProjection
from vllm_flashtrace.errors import UnsupportedModelError


class _Projection(NamedTuple):
    """``W_O`` ``[H, d, D]`` in the model's dtype, and float32 norms of its columns."""

    weight: torch.Tensor
    column_norms: torch.Tensor


class CPUTracedModel:
    """Reads what traces need from a vLLM model on the CPU backend."""

    def __init__(self, model: nn.Module, config: VllmConfig) -> None:
        """Inspects the model; raises UnsupportedModelError naming what is in the way."""
        check_config(config)
        self.layers = find_layers(model, config)
        if not has_taps(model):
            raise UnsupportedModelError("the model was loaded without taps")
        for layer in self.layers:
            backend = layer.attention.attn_backend.get_name()
            if backend != "CPU_ATTN":
                raise UnsupportedModelError(f"traces are not supported on the {backend} backend")
        self.device = torch.device("cpu")
        self.shape = ModelShape(
            num_layers=len(self.layers),
            num_heads=self.layers[0].attention.num_heads,
            num_kv_heads=self.layers[0].attention.num_kv_heads,
            hidden_size=config.model_config.get_hidden_size(),
        )
        self._names = {layer.name: layer.index for layer in self.layers}
        self._projections: dict[int, _Projection] = {}
        self._scratch = Scratch()

    def layer_index(self, layer_name: str) -> int | None:
        """Index of an attention layer of this model; None for one of another model."""
        return self._names.get(layer_name)

    def softmax_scale(self, layer: int) -> float:
        """Factor on the dot products of a layer."""
        return float(self.layers[layer].attention.impl.scale)

    def output_projection(self, layer: int) -> OutputProjection:
        """``W_O`` of a layer; kept in the model's dtype once computed."""
        kept = self._projections.get(layer)
        if kept is None:
            weight = output_projection(self.layers[layer])
            norms = torch.linalg.vector_norm(weight.float(), dim=1)
            kept = self._projections[layer] = _Projection(weight, norms)
        return OutputProjection(kept.weight.float(), kept.column_norms)

    def forget_weights(self) -> None:
        """Drops derived weights, for when the model's weights are about to change."""
        self._projections.clear()

    def block_ids(self, row: BatchRow) -> list[int]:
        """Ids of the KV blocks that hold a request's tokens up to the end of the step."""
        layer = self.layers[0]
        metadata = get_forward_context().attn_metadata[layer.name]
        num_blocks = -(-row.stop // layer.attention.kv_cache.shape[2])
        return metadata.block_table[row.index, :num_blocks].tolist()

    def read_keys(self, layer: int, block_ids: list[int], length: int) -> torch.Tensor:
        """float32 keys ``[G, d, length]`` of a request, until the next read."""
        attention = self.layers[layer].attention
        orders = self._order(attention)
        return read_keys(attention.kv_cache, block_ids, length, orders, self._scratch)

    def read_values(self, layer: int, block_ids: list[int], length: int) -> torch.Tensor:
        """float32 values ``[length, G, d]`` of a request, until the next read."""
        attention = self.layers[layer].attention
        orders = self._order(attention)
        return read_values(attention.kv_cache, block_ids, length, orders, self._scratch)

    def end_step(self) -> None:
        """Returns memory that only a step with traces needs."""
        self._scratch.release()

    @staticmethod
    def _order(attention: Any) -> BlockOrders:
        cache = attention.kv_cache
        return learn_block_order(attention.isa, cache.dtype, cache.shape[2], cache.shape[3] // 2)
