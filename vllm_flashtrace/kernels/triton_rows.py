"""Target rows as tables on the device, and their work cut into pieces for the kernels.

Invariant: how a segment's work is cut depends on that segment and the tile alone, so a trace gets
the same bits beside any other traces. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_flashtrace.kernels.target_rows import PagedRows

WORK = tl.constexpr(7)
"""Numbers of a piece of work: segment, first and last row, first and last key (last exclusive),
where its result goes, and the first row (of its own) that sees all of its keys."""

REDUCTION = tl.constexpr(5)
"""Numbers of a reduction: segment, first and last key, first slot, number of slots."""

SUMS = tl.constexpr(7)
"""Numbers of a segment's accumulators: address and layer stride of the column sums, their head
stride, address and layer stride of the residual, address and layer stride of the stream."""

# Programs that keep any GPU in question busy; work of fewer programs is cut further.
_ENOUGH_PROGRAMS = 512

# Kernels are compiled for addresses and strides that are multiples of so many bytes and entries.
_ALIGNMENT = 16


class Work(NamedTuple):
    """Pieces of work, each for one program per key/value head.

    Attributes:
        items: int32 ``[pieces, 7]`` on the device, see `WORK`.
        reductions: int32 ``[reductions, 5]`` on the device, see `REDUCTION`.
        slots: Number of partial results.
    """

    items: Tensor
    reductions: Tensor
    slots: int


@dataclass(frozen=True, slots=True, eq=False)
class DeviceRows:
    """The rows of all segments, one after another.

    Attributes:
        source: Where they come from; keeps the accumulators alive.
        rows: int32 ``[R]``.
        positions: int32 ``[R]``.
        weights: float32 ``[R]``.
        log_weights: float32 ``[R]``, their logarithms to base 2.
        block_tables: int32 ``[S, blocks]``, filled up with zeros.
        sums: int64 ``[S, 7]``, see `SUMS`; strides count floats.
    """

    source: PagedRows
    rows: Tensor
    positions: Tensor
    weights: Tensor
    log_weights: Tensor
    block_tables: Tensor
    sums: Tensor
    _work: dict[tuple[int, ...], Work] = field(default_factory=dict)

    @classmethod
    def copy(cls, source: PagedRows) -> DeviceRows:
        """Copies the tables to the device, in one piece and without waiting."""
        segments = source.segments
        sums = torch.tensor([_sums_of(s.sums) for s in segments], dtype=torch.int64)
        rows = torch.cat([s.rows for s in segments]).int()
        positions = torch.cat([s.positions for s in segments]).int()
        weights = torch.cat([s.weights for s in segments]).float()
        table, rows, positions, weights, log_weights = to_device(
            [sums, rows, positions, weights, weights.log2()], source.device
        )
        tables = _stacked([s.block_table for s in segments])
        return cls(source, rows, positions, weights, log_weights, tables, table)

    def row_tiles(self, rows_per_tile: int, keys_per_tile: int, window: int) -> Work:
        """Work that goes over the keys of a tile of rows; slots are splits of the keys."""
        return self._cut(self._row_tiles, rows_per_tile, keys_per_tile, window)

    def key_tiles(self, keys_per_tile: int, rows_per_tile: int, window: int) -> Work:
        """Work that goes over the rows of a tile of keys; slot -1 adds to the sums itself."""
        return self._cut(self._key_tiles, keys_per_tile, rows_per_tile, window)

    def row_chunks(self, rows_per_chunk: int) -> Work:
        """Work on up to so many rows; slot -1 where a segment has but one chunk."""
        return self._cut(self._row_chunks, rows_per_chunk, 0, 0)

    def _cut(self, cut: Callable[[int, int, int], tuple[Tensor, Tensor, int]], *sizes: int) -> Work:
        key = (id(cut.__func__), *sizes)  # type: ignore[attr-defined]
        work = self._work.get(key)
        if work is None:
            items, reductions, slots = cut(*sizes)
            items, reductions = to_device([items.int(), reductions.int()], self.source.device)
            work = self._work[key] = Work(items, reductions, slots)
        return work

    def _row_tiles(self, rows_per_tile: int, keys_per_tile: int, window: int) -> _Cut:
        items, most = [], 1
        for index, segment in enumerate(self.source.segments):
            positions = segment.positions
            first = torch.arange(0, len(positions), rows_per_tile)
            last = (first + rows_per_tile).clamp(max=len(positions))
            stop = positions[last - 1] + 1
            start = (positions[first] - window + 1).clamp(min=0) if window else first * 0
            start = start // keys_per_tile * keys_per_tile
            longest = int((stop - start).max())
            splits = self._splits(len(first), triton.cdiv(longest, keys_per_tile))
            most = max(most, splits)
            size = triton.cdiv(triton.cdiv(longest, splits), keys_per_tile) * keys_per_tile
            number = ((stop - start + size - 1) // size).flip(0)  # The longest tiles first.
            tile = torch.arange(len(first)).flip(0).repeat_interleave(number)
            split = _counted(number)
            begin = start[tile] + split * size
            end = torch.minimum(begin + size, stop[tile])
            row = self.source.first_row(index)
            columns = [first[tile] + row, last[tile] + row, begin, end, split, last[tile] + row]
            items.append(_numbered(index, columns))
        return torch.cat(items), torch.empty(0, REDUCTION.value), most

    def _key_tiles(self, keys_per_tile: int, rows_per_tile: int, window: int) -> _Cut:
        items, reductions, slots = [], [], 0
        for index, segment in enumerate(self.source.segments):
            positions, count = segment.positions, len(segment.positions)
            start = torch.arange(0, segment.columns, keys_per_tile)
            stop = (start + keys_per_tile).clamp(max=segment.columns)
            first = torch.searchsorted(positions, start)
            last = torch.full_like(first, count)
            if window:
                last = torch.searchsorted(positions, stop - 1 + window)
            splits = self._splits(len(start), triton.cdiv(count, rows_per_tile))
            size = triton.cdiv(triton.cdiv(count, splits), rows_per_tile) * rows_per_tile
            number = (last - first + size - 1).clamp(min=0) // size
            tile = torch.arange(len(start)).repeat_interleave(number)
            split = _counted(number)
            begin = first[tile] + split * size
            end = torch.minimum(begin + size, last[tile])
            several = number > 1
            first_slot = slots + (number * several).cumsum(0) - number * several
            slot = torch.where(several[tile], first_slot[tile] + split, -1)
            slots += int((number * several).sum())
            row = self.source.first_row(index)
            full = torch.searchsorted(positions, stop - 1)[tile].clamp(begin, end)
            if window:
                full = end
            columns = [begin + row, end + row, start[tile], stop[tile], slot, full + row]
            items.append(_numbered(index, columns))
            reductions.append(_numbered(index, [start, stop, first_slot, number])[several])
        return torch.cat(items), torch.cat(reductions), slots

    def _row_chunks(self, rows_per_chunk: int, *_: int) -> _Cut:
        items, reductions, slots = [], [], 0
        for index, segment in enumerate(self.source.segments):
            first = torch.arange(0, len(segment.rows), rows_per_chunk)
            last = (first + rows_per_chunk).clamp(max=len(segment.rows))
            slot = torch.full_like(first, -1)
            if len(first) > 1:
                slot = slots + torch.arange(len(first))
                reductions.append(torch.tensor([[index, 0, 0, slots, len(first)]]))
                slots += len(first)
            row, zero = self.source.first_row(index), first * 0
            columns = [first + row, last + row, zero, zero, slot, first + row]
            items.append(_numbered(index, columns))
        reductions = reductions or [torch.empty(0, REDUCTION.value)]
        return torch.cat(items), torch.cat(reductions), slots

    def _splits(self, tiles: int, most: int) -> int:
        programs = tiles * self.source.num_kv_heads
        return max(1, min(triton.cdiv(_ENOUGH_PROGRAMS, programs), most))


_Cut = tuple[Tensor, Tensor, int]


def _sums_of(sums: Sequence[Tensor]) -> list[int]:
    column_sums, residual, stream = sums
    return [
        column_sums.data_ptr(),
        column_sums.stride(0),
        column_sums.stride(1),
        residual.data_ptr(),
        residual.stride(0),
        stream.data_ptr(),
        stream.stride(0),
    ]


def _numbered(segment: int, columns: Sequence[Tensor]) -> Tensor:
    """A table of columns behind one that names the segment."""
    return torch.stack([torch.full_like(columns[0], segment), *columns], 1)


def _counted(number: Tensor) -> Tensor:
    """``0..n-1`` for every ``n``, one after another."""
    ends = number.cumsum(0)
    return torch.arange(int(ends[-1])) - (ends - number).repeat_interleave(number)


def _stacked(tables: Sequence[Tensor]) -> Tensor:
    width = triton.cdiv(max(len(table) for table in tables), _ALIGNMENT) * _ALIGNMENT
    stacked = tables[0].new_zeros(len(tables), width)
    for row, table in zip(stacked, tables, strict=True):
        row[: len(table)] = table
    return stacked


def to_device(tables: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copies tables of the host in one piece; the host goes on at once.

    Each begins at a multiple of as many bytes as kernels are compiled for.
    """
    starts, end = [], 0
    for table in tables:
        starts.append(end)
        end += triton.cdiv(table.nbytes, _ALIGNMENT) * _ALIGNMENT
    packed = torch.zeros(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for table, start in zip(tables, starts, strict=True):
        packed[start : start + table.nbytes] = table.contiguous().flatten().view(torch.uint8)
    packed = packed.to(device, non_blocking=True)
    return [
        packed[start : start + table.nbytes].view(table.dtype).view(table.shape)
        for table, start in zip(tables, starts, strict=True)
    ]
