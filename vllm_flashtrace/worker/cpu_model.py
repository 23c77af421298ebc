"""A traced model on vLLM's CPU backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import MLAAttention

from vllm_flashtrace.base.errors import UnsupportedModelError
from vllm_flashtrace.core import TargetRowBlocks
from vllm_flashtrace.kernels import (
    AttentionForm,
    PagedRows,
    ProximityLayer,
    ProximityTrace,
    RowSegment,
    replace_by_proximities,
    touching_sums,
)
from vllm_flashtrace.worker.cpu_cache import (
    BlockOrders,
    Scratch,
    learn_block_order,
    read_keys,
    read_values,
)
from vllm_flashtrace.worker.gpu_cache import CacheScales, cache_scales, quantized_dtype
from vllm_flashtrace.worker.kept_rows import KeptRows
from vllm_flashtrace.worker.latents import CPU_LATENT_BACKEND, write_keys, write_values
from vllm_flashtrace.worker.layers import TracedLayer
from vllm_flashtrace.worker.step_rows import StepRows
from vllm_flashtrace.worker.traced_model import TracedModel

CPU_BACKEND = "CPU_ATTN"

LATENT_SCRATCH_BYTES = 256 << 20
"""Most memory for keys or values that are made of latents, but where one head's keys take more."""

# What is gathered looks to the kernels like a cache of one large block.
_ONE_BLOCK = torch.zeros(1, dtype=torch.int32)

_FLOAT_BYTES = 4


class HeadBlocks:
    """Target rows of a request in blocks, for any number of heads whose keys are made at a time.

    Attributes:
        columns: Number of keys that the last row sees.
    """

    def __init__(self, weights: Tensor, positions: Tensor, rows: Tensor) -> None:
        """See `TargetRowBlocks`."""
        self.columns = int(positions.max()) + 1
        self._arguments = weights, positions, rows
        self._made: dict[int, TargetRowBlocks] = {}

    def of(self, heads: int, groups: int) -> TargetRowBlocks:
        """The blocks for some of the query heads, made at first use.

        Args:
            heads: How many.
            groups: Key/value heads of all.
        """
        if heads not in self._made:
            weights, positions, rows = self._arguments
            sizes = heads, min(heads, groups)
            self._made[heads] = TargetRowBlocks(weights, positions, *sizes, rows=rows)
        return self._made[heads]


class CPUTracedModel(TracedModel):
    """Gathers keys and values, whose order in a block is private, into memory of its own.

    One request and layer at a time: the next read overwrites what the last one gathered. Of latents
    at most `LATENT_SCRATCH_BYTES` of keys or values are made at a time.
    """

    batched = False

    def __init__(self, model: nn.Module, config: VllmConfig) -> None:
        """See `TracedModel`."""
        super().__init__(model, config, torch.device("cpu"))
        for layer in self.layers:
            _check_layer(layer, self._dtype)
        self._scratch = Scratch()
        self._blocks: WeakKeyDictionary[PagedRows, HeadBlocks] = WeakKeyDictionary()

    def add_column_sums(
        self,
        layer: int,
        query: Tensor,
        group: StepRows,
        rows: PagedRows,
        scales: Tensor | None,
        lse: Tensor | None = None,
    ) -> None:
        """See `TracedModel`."""
        [segment] = rows.segments
        blocks = self._blocks.get(rows)
        if blocks is None:  # They serve all layers of a step.
            blocks = HeadBlocks(segment.weights, segment.positions, segment.rows)
            self._blocks[rows] = blocks
        tables = group.block_tables[0]
        self._add(layer, tables, query, blocks, [segment.sums.column_sums[layer]], scales)

    def weigh_together(self, kept: KeptRows, groups: Sequence[StepRows]) -> None:
        """See `TracedModel`; the targets share the attention weights of their rows."""
        targets = [group.rows.segments[0] for group in groups]
        tables = groups[0].block_tables[0]
        rows = torch.cat([target.rows for target in targets]).unique()
        weights = torch.zeros(len(targets), len(rows))
        for own, target in zip(weights, targets, strict=True):
            own[torch.searchsorted(rows, target.rows)] = target.weights
        blocks = HeadBlocks(weights, kept.positions[rows], rows)
        for layer in range(len(self.layers)):
            sums = [target.sums.column_sums[layer] for target in targets]
            factors = kept.factors_of(layer, rows)
            self._add(layer, tables, kept.queries[layer], blocks, sums, factors)

    def _add(
        self,
        layer: int,
        block_tables: Sequence[Tensor],
        query: Tensor,
        blocks: HeadBlocks,
        sums: Sequence[Tensor],
        scales: Tensor | None,
    ) -> None:
        """Adds column sums of one request and layer, those of some heads after those of others.

        Args:
            layer: Layer index.
            block_tables: See `BatchRow`.
            query: ``[tokens, H, d]``, see `heads_of`.
            blocks: The request's target rows.
            sums: Of each target, float32 ``[H, >= columns]`` or ``[H * d, >= columns]``.
            scales: See `TargetRowBlocks.add`.

        Raises:
            SumsTouchedError: It failed when it had begun to add.
        """
        form, groups = self.attention_form(layer), self.shape.num_kv_heads
        for number, heads in enumerate(self._head_parts(layer, blocks.columns)):
            # What fails now has not touched the sums only if nothing has before.
            with touching_sums() if number else nullcontext():
                queries = query[:, heads]
                own = blocks.of(queries.shape[1], groups)
                keys = self._read_keys(layer, block_tables, blocks.columns, heads)
            with touching_sums():
                own.add(queries, keys, form, [one[heads] for one in sums], scales)

    def attention_form(self, layer: int) -> AttentionForm:
        """See `TracedModel`."""
        return cpu_attention_form(self.layers[layer])

    def read_values(self, layer: int, block_tables: Sequence[Tensor], tokens: int) -> Tensor:
        """See `TracedModel`."""
        return self._read_values(layer, block_tables, 0, tokens)

    def _read_values(
        self, layer: int, block_tables: Sequence[Tensor], first: int, last: int
    ) -> Tensor:
        """Those from ``first`` up to ``last``."""
        attention, size = self.layers[layer].attention, self.layers[layer].heads.values
        block_table = block_tables[self.cache_groups.places[layer]]
        if isinstance(attention, MLAAttention):
            values = self._scratch.take(attention.num_heads, last - first, size)
            write_values(attention, block_table, first, last, values)
            return values.transpose(0, 1)
        cache, orders = self._cache(attention)
        values = read_values(cache, block_table.tolist(), last, orders, self._scratch)
        values, scale = values[first:, :, :size], _scales(attention).value
        return values if scale == 1 else values.mul_(scale)

    def _read_keys(
        self, layer: int, block_tables: Sequence[Tensor], tokens: int, heads: slice
    ) -> Tensor:
        """A request's keys, float32 ``[G, d, tokens]``, until something else is read.

        Args:
            layer: Layer index.
            block_tables: See `BatchRow`.
            tokens: How many, from the first on.
            heads: One of `_head_parts`.
        """
        attention = self.layers[layer].attention
        block_table = block_tables[self.cache_groups.places[layer]]
        if isinstance(attention, MLAAttention):
            count = len(range(attention.num_heads)[heads])
            keys = self._scratch.take(count, attention.qk_head_dim, tokens)
            write_keys(attention, block_table, tokens, heads, keys.transpose(1, 2))
            return keys
        cache, orders = self._cache(attention)
        return read_keys(cache, block_table.tolist(), tokens, orders, self._scratch)

    def _cache(self, attention: Any) -> tuple[Tensor, BlockOrders]:
        """A layer's cache as the numbers that are stored, and their order in a block."""
        cache, eight_bits = attention.kv_cache, quantized_dtype(attention)
        sizes = self._dtype, cache.shape[2], cache.shape[3] // 2
        if eight_bits is None:
            return cache, learn_block_order(attention.isa, *sizes)
        cached = attention.kv_cache_dtype, eight_bits
        return cache.view(eight_bits), learn_block_order(attention.isa, *sizes, cached)

    def _head_parts(self, layer: int, tokens: int) -> list[slice]:
        """Heads whose keys of so many tokens are made at a time."""
        sizes = self.layers[layer].heads
        if not isinstance(self.layers[layer].attention, MLAAttention):
            return [slice(None)]
        most = max(1, LATENT_SCRATCH_BYTES // (_FLOAT_BYTES * sizes.keys * tokens))
        return [slice(first, first + most) for first in range(0, sizes.queries, most)]

    def _token_parts(self, layer: int, tokens: int) -> list[tuple[int, int]]:
        """First and last of the tokens whose values are made at a time."""
        sizes = self.layers[layer].heads
        if not isinstance(self.layers[layer].attention, MLAAttention):
            return [(0, tokens)]
        most = max(1, LATENT_SCRATCH_BYTES // (_FLOAT_BYTES * sizes.queries * sizes.values))
        return [(first, min(first + most, tokens)) for first in range(0, tokens, most)]

    def replace_by_proximities(
        self,
        traces: Sequence[ProximityTrace],
        block_tables: Sequence[Sequence[Tensor]],
        adapter: int | None,
    ) -> None:
        """See `TracedModel`.

        Where values are made for some tokens at a time, `exact_fraction` holds for these.
        """
        [trace], [tables] = traces, block_tables
        with touching_sums():
            for index, layer in enumerate(self.layers):
                weight, norms = self.output_projection(index, adapter)
                parts = self._token_parts(index, trace.tokens)
                totals = trace.totals.new_zeros(len(parts), len(trace.totals))
                for (first, last), own_totals in zip(parts, totals, strict=True):
                    values = self._read_values(index, tables, first, last).transpose(0, 1)[None]
                    own = dataclasses.replace(
                        trace,
                        sums=trace.sums._replace(
                            column_sums=trace.sums.column_sums[..., first:last]
                        ),
                        block_table=_ONE_BLOCK,
                        totals=own_totals,
                    )
                    one = ProximityLayer(index, values, weight, layer.multiplier, norms)
                    replace_by_proximities([one], [own])
                trace.totals[index] = totals[:, index].sum()

    def plan_rows(self, segments: Sequence[RowSegment]) -> PagedRows:
        """Target rows over the one block that the reads above make."""
        return super().plan_rows(
            [dataclasses.replace(segment, block_table=_ONE_BLOCK) for segment in segments]
        )

    def end_step(self) -> None:
        """Returns the memory that keys and values were gathered into."""
        self._scratch.release()


def cpu_attention_form(layer: TracedLayer) -> AttentionForm:
    """How a layer of the CPU backend forms its attention weights of what is stored as keys."""
    impl: Any = layer.attention.impl
    if isinstance(layer.attention, MLAAttention):
        return AttentionForm(scale=float(impl.scale))
    return AttentionForm(
        scale=float(impl.scale) * _scales(layer.attention).key,
        sliding_window=layer.attention.sliding_window,
        chunk_size=layer.chunk_size,
        soft_cap=float(impl.logits_soft_cap or 0),
        alibi_slopes=impl.alibi_slopes,
        sinks=impl.sinks.float() if impl.sinks is not None else None,
    )


def _check_layer(layer: TracedLayer, dtype: torch.dtype) -> None:
    attention = layer.attention
    backend = attention.attn_backend.get_name()
    if backend not in (CPU_BACKEND, CPU_LATENT_BACKEND):
        raise UnsupportedModelError(f"traces are not supported on the {backend} backend")
    stored = attention.kv_cache.dtype
    eight_bits = None if backend == CPU_LATENT_BACKEND else quantized_dtype(attention)
    if stored != (dtype if eight_bits is None else torch.uint8):
        raise UnsupportedModelError(
            f"traces are not supported with KV cache dtype {attention.kv_cache_dtype} on the CPU"
        )
    if eight_bits is not None:
        cache_scales(attention)


def _scales(attention: Any) -> CacheScales:
    """What stored numbers are multiplied by: the kernels heed scales only where they store fp8."""
    eight_bits = quantized_dtype(attention) is not None
    return cache_scales(attention) if eight_bits else CacheScales()
