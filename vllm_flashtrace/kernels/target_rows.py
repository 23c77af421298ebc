"""The target rows of one step: which queries they are, what they may see, where their sums go.

`PagedRows` is built once per step and used for every layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vllm_flashtrace.core.attention import TargetRowBlocks

if TYPE_CHECKING:
    from vllm_flashtrace.kernels.triton_rows import DeviceRows


class SumsTouchedError(Exception):
    """A call failed when sums may have changed: it must not be repeated. The fault is its cause."""


@contextmanager
def touching_sums() -> Iterator[None]:
    """What fails inside may have changed some sums; see `SumsTouchedError`."""
    try:
        yield
    except SumsTouchedError:
        raise
    except Exception as error:
        raise SumsTouchedError(f"{type(error).__name__}: {error}") from error


class Accumulators(NamedTuple):
    """What one trace adds up; on the device of the step.

    Attributes:
        column_sums: float32 ``[L, H, >= columns]``, weighted column sums ``c``; where rows have a
            factor for each coordinate of a head's values, ``[L, H * d, >= columns]``.
        residual: float32 ``[>= L, D]``, weighted sums ``r`` of the stream before attention.
        stream: float32 ``[>= L, D]``, weighted sums ``x`` of the stream after attention, or of what
            attention adds until ``r`` is added at the end.
    """

    column_sums: Tensor
    residual: Tensor
    stream: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class RowSegment:
    """The target rows of one trace within a step.

    Attributes:
        rows: int64 ``[R]`` in host memory, where they lie among the step's tokens.
        positions: int64 ``[R]`` in host memory, ascending: row ``i`` sees keys
            ``j <= positions[i]``.
        weights: float32 ``[R]`` in host memory, positive.
        block_table: int32 ``[blocks]`` on the step's device: token ``j`` lies in slot
            ``j % block_size`` of block ``block_table[j // block_size]``.
        sums: Where this segment's sums go.
        mass: float32 ``[L, H, 3]``, where it is added up what the column sums must add up to, the
            rows' weights without what their sinks take; the weights; and what was added to the
            column sums. Or None.
    """

    rows: Tensor
    positions: Tensor
    weights: Tensor
    block_table: Tensor
    sums: Accumulators
    mass: Tensor | None = None

    @property
    def columns(self) -> int:
        """Number of keys that the last row sees."""
        return int(self.positions.numpy()[-1]) + 1


@dataclass(frozen=True)
class PagedRows:
    """Target rows of several traces over one paged cache; no two share accumulators.

    Attributes:
        segments: At least one; each has at least one row.
        num_heads: Query heads H.
        num_kv_heads: Key/value heads G.
        device: Where queries, cache and accumulators are.
        kept_rows: Work of a segment of up to so many rows is cut for launches over all layers, see
            `KeptQueries`; that of a longer one for launches over one.
    """

    segments: tuple[RowSegment, ...]
    num_heads: int
    num_kv_heads: int
    device: torch.device
    kept_rows: int
    _first: tuple[int, ...] = field(repr=False)

    @classmethod
    def build(
        cls,
        segments: Sequence[RowSegment],
        num_heads: int,
        num_kv_heads: int,
        device: torch.device,
        kept_rows: int = 0,
    ) -> PagedRows:
        """Checks the segments and readies them for a step.

        Raises:
            ValueError: There is none, one has no rows or rows that do not fit together, or the
                heads do not.
        """
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"{num_heads} query heads are not a multiple of {num_kv_heads} key/value heads"
            )
        if not segments:
            raise ValueError("there are no target rows")
        first = [0]
        for segment in segments:
            _check(segment, num_heads)
            first.append(first[-1] + len(segment.rows))
        return cls(tuple(segments), num_heads, num_kv_heads, device, kept_rows, tuple(first))

    def with_block_tables(self, block_tables: Sequence[Tensor]) -> PagedRows:
        """The same rows over another cache, with the block table of each segment there."""
        segments = [
            replace(segment, block_table=table)
            for segment, table in zip(self.segments, block_tables, strict=True)
        ]
        for segment in segments:
            _check(segment, self.num_heads)
        return replace(self, segments=tuple(segments))

    def __len__(self) -> int:
        """Number of rows of all segments."""
        return self._first[-1]

    def columns(self, index: int) -> int:
        """Number of keys that a segment needs."""
        return self.segments[index].columns

    @cached_property
    def longest(self) -> int:
        """Rows of the segment that has most."""
        return max(after - before for before, after in pairwise(self._first))

    @cached_property
    def least_block_size(self) -> int:
        """Tokens that a block must hold for every block table to hold its segment's keys."""
        return max(-(-one.columns // max(1, one.block_table.numel())) for one in self.segments)

    def first_row(self, index: int) -> int:
        """Where a segment's rows begin when those of all segments stand in a row."""
        return self._first[index]

    def of_segment(self, numbers: Tensor, index: int) -> Tensor:
        """Those of a segment among numbers of all rows, ``[..., R]``; a view."""
        return numbers[..., self._first[index] : self._first[index + 1]]

    @cached_property
    def places(self) -> Tensor:
        """The rows of all segments among the step's tokens, ``[R]``, integers on the device."""
        if self.device.type == "cuda":
            return self.on_device.rows
        return torch.cat([segment.rows for segment in self.segments])

    @cached_property
    def tokens(self) -> int:
        """Number of tokens that a step has at least: one more than the last row."""
        return 1 + max(int(segment.rows.numpy().max()) for segment in self.segments)

    @cached_property
    def logits(self) -> int:
        """Logits of a head in a layer, at most: rows of each trace times what its last one sees."""
        return sum(len(segment.rows) * segment.columns for segment in self.segments)

    @cached_property
    def adjacent(self) -> slice | None:
        """The rows of all segments among the step's tokens, where none lies between them."""
        rows = np.concatenate([segment.rows.numpy() for segment in self.segments])
        adjacent = (rows[1:] - rows[:-1] == 1).all()
        return slice(int(rows[0]), int(rows[-1]) + 1) if adjacent else None

    @cached_property
    def in_a_row(self) -> PagedRows:
        """The same rows over a tensor that holds nothing but their queries, in their order."""
        segments = [
            replace(segment, rows=torch.arange(first, first + len(segment.rows)))
            for segment, first in zip(self.segments, self._first, strict=False)
        ]
        return replace(self, segments=tuple(segments))

    @cached_property
    def blocks(self) -> list[TargetRowBlocks]:
        """Each segment's rows in blocks, for torch."""
        return [
            TargetRowBlocks(
                segment.weights,
                segment.positions,
                self.num_heads,
                self.num_kv_heads,
                rows=segment.rows,
            )
            for segment in self.segments
        ]

    @cached_property
    def on_device(self) -> DeviceRows:
        """The same rows as tables on the device, for Triton."""
        from vllm_flashtrace.kernels.triton_rows import DeviceRows

        return DeviceRows.copy(self)


def _check(segment: RowSegment, num_heads: int) -> None:
    rows, positions, weights, table, sums = (
        segment.rows,
        segment.positions,
        segment.weights,
        segment.block_table,
        segment.sums,
    )
    if not (rows.dim() == 1 and len(rows) > 0 and rows.shape == positions.shape == weights.shape):
        raise ValueError(
            f"rows, positions and weights must be of one length, at least 1; got "
            f"{tuple(rows.shape)}, {tuple(positions.shape)} and {tuple(weights.shape)}"
        )
    ascending = positions.numpy()
    if ascending[0] < 0 or (ascending[1:] < ascending[:-1]).any():
        raise ValueError("positions must ascend and not be negative")
    if table.dim() != 1 or table.dtype != torch.int32 or table.stride(0) != 1:
        raise ValueError(
            f"a block table must be int32 [blocks] without gaps, got {table.dtype} "
            f"{tuple(table.shape)} of strides {table.stride()}"
        )
    layers, heads, columns = sums.column_sums.shape
    mass = segment.mass
    if mass is not None and (
        mass.shape != (layers, num_heads, 3)
        or mass.dtype != torch.float32
        or mass.stride()[1:] != (3, 1)
    ):
        raise ValueError(f"a mass {tuple(mass.shape)} does not fit {num_heads} heads")
    if (
        heads % num_heads
        or columns < segment.columns
        or sums.residual.shape != sums.stream.shape
        or sums.residual.shape[0] < layers
        or any(s.dtype != torch.float32 or s.stride(-1) != 1 for s in sums)
    ):
        raise ValueError(
            f"accumulators {[tuple(s.shape) for s in sums]} do not fit {num_heads} heads and "
            f"{segment.columns} columns"
        )
