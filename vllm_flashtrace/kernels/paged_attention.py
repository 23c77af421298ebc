"""What the target rows of a step add to their traces: column sums of attention, sums of the stream.

CUDA tensors are read by Triton kernels, keys in place, others are gathered and computed by torch;
both give the same numbers, and neither stores anything of size rows times context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_flashtrace.core.attention import AttentionForm, as_slice
from vllm_flashtrace.kernels.paged_proximity import gather_tokens
from vllm_flashtrace.kernels.target_rows import PagedRows, RowSegment, touching_sums

_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
_LARGEST_HEAD = 256

# Kernels are compiled for addresses that are multiples of so many bytes.
_ALIGNMENT = 16

# Of so many parts of kept queries one more is left for what else their column sums need.
_PART_OF_ROOM = 8


@dataclass(frozen=True, slots=True, eq=False)
class AttentionInputs:
    """One layer's attention as a step's target rows see it.

    Attributes:
        query: ``[tokens, H, d]``, the step's queries after position encoding, any strides;
            float32, float16, bfloat16 or eight-bit floats (e4m3fn, e5m2).
        key_cache: ``[num_blocks, G, block_size, d]``, any strides, of the same types; head ``h``
            reads key/value head ``h // (H // G)``.
        rows: The target rows, with their accumulators.
        form: How the layer makes logits; `form.scale` includes the scales of eight-bit floats.
        scales: float32 ``[R]``, positive factors on the weights of the rows in this layer, the rows
            of all segments one after another; None for 1. In torch also ``[H, R]``, factors of each
            head, or ``[H, d, R]``, of each coordinate of a head's values.
        lse: float32 ``[H, tokens]``, ``log sum_j exp(logit_ij)`` of the step's queries, a sink
            included, tokens adjacent; None where it is to be computed.

    Raises:
        ValueError: The shapes or types do not fit together.
    """

    query: Tensor
    key_cache: Tensor
    rows: PagedRows
    form: AttentionForm
    scales: Tensor | None = None
    lse: Tensor | None = None

    def __post_init__(self) -> None:
        query, key_cache, rows = self.query, self.key_cache, self.rows
        listing = (
            f"query {query.dtype} {tuple(query.shape)}, "
            f"key_cache {key_cache.dtype} {tuple(key_cache.shape)}"
        )
        if query.dim() != 3 or key_cache.dim() != 4:
            raise ValueError(
                f"query must be [tokens, H, d] and key_cache of four dimensions: {listing}"
            )
        block_size, dim = key_cache.shape[2:]
        fitting = (
            query.shape[1:] == (rows.num_heads, dim)
            and key_cache.shape[1] == rows.num_kv_heads
            and 0 < dim <= _LARGEST_HEAD
            and block_size > 0
        )
        if not fitting or query.dtype not in _DTYPES or key_cache.dtype not in _DTYPES:
            raise ValueError(
                f"queries and keys do not fit {rows.num_heads} heads over {rows.num_kv_heads}: "
                f"{listing}"
            )
        if self.lse is not None:
            check_lse(self.lse, rows)
        for segment in rows.segments if block_size < rows.least_block_size else ():
            if segment.block_table.numel() * block_size < segment.columns:
                raise ValueError(
                    f"a block table of {segment.block_table.numel()} blocks of {block_size} does "
                    f"not hold {segment.columns} tokens"
                )


@dataclass(frozen=True, slots=True, eq=False)
class LayerKeys:
    """What the column sums of a layer are made of, but its queries.

    Attributes:
        layer: Layer of the accumulators, and of `KeptQueries`.
        key_cache: As in `AttentionInputs`.
        form: As in `AttentionInputs`.
    """

    layer: int
    key_cache: Tensor
    form: AttentionForm


class KeptQueries:
    """The queries of a step's target rows, layer by layer, until the step ends.

    Keys stay in the paged cache as long as the requests hold their blocks. So the column sums of
    all layers can be added at once, which takes as many launches as those of one.

    Attributes:
        rows: The target rows.
        queries: ``[L, R, H, d]``; what of them is not in `layers` is not initialised.
        room: float32, scratch memory for `add_kept_column_sums`.
        scales: float32 ``[L, R]``, see `AttentionInputs`; None for 1.
        lse: float32 ``[L, H, R]``, the log-sum-exp of the queries; None where it is to be computed.
        layers: Layers that were kept and are not yet in the sums.
    """

    def __init__(
        self,
        rows: PagedRows,
        queries: Tensor,
        room: Tensor,
        scales: Tensor | None = None,
        lse: Tensor | None = None,
    ) -> None:
        """Starts without queries, in given memory."""
        self.rows, self.queries, self.room = rows, queries, room
        self.scales, self.lse = scales, lse
        self.layers: list[int] = []
        # Eight-bit floats cannot be indexed.
        self._bytes = queries.view(torch.uint8) if queries.itemsize == 1 else queries

    @staticmethod
    def row_bytes(layers: int, heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """What a row takes of the memory of `within`."""
        queries = layers * heads * head_dim * dtype.itemsize
        lse = layers * heads * torch.float32.itemsize
        return queries + lse + -(-queries // _PART_OF_ROOM)

    @classmethod
    def within(
        cls,
        memory: Tensor,
        rows: PagedRows,
        layers: int,
        head_dim: int,
        dtype: torch.dtype,
        *,
        with_lse: bool = False,
    ) -> KeptQueries | None:
        """Queries in memory that nothing else uses until the step ends.

        Args:
            memory: uint8, its address a multiple of 16.
            rows: The target rows.
            layers: Layers L of the model.
            head_dim: Head size d.
            dtype: Type of queries.
            with_lse: Whether their log-sum-exp is kept too, if the first layer's is told.

        Returns:
            None where the memory is too small.
        """
        padded = -(-len(rows) // _ALIGNMENT) * _ALIGNMENT
        if padded * cls.row_bytes(layers, rows.num_heads, head_dim, dtype) > len(memory):
            return None
        # A layer's queries begin at a multiple of 16 numbers whatever the number of rows.
        shape = (layers, padded, rows.num_heads, head_dim)
        end = layers * padded * rows.num_heads * head_dim * dtype.itemsize
        with torch.inference_mode(False):  # They are written to with and without.
            queries = memory[:end].view(dtype).view(shape)[:, : len(rows)]
            room = memory[end : len(memory) // _ALIGNMENT * _ALIGNMENT].view(torch.float32)
            if not with_lse:
                return cls(rows, queries, room)
            count = layers * rows.num_heads * padded
            lse = room[: layers * rows.num_heads * len(rows)].view(layers, rows.num_heads, -1)
            return cls(rows, queries, room[count:], lse=lse)

    def keep(self, layer: int, query: Tensor, lse: Tensor | None = None) -> bool:
        """Copies a layer's queries; one launch, and another for their log-sum-exp.

        Args:
            layer: The layer.
            query: ``[tokens, H, d]``, the step's queries, see `AttentionInputs`.
            lse: ``[H, tokens]``, see `AttentionInputs`.

        Returns:
            Whether it did: it takes queries of one type and size, and the log-sum-exp of all
            layers or of none.
        """
        if query.dtype != self.queries.dtype or query.shape[1:] != self.queries.shape[2:]:
            return False
        if lse is None:
            if self.layers and self.lse is not None:
                return False
            self.lse = None
        elif self.lse is not None:
            check_lse(lse, self.rows)
            torch.index_select(lse, 1, self.rows.places, out=self.lse[layer])
        stored = query.view(torch.uint8) if query.itemsize == 1 else query
        torch.index_select(stored, 0, self.rows.places, out=self._bytes[layer])
        self.layers.append(layer)
        return True

    def of_segment(self, index: int, rows: PagedRows) -> KeptQueries:
        """Those of one segment, which `rows` holds alone; both see the same memory.

        Its scales are the caller's.
        """
        first = self.rows.first_row(index)
        with torch.inference_mode(False):
            queries = self.queries[:, first : first + len(rows)]
            if queries.data_ptr() % _ALIGNMENT:
                queries = queries.contiguous()
            lse = None if self.lse is None else self.rows.of_segment(self.lse, index)
            kept = KeptQueries(rows, queries, self.room, lse=lse)
        kept.layers = list(self.layers)
        return kept


def paged_column_sums(inputs: AttentionInputs, layer: int, *, overwrite_keys: bool = False) -> None:
    """Adds ``c_h[j] += sum_i w_i s_i exp(logit_ij - lse_i)`` to each segment's column sums.

    And to its mass what is added to them, what that must be, ``sum_i w_i s_i (1 - exp(sink -
    lse_i))``, and ``sum_i w_i s_i``: a log-sum-exp that was told and is wrong is found by it.

    On a GPU it does not wait for the device and gives the same bits for the same input, the mass
    apart: no program adds to sums that another adds to.

    Args:
        inputs: The layer's tensors, all on one device.
        layer: Layer of the accumulators.
        overwrite_keys: Whether a float32 ``key_cache`` of one block may be used as scratch memory.

    Raises:
        SumsTouchedError: It failed when it had begun to add. After any other exception the sums are
            as they were.
    """
    if by_triton(inputs.query):
        from vllm_flashtrace.kernels.triton_column_sums import triton_column_sums

        if inputs.scales is not None and inputs.scales.dim() > 1:
            raise ValueError("the Triton kernels take one factor for each row")
        triton_column_sums(inputs, layer)
    else:
        torch_column_sums(inputs, layer, overwrite_keys=overwrite_keys)


def add_kept_column_sums(kept: KeptQueries, layers: Sequence[LayerKeys]) -> None:
    """As `paged_column_sums` for several layers at once; empties `KeptQueries.layers`.

    Args:
        kept: The queries.
        layers: What is to be added: `KeptQueries.layers`.

    Raises:
        SumsTouchedError: See `paged_column_sums`.
    """
    if by_triton(kept.queries):
        from vllm_flashtrace.kernels.triton_column_sums import triton_kept_column_sums

        triton_kept_column_sums(kept, layers)
    else:
        rows = kept.rows.in_a_row
        for keys in layers:
            query = kept.queries[keys.layer]
            scales = None if kept.scales is None else kept.scales[keys.layer]
            lse = None if kept.lse is None else kept.lse[keys.layer]
            inputs = AttentionInputs(query, keys.key_cache, rows, keys.form, scales, lse)
            torch_column_sums(inputs, keys.layer)
    kept.layers.clear()


def paged_lse(inputs: AttentionInputs) -> Tensor:
    """Computes ``log sum_j exp(logit_ij)`` of every target row and head, a sink included.

    Returns:
        float32 ``[R, H]``, the rows of all segments one after another.
    """
    if by_triton(inputs.query):
        from vllm_flashtrace.kernels.triton_lse import triton_lse

        return triton_lse(inputs)
    return torch_lse(inputs)


def inverse_rms(rows: PagedRows, vectors: Tensor, epsilon: float, out: Tensor) -> None:
    """Computes ``1 / sqrt(mean(x_i^2) + epsilon)`` of every target row.

    Args:
        rows: The target rows.
        vectors: ``[tokens, D]``, any float dtype, the vectors ``x``.
        epsilon: What the norm adds to the mean.
        out: float32 ``[R]``, contiguous: gets the factors, the rows of all segments one after
            another.
    """
    if by_triton(vectors):
        from vllm_flashtrace.kernels.triton_row_sums import triton_inverse_rms

        triton_inverse_rms(rows, vectors, epsilon, out)
        return
    squares = vectors[rows.places].float().square()
    torch.rsqrt(squares.mean(dim=-1).add_(epsilon), out=out)


def add_row_sums(
    rows: PagedRows,
    layer: int,
    *,
    residual: Tensor | None = None,
    stream: Tensor | None = None,
    scales: Tensor | None = None,
) -> None:
    """Adds ``sum_i w_i s_i x_i`` over each segment's rows to its accumulators ``r`` and ``x``.

    Args:
        rows: The target rows.
        layer: Layer of the accumulators.
        residual: ``[tokens, D]``, any float dtype and strides, what is added to ``r``; or None.
        stream: The same for ``x``; at least one of the two.
        scales: As in `AttentionInputs`; for one of the two alone.

    Raises:
        SumsTouchedError: See `paged_column_sums`.
    """
    given = [(to, x) for to, x in (("residual", residual), ("stream", stream)) if x is not None]
    if by_triton(given[0][1]):
        from vllm_flashtrace.kernels.triton_row_sums import triton_row_sums

        triton_row_sums(rows, layer, residual=residual, stream=stream, scales=scales)
        return
    with touching_sums():
        for to, x in given:
            for index, segment in enumerate(rows.segments):
                sums, weights = getattr(segment.sums, to), segment.weights
                if scales is not None:
                    weights = weights * rows.of_segment(scales, index)
                sums[layer] += weights @ x[as_slice(segment.rows)].float()


def by_triton(tensor: Tensor) -> bool:
    """Whether Triton's kernels compute on a tensor, and not torch."""
    return tensor.is_cuda


def torch_column_sums(inputs: AttentionInputs, layer: int, *, overwrite_keys: bool = False) -> None:
    """Torch form of `paged_column_sums`."""
    query = _plain(inputs.query)
    with touching_sums():
        for index, (segment, target) in enumerate(
            zip(inputs.rows.segments, inputs.rows.blocks, strict=True)
        ):
            keys = _keys(inputs.key_cache, segment, may_view=overwrite_keys)
            scales = lse = None
            if inputs.scales is not None:
                scales = inputs.rows.of_segment(inputs.scales, index)
            if inputs.lse is not None:
                lse = inputs.lse[:, as_slice(segment.rows)]
            sums = segment.sums.column_sums[layer]
            before = sums.sum(dim=-1) if segment.mass is not None else None
            target.add(query, keys, inputs.form, sums, scales, lse)
            if segment.mass is not None and before is not None:
                weights = segment.weights if scales is None else segment.weights * scales
                added = expected = sums.sum(dim=-1) - before
                if lse is not None:  # Else they were divided by their own sum.
                    expected = weights.sum().expand_as(expected)
                    if inputs.form.sinks is not None:
                        sunk = (inputs.form.sinks[:, None] - lse).exp() @ weights
                        expected = expected - sunk
                together = [expected, weights.sum().expand_as(expected), added]
                segment.mass[layer] += torch.stack(together, dim=1)


def torch_lse(inputs: AttentionInputs) -> Tensor:
    """Torch form of `paged_lse`."""
    query, form = _plain(inputs.query), inputs.form
    parts = []
    for segment, target in zip(inputs.rows.segments, inputs.rows.blocks, strict=True):
        keys = _keys(inputs.key_cache, segment)
        memory = target.block_memory(keys)
        for block in target.blocks:
            queries = block.queries(query, target.num_kv_heads, form.scale)
            first = form.first_visible(int(block.positions[0]))
            _, denominators, largest = block.weights_of(form, queries, keys, first, memory)
            parts.append((largest + denominators.log()).t())
    return torch.cat(parts)


def check_lse(lse: Tensor, rows: PagedRows) -> None:
    """Raises ValueError unless a log-sum-exp is one of the step's queries."""
    tokens = lse.shape[-1]
    fitting = lse.dim() == 2 and len(lse) == rows.num_heads and tokens >= rows.tokens
    if not fitting or lse.dtype != torch.float32 or (tokens > 1 and lse.stride(1) != 1):
        raise ValueError(
            f"a log-sum-exp {lse.dtype} {tuple(lse.shape)} does not fit {rows.num_heads} heads and "
            f"{rows.tokens} tokens"
        )


def _plain(query: Tensor) -> Tensor:
    """Eight-bit floats cannot be indexed."""
    return query.float() if query.itemsize == 1 else query


def _keys(key_cache: Tensor, segment: RowSegment, *, may_view: bool = False) -> Tensor:
    """float32 ``[G, d, columns]``."""
    keys = gather_tokens(key_cache, segment.block_table, segment.columns).permute(1, 2, 0)
    shares_memory = keys.untyped_storage().data_ptr() == key_cache.untyped_storage().data_ptr()
    return keys.to(torch.float32, copy=shares_memory and not may_view)
