"""Target rows as tables on the device, and their work cut into pieces for the kernels.

Invariant: how a segment's work is cut depends on that segment and the tile alone, so a trace gets
the same bits beside any other traces. Nothing here waits for the device, and the host's time does
not grow with the number of segments by more than an array operation does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, overload

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from vllm_flashtrace.kernels.target_rows import Accumulators, PagedRows

WORK = tl.constexpr(7)
"""Numbers of a piece of work: segment, first and last row, first and last key (last exclusive),
where its result goes, and the first row (of its own) that sees all of its keys."""

REDUCTION = tl.constexpr(5)
"""Numbers of a reduction: segment, first and last key, first slot, number of slots."""

SEGMENT = tl.constexpr(12)
"""Numbers of a segment: address and layer stride of the column sums, their head stride, address and
layer stride of the residual, address and layer stride of the stream, address of the block table,
first and last row (exclusive), address of the mass, or 0, and its layer stride."""

# Programs that keep any GPU in question busy; work of fewer programs is cut further.
_ENOUGH_PROGRAMS = 512

# Kernels are compiled for addresses that are multiples of so many bytes.
_ALIGNMENT = 16

_TYPES = {np.dtype(name).char: getattr(torch, name) for name in ("int32", "int64", "float32")}

# Above every position; the rows of all segments then ascend.
_FAR = 1 << 40

_Ints = NDArray[np.int64]


class Work(NamedTuple):
    """Pieces of work, each for one program per key/value head and layer.

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
        source: Where they come from; keeps accumulators and block tables alive.
        rows: int32 ``[R]``.
        positions: int32 ``[R]``.
        weights: float32 ``[R]``.
        log_weights: float32 ``[R]``, their logarithms to base 2.
        segments: int64 ``[S, 12]``, see `SEGMENT`; strides count floats.
    """

    source: PagedRows
    rows: Tensor
    positions: Tensor
    weights: Tensor
    log_weights: Tensor
    segments: Tensor
    _host: _HostRows
    _work: dict[tuple[str, tuple[int, ...]], Work] = field(default_factory=dict)

    @classmethod
    def copy(cls, source: PagedRows) -> DeviceRows:
        """Copies the tables to the device, in one piece and without waiting."""
        host = _HostRows(source)
        numbers = [
            [
                *numbers_of_sums(segment.sums),
                segment.block_table.data_ptr(),
                first,
                last,
                *_numbers_of_mass(segment.mass),
            ]
            for segment, first, last in zip(
                source.segments, host.first, host.first + host.count, strict=True
            )
        ]
        of_rows = np.concatenate([s.weights.numpy() for s in source.segments]).astype(np.float32)
        rows = np.concatenate([s.rows.numpy() for s in source.segments])
        segments, places, positions, weights, log_weights = to_device(
            [
                np.array(numbers, np.int64),
                rows.astype(np.int32),
                host.positions.astype(np.int32),
                of_rows,
                np.log2(of_rows),
            ],
            source.device,
        )
        return cls(source, places, positions, weights, log_weights, segments, host)

    def row_tiles(self, rows_per_tile: int, keys_per_tile: int, window: int, chunk: int) -> Work:
        """Work that goes over the keys of a tile of rows; slots are splits of the keys.

        Window and chunk are those of `AttentionForm`, or 0.
        """
        return self._cut(self._host.row_tiles, rows_per_tile, keys_per_tile, window, chunk)

    def key_tiles(self, keys_per_tile: int, rows_per_tile: int, window: int, chunk: int) -> Work:
        """Work that goes over the rows of a tile of keys; slot -1 adds to the sums itself."""
        return self._cut(self._host.key_tiles, keys_per_tile, rows_per_tile, window, chunk)

    def _cut(self, cut: Callable[..., tuple[_Ints, _Ints, int]], *sizes: int) -> Work:
        key = (cut.__name__, sizes)
        if key not in self._work:
            *tables, slots = cut(*sizes)
            tables = [table.astype(np.int32) for table in tables]
            items, reductions = to_device(tables, self.source.device)
            self._work[key] = Work(items, reductions, slots)
        return self._work[key]


class _HostRows:
    """What the work of all segments is cut by; numbers per segment are int64 ``[S]``.

    Attributes:
        positions: int64 ``[R]``, of all segments one after another.
        first: Where a segment's rows begin among them.
        count: Its number of rows.
        columns: Number of keys that its last row sees.
        programs: Programs of a launch for each of its tiles.
    """

    def __init__(self, rows: PagedRows) -> None:
        positions = [segment.positions.numpy() for segment in rows.segments]
        layers = np.array([len(segment.sums.column_sums) for segment in rows.segments])
        self.positions: _Ints = np.concatenate(positions)
        self.count = np.array([len(own) for own in positions])
        self.first = self.count.cumsum() - self.count
        self.columns = self.positions[self.first + self.count - 1] + 1
        self.programs = rows.num_kv_heads * np.where(self.count <= rows.kept_rows, layers, 1)
        self._segment = np.arange(len(positions)).repeat(self.count)
        self._ascending = self.positions + self._segment * _FAR

    def row_tiles(
        self, rows_per_tile: int, keys_per_tile: int, window: int, chunk: int
    ) -> tuple[_Ints, _Ints, int]:
        """See `DeviceRows.row_tiles`."""
        tiles = cdiv(self.count, rows_per_tile)
        segment, tile = counted(tiles)
        first = tile * rows_per_tile
        last = np.minimum(first + rows_per_tile, self.count[segment])
        row = self.first[segment]
        stop = self.positions[row + last - 1] + 1
        start = np.zeros_like(stop)
        if window:
            start = np.maximum(self.positions[row + first] - window + 1, 0)
        if chunk:
            start = self.positions[row + first] // chunk * chunk
        start = start // keys_per_tile * keys_per_tile
        longest = np.maximum.reduceat(stop - start, tiles.cumsum() - tiles)
        splits = self._splits(tiles, cdiv(longest, keys_per_tile))
        size = (cdiv(cdiv(longest, splits), keys_per_tile) * keys_per_tile)[segment]
        # A segment's longest tiles first.
        tile, split = counted(cdiv(stop - start, size)[::-1])
        tile = len(segment) - 1 - tile
        begin = start[tile] + split * size[tile]
        end = np.minimum(begin + size[tile], stop[tile])
        last = (last + row)[tile]
        columns = [segment[tile], (first + row)[tile], last, begin, end, split, last]
        return np.stack(columns, 1), np.empty((0, REDUCTION.value), np.int64), int(splits.max())

    def key_tiles(
        self, keys_per_tile: int, rows_per_tile: int, window: int, chunk: int
    ) -> tuple[_Ints, _Ints, int]:
        """See `DeviceRows.key_tiles`."""
        tiles = cdiv(self.columns, keys_per_tile)
        segment, tile = counted(tiles)
        start = tile * keys_per_tile
        stop = np.minimum(start + keys_per_tile, self.columns[segment])
        first, last = self._seeing(segment, start), (self.first + self.count)[segment]
        full = self._seeing(segment, stop - 1)
        if window:
            last = self._seeing(segment, stop - 1 + window)
        if chunk:
            last = self._seeing(segment, ((stop - 1) // chunk + 1) * chunk)
        splits = self._splits(tiles, cdiv(self.count, rows_per_tile))
        size = (cdiv(cdiv(self.count, splits), rows_per_tile) * rows_per_tile)[segment]
        number = np.maximum(cdiv(last - first, size), 0)
        several = number > 1
        parts = number * several
        first_slot = parts.cumsum() - parts
        reductions = np.stack([segment, start, stop, first_slot, number], 1)[several]
        tile, split = counted(number)
        begin = first[tile] + split * size[tile]
        end = np.minimum(begin + size[tile], last[tile])
        slot = np.where(several[tile], first_slot[tile] + split, -1)
        full = end if window or chunk else np.clip(full[tile], begin, end)
        columns = [segment[tile], begin, end, start[tile], stop[tile], slot, full]
        return np.stack(columns, 1), reductions, int(parts.sum())

    def _seeing(self, segment: _Ints, key: _Ints) -> _Ints:
        """The first row of each segment at a key's position or behind it."""
        return np.searchsorted(self._ascending, segment * _FAR + key)

    def _splits(self, tiles: _Ints, most: _Ints) -> _Ints:
        return np.maximum(1, np.minimum(cdiv(_ENOUGH_PROGRAMS, tiles * self.programs), most))


def numbers_of_sums(sums: Accumulators) -> list[int]:
    """The first seven numbers of `SEGMENT`."""
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


def _numbers_of_mass(mass: Tensor | None) -> tuple[int, int]:
    """The last two numbers of `SEGMENT`."""
    return (0, 0) if mass is None else (mass.data_ptr(), mass.stride(0))


@overload
def cdiv(numbers: int, by: int) -> int: ...


@overload
def cdiv(numbers: _Ints, by: _Ints | int) -> _Ints: ...


@overload
def cdiv(numbers: int, by: _Ints) -> _Ints: ...


def cdiv(numbers: Any, by: Any) -> Any:
    """Quotients, rounded up; Triton's own function takes as long as a launch."""
    return -(-numbers // by)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not below a positive number, as Triton's own gives it."""
    return 1 << (number - 1).bit_length()


def counted(numbers: _Ints) -> tuple[_Ints, _Ints]:
    """For every ``n`` its place, ``n`` times, and ``0..n-1``."""
    places = np.arange(len(numbers)).repeat(numbers)
    starts = numbers.cumsum() - numbers
    return places, np.arange(len(places)) - starts[places]


def to_device(tables: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Copies in one piece; the host goes on at once.

    Each begins at a multiple of as many bytes as kernels are compiled for. PyTorch hands out again
    page-locked memory that the device has read, so after some steps none is allocated here.
    """
    starts, end = [], 0
    for table in tables:
        starts.append(end)
        end += -(-table.nbytes // _ALIGNMENT) * _ALIGNMENT
    packed = torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
    memory = packed.numpy()
    for table, start in zip(tables, starts, strict=True):
        place = memory[start : start + table.nbytes].view(table.dtype)
        place.reshape(table.shape)[...] = table
    packed = packed.to(device, non_blocking=True)
    parts = []
    for table, start in zip(tables, starts, strict=True):
        part = packed[start : start + table.nbytes].view(_TYPES[table.dtype.char])
        parts.append(part if table.ndim == 1 else part.view(table.shape))
    return parts
