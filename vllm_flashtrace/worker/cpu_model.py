"""The loaded model of a CPU worker, as the recorder sees it.

Invariant: keys and values are read from the paged cache while the traced requests hold their
blocks, and are gathered once per layer into memory that the next read may overwrite.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from vllm.config import VllmConfig

from vllm_flashtrace.base.errors import UnsupportedModelError
from vllm_flashtrace.core.proximity import LayerSums
from vllm_flashtrace.kernels import PagedRows, paged_column_sums, proximity
from vllm_flashtrace.trace.budget import ModelShape, part_of_memory
from vllm_flashtrace.worker.cpu_cache import (
    BlockOrders,
    Scratch,
    learn_block_order,
    read_keys,
    read_values,
)
from vllm_flashtrace.worker.layers import (
    added_weight,
    attention_form,
    check_config,
    find_layers,
    model_part,
    output_projection,
)
from vllm_flashtrace.worker.step import HostClock, RowGroup, Segment
from vllm_flashtrace.worker.taps import has_taps

# What is gathered looks to the kernels like a cache of one large block.
_ONE_BLOCK = torch.zeros(1, dtype=torch.int32)


class _Projection(NamedTuple):
    """``W_O`` ``[D, H * d]`` in the model's dtype, and float32 norms of its rows per head."""

    weight: torch.Tensor
    column_norms: torch.Tensor


class CPUTracedModel:
    """Reads what traces need from a vLLM model on the CPU backend."""

    # Each trace is recorded by itself, so that a fault stays with it.
    batched = False
    slot_of: Callable[[int], int] | None = None

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
            if not layer.attention.kv_cache.dtype.is_floating_point or (
                layer.attention.kv_cache.dtype.itemsize < 2
            ):
                raise UnsupportedModelError(
                    "traces are not supported with KV cache dtype "
                    f"{layer.attention.kv_cache_dtype} on the CPU"
                )
        self.device = torch.device("cpu")
        self.part = model_part(model, config)
        self.shape = ModelShape(
            num_layers=len(self.layers),
            num_heads=self.layers[0].attention.num_heads,
            num_kv_heads=self.layers[0].attention.num_kv_heads,
            hidden_size=config.model_config.get_hidden_size(),
        )
        self._forms = [attention_form(layer) for layer in self.layers]
        # Layers are counted from the first on this worker.
        self._names = {layer.name: index for index, layer in enumerate(self.layers)}
        self._projections: dict[int, _Projection] = {}
        self._scratch = Scratch()
        self._clock = HostClock()

    def layer_index(self, layer_name: str) -> int | None:
        """Index of an attention layer of this model; None for one of another model."""
        return self._names.get(layer_name)

    def clock(self) -> HostClock:
        """The host's clock."""
        return self._clock

    def accumulator_limit_bytes(self, max_accumulator_mib: int | None) -> int:
        """The configured limit, or a part of the machine's memory."""
        return part_of_memory() if max_accumulator_mib is None else max_accumulator_mib << 20

    def plan_rows(self, segments: Sequence[Segment]) -> PagedRows:
        """Target rows over a cache of one block, which is what the reads below make."""
        rows = [
            dataclasses.replace(segment.row_segment, block_table=_ONE_BLOCK) for segment in segments
        ]
        return PagedRows.build(rows, self.shape.num_heads, self.shape.num_kv_heads, self.device)

    def add_column_sums(self, layer: int, query: torch.Tensor, group: RowGroup) -> None:
        """See :class:`~vllm_flashtrace.worker.step.StepModel`."""
        [segment] = group.segments
        attention = self.layers[layer].attention
        keys = read_keys(
            attention.kv_cache,
            segment.batch_row.block_table.tolist(),
            group.rows.columns(0),
            self._order(attention),
            self._scratch,
        )
        paged_column_sums(
            query,
            keys.transpose(1, 2)[None],
            group.rows,
            self._forms[layer],
            layer,
            overwrite_keys=True,
        )

    def token_proximity(
        self,
        layer: int,
        sums: LayerSums,
        block_table: torch.Tensor,
        exact_fraction: float,
        adapter: int | None = None,
    ) -> torch.Tensor:
        """See :class:`~vllm_flashtrace.worker.recorder.TracedModel`."""
        attention = self.layers[layer].attention
        values = read_values(
            attention.kv_cache,
            block_table.tolist(),
            sums.column_sums.shape[1],
            self._order(attention),
            self._scratch,
        )
        projection = self.output_projection(layer)
        if adapter is not None:
            projection = self._adapted(layer, projection, adapter)
        return proximity(
            sums.column_sums,
            values.transpose(0, 1)[None],
            _ONE_BLOCK,
            projection.weight,
            projection.column_norms,
            sums.stream,
            exact_fraction=exact_fraction,
        )

    def output_projection(self, layer: int) -> _Projection:
        """``W_O`` of a layer and its norms; kept in the model's dtype once computed."""
        kept = self._projections.get(layer)
        if kept is None:
            weight = output_projection(self.layers[layer])
            kept = self._projections[layer] = _Projection(weight, self._norms(weight))
        return kept

    def _adapted(self, layer: int, base: _Projection, adapter: int) -> _Projection:
        """``W_O`` as a LoRA adapter changes it; not kept, since slots change hands."""
        added = added_weight(self.layers[layer], adapter, self.slot_of)
        if added is None:
            return base
        weight = added.add_(base.weight)
        return _Projection(weight, self._norms(weight))

    def _norms(self, weight: torch.Tensor) -> torch.Tensor:
        by_head = weight.float().unflatten(1, (self.shape.num_heads, -1))
        return torch.linalg.vector_norm(by_head, dim=2).t().contiguous()

    def forget_weights(self) -> None:
        """Drops derived weights, for when the model's weights are about to change."""
        self._projections.clear()

    def end_step(self) -> None:
        """Returns memory that only a step with traces needs."""
        self._scratch.release()

    @staticmethod
    def _order(attention: Any) -> BlockOrders:
        cache = attention.kv_cache
        return learn_block_order(attention.isa, cache.dtype, cache.shape[2], cache.shape[3] // 2)
