"""Keys and values of multi-head latent attention (MLA), made of what a CUDA backend caches.

As `latents` says, every head has keys ``[W_UK c ; p]`` and values ``W_UV c`` of its own. All heads
of a long context would take more memory than there is, so they are made in a room of bounded size:
keys of some heads, since a row's weights need all its keys, and values of all heads for some
tokens. In the room they look to the kernels like a paged cache whose block table counts up.

Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from vllm.model_executor.layers.attention import MLAAttention

from vllm_flashtrace.base.errors import UnsupportedModelError
from vllm_flashtrace.kernels import (
    Accumulators,
    AttentionForm,
    AttentionInputs,
    PagedRows,
    ProximityLayer,
    ProximityTrace,
    paged_column_sums,
    replace_by_proximities,
    touching_sums,
)
from vllm_flashtrace.worker.gpu_cache import KeyValueViews
from vllm_flashtrace.worker.latents import (
    GPU_LATENT_BACKENDS,
    up_projection,
    write_keys,
    write_values,
)
from vllm_flashtrace.worker.layers import HeadSizes, TracedLayer

ROOM_BYTES = 256 << 20
"""Most memory for keys and values, but for contexts of which one head's keys take more."""

BLOCK = 64
"""Tokens of a block in the room."""

# Kernels are compiled for queries of any number of heads if a head has a multiple of so many.
_ALIGNMENT = 16


class HeadPart(NamedTuple):
    """Some heads of one segment of a step's target rows.

    Attributes:
        segment: Index of the segment.
        heads: Which of the heads.
        rows: Its target rows over the room, with the accumulators of these heads.
    """

    segment: int
    heads: slice
    rows: PagedRows


class LatentRoom:
    """Memory in which keys or values of one request and layer are made; one at a time.

    Whatever uses it is queued on one stream, so what is made next is made behind that.
    """

    def __init__(self, heads: HeadSizes, dtype: torch.dtype, device: torch.device) -> None:
        """Without memory of its own yet: it is then allocated for each use.

        Args:
            heads: Sizes of all layers; every head has keys of its own.
            dtype: Type of latents, of the projections and of what is made.
            device: Where they are.
        """
        self._heads, self._dtype, self._device = heads, dtype, device
        self._memory: Tensor | None = None
        self._table = torch.empty(0, dtype=torch.int32, device=device)
        self._parts: WeakKeyDictionary[PagedRows, list[HeadPart]] = WeakKeyDictionary()

    def bytes_for(self, tokens: int, most: int) -> int:
        """What the room takes for contexts of up to ``tokens``: at most ``most``, or one head."""
        one = _padded(tokens) * max(self._heads.keys, self._heads.values) * self._dtype.itemsize
        return max(one, min(one * self._heads.queries, most))

    def take(self, size: int) -> None:
        """Takes so many bytes for good.

        Raises:
            torch.OutOfMemoryError: There is no such memory.
        """
        with torch.inference_mode(False):  # It is written to with and without.
            self._memory = torch.empty(size, dtype=torch.uint8, device=self._device)

    def add_column_sums(
        self,
        layer: int,
        attention: MLAAttention,
        query: Tensor,
        rows: PagedRows,
        form: AttentionForm,
        scales: Tensor | None,
    ) -> None:
        """See `kernels.paged_column_sums`; some heads of one segment after the other.

        Args:
            layer: Layer of the accumulators.
            attention: The layer.
            query: ``[tokens, H, d]``.
            rows: The target rows; block tables are those of the layer's cache.
            form: How the layer forms attention weights.
            scales: float32 ``[R]``, see `AttentionInputs`.
        """
        parts = self._parts.get(rows)
        if parts is None:  # They serve all layers of a step.
            parts = self._parts[rows] = list(self._cut(rows))
        for number, part in enumerate(parts):
            # What fails now has not touched the sums only if nothing has before.
            with touching_sums() if number else nullcontext():
                segment = rows.segments[part.segment]
                keys = self.keys(attention, segment.block_table, segment.columns, part.heads)
                own = None if scales is None else rows.of_segment(scales, part.segment)
                queries = query[:, part.heads]
                paged_column_sums(AttentionInputs(queries, keys, part.rows, form, own), layer)

    def replace_by_proximities(
        self,
        layer: TracedLayer,
        index: int,
        weight: Tensor,
        traces: list[ProximityTrace],
    ) -> None:
        """See `kernels.replace_by_proximities`; some tokens of one trace after the other.

        Where a trace's `exact_fraction` is below one, it holds for each such part.

        Args:
            layer: The layer.
            index: Its place in the accumulators.
            weight: ``W_O``, ``[D, H * V]``.
            traces: Requests; block tables are those of the layer's cache.
        """
        attention: Any = layer.attention
        for trace in traces:
            pieces = list(self._token_pieces(trace.tokens))
            totals = trace.totals.new_zeros(len(pieces), len(trace.totals))
            for (first, last), own_totals in zip(pieces, totals, strict=True):
                values = self.values(attention, trace.block_table, first, last)
                piece = ProximityTrace(
                    trace.sums._replace(column_sums=trace.sums.column_sums[..., first:last]),
                    self._table_for(last - first),
                    own_totals,
                    trace.residual,
                    trace.exact_fraction,
                )
                one = ProximityLayer(index, values, weight, layer.multiplier)
                replace_by_proximities([one], [piece])
            trace.totals[index] = totals[:, index].sum()

    def keys(
        self, attention: MLAAttention, block_table: Tensor, tokens: int, heads: slice
    ) -> Tensor:
        """Keys of some heads of a request's first tokens, until something else is made.

        Args:
            attention: The layer.
            block_table: int32, blocks of its cache.
            tokens: Number of tokens.
            heads: The heads.

        Returns:
            ``[blocks, heads, BLOCK, P + R]``; what lies behind the last token is not defined.
        """
        room = self._room(heads.stop - heads.start, tokens, attention.qk_head_dim)
        write_keys(attention, block_table, tokens, heads, room, one_launch=True)
        return _as_blocks(room)

    def values(self, attention: MLAAttention, block_table: Tensor, first: int, last: int) -> Tensor:
        """Values of all heads of the tokens from ``first`` up to ``last``; see `keys`.

        Returns:
            ``[blocks, H, BLOCK, V]``, the token ``first`` in front.
        """
        room = self._room(attention.num_heads, last - first, attention.v_head_dim)
        write_values(attention, block_table, first, last, room, one_launch=True)
        return _as_blocks(room)

    def views(self) -> KeyValueViews:
        """Keys and values as kernels get them, of one block; what is in them is not defined."""
        heads = self._heads
        keys, values = (self._room(heads.queries, 1, size) for size in (heads.keys, heads.values))
        return KeyValueViews(_as_blocks(keys), _as_blocks(values))

    def _cut(self, rows: PagedRows) -> Iterator[HeadPart]:
        heads = self._heads.queries
        for index, segment in enumerate(rows.segments):
            one = _padded(segment.columns) * self._heads.keys * self._dtype.itemsize
            most = self._most(segment.columns) // one
            for first in range(0, heads, most):
                some = slice(first, min(first + most, heads))
                sums: Accumulators = segment.sums
                own = replace(
                    segment,
                    block_table=self._table_for(segment.columns),
                    sums=sums._replace(column_sums=sums.column_sums[:, some]),
                    mass=None if segment.mass is None else segment.mass[:, some],
                )
                count = some.stop - some.start
                yield HeadPart(index, some, PagedRows.build([own], count, count, rows.device))

    def _token_pieces(self, tokens: int) -> Iterator[tuple[int, int]]:
        block = BLOCK * self._heads.queries * self._heads.values * self._dtype.itemsize
        most = max(1, self._most(tokens) // block) * BLOCK
        for first in range(0, tokens, most):
            yield first, min(first + most, tokens)

    def _most(self, tokens: int) -> int:
        return self.bytes_for(tokens, ROOM_BYTES) if self._memory is None else len(self._memory)

    def _room(self, heads: int, tokens: int, size: int) -> Tensor:
        """``[heads, tokens, size]``, tokens in whole blocks."""
        shape = (heads, _padded(tokens), size)
        count = heads * shape[1] * size
        if self._memory is None or count * self._dtype.itemsize > len(self._memory):
            return torch.empty(shape, dtype=self._dtype, device=self._device)
        return self._memory[: count * self._dtype.itemsize].view(self._dtype).view(shape)

    def _table_for(self, tokens: int) -> Tensor:
        """The block table of so many tokens in the room."""
        blocks = _padded(tokens) // BLOCK
        if blocks > len(self._table):
            # Kernels that were told of the last one's address keep it alive, see `DeviceRows`.
            with torch.inference_mode(False):
                self._table = torch.arange(
                    max(blocks, 2 * len(self._table)), dtype=torch.int32, device=self._device
                )
        return self._table[:blocks]


def latent_form(layer: TracedLayer) -> AttentionForm:
    """How latent attention forms its weights: the scale is all there is."""
    impl: Any = layer.attention.impl
    return AttentionForm(scale=float(impl.scale))


def read_latent_values(attention: MLAAttention, block_table: Tensor, tokens: int) -> Tensor:
    """The values of a request's first tokens, float32 ``[tokens, H, V]``, in their own memory."""
    values = attention.kv_cache.new_empty(attention.num_heads, tokens, attention.v_head_dim)
    write_values(attention, block_table, 0, tokens, values, one_launch=True)
    return values.transpose(0, 1).float()


def check_gpu_latents(layer: TracedLayer, dtype: torch.dtype) -> None:
    """Refuses latent attention whose cache or weights are not read here.

    Args:
        layer: The layer.
        dtype: The model's type.

    Raises:
        UnsupportedModelError: Naming the feature in the way.
    """
    attention: Any = layer.attention
    cache, backend = attention.kv_cache, attention.attn_backend.get_name()
    width = attention.kv_lora_rank + attention.qk_rope_head_dim
    rows = layer.heads.queries * (attention.qk_nope_head_dim + attention.v_head_dim)
    refusals = {
        f"multi-head latent attention (MLA) on the {backend} backend": backend
        not in GPU_LATENT_BACKENDS,
        f"latents of KV cache dtype {attention.kv_cache_dtype}": cache.dtype != dtype,
        f"a cache of latents of shape {tuple(cache.shape)}": cache.dim() != 3
        or cache.shape[2] != width,
        f"queries of {layer.heads.keys} numbers a head in latent attention": layer.heads.keys
        % _ALIGNMENT
        != 0,
    }
    up = layer.up_quantization
    if up is None:
        weight = up_projection(attention).weight
        name = f"an up-projection of latents of {weight.dtype} {tuple(weight.shape)}"
        refusals[name] = weight.dtype != dtype or weight.shape != (rows, attention.kv_lora_rank)
    else:
        # Rows that decode, as short chunks may, have latents that are not rounded.
        name = f"an up-projection of latents that rounds them ({up.name}) on a GPU"
        refusals[name] = up.rounds_inputs
    for feature, present in refusals.items():
        if present:
            raise UnsupportedModelError(f"traces are not supported with {feature} ({layer.name})")


def _padded(tokens: int) -> int:
    return -(-tokens // BLOCK) * BLOCK


def _as_blocks(room: Tensor) -> Tensor:
    """``[heads, tokens, size]`` as ``[blocks, heads, BLOCK, size]``."""
    return room.unflatten(1, (-1, BLOCK)).transpose(0, 1)
