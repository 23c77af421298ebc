"""The loaded model of a CPU worker, as the recorder sees it.

Invariant: keys and values come from the paged cache of the forward pass that is running, so they
may be read only while its forward context is set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context

from vllm_flashtrace.adapter.cpu_kv import BlockOrder, learn_block_order, read_blocks
from vllm_flashtrace.adapter.model import (
    TracedLayer,
    check_config,
    find_layers,
    output_projection,
)
from vllm_flashtrace.capture.step import BatchRow
from vllm_flashtrace.capture.trace import ModelShape
from vllm_flashtrace.errors import UnsupportedModelError


class CPUTracedModel:
    """Reads what traces need from a vLLM model on the CPU backend."""

    def __init__(self, model: nn.Module, config: VllmConfig) -> None:
        """Inspects the model; raises UnsupportedModelError naming what is in the way."""
        check_config(config)
        self.layers = find_layers(model, config)
        for layer in self.layers:
            backend = layer.attention.attn_backend.get_name()
            if backend != "CPU_ATTN":
                raise UnsupportedModelError(f"traces are not supported on the {backend} backend")
        self.device = torch.device("cpu")
        self.shape = ModelShape(
            num_layers=len(self.layers),
            num_heads=self.layers[0].attention.num_heads,
            hidden_size=config.model_config.get_hidden_size(),
        )
        self._projections: dict[int, torch.Tensor] = {}

    def output_projection(self, layer: int) -> torch.Tensor:
        """float32 ``W_O`` of a layer, ``[H, d, D]``; kept in the model's dtype once computed."""
        if layer not in self._projections:
            self._projections[layer] = output_projection(self.layers[layer])
        return self._projections[layer].float()

    def forget_weights(self) -> None:
        """Drops derived weights, for when the model's weights are about to change."""
        self._projections.clear()

    def read_values(self, layer: int, row: BatchRow, length: int) -> torch.Tensor:
        """float32 values ``[length, G, d]`` of a request, from the paged cache."""
        return self._read(self.layers[layer], row, length, keys=False)

    def key_reader(self, layer: TracedLayer) -> Callable[[BatchRow, int], torch.Tensor]:
        """A function that reads float32 keys ``[length, G, d]`` of a request."""
        return lambda row, length: self._read(layer, row, length, keys=True)

    def _read(self, layer: TracedLayer, row: BatchRow, length: int, *, keys: bool) -> torch.Tensor:
        attention = layer.attention
        cache = attention.kv_cache
        block_size = cache.shape[2]
        metadata = get_forward_context().attn_metadata[layer.name]
        num_blocks = -(-length // block_size)
        block_ids = metadata.block_table[row.index, :num_blocks].long()
        return read_blocks(cache, block_ids, length, self._order(attention), keys=keys).float()

    @staticmethod
    def _order(attention: Any) -> BlockOrder:
        cache = attention.kv_cache
        return learn_block_order(attention.isa, cache.dtype, cache.shape[2], cache.shape[3] // 2)
