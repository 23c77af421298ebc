"""Target rows: what is refused, how their work is cut, and their sums of the stream."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.attention import CPU, HIDDEN, Shape, make_case
from vllm_flashtrace.kernels import (
    Accumulators,
    PagedRows,
    RowSegment,
    add_row_sums,
    inverse_rms,
    triton_rows,
)
from vllm_flashtrace.kernels.triton_row_sums import triton_inverse_rms, triton_row_sums

SHAPE = Shape(groups=2, shared=1, dim=64)


@st.composite
def targets(draw: st.DrawFn) -> list[list[int]]:
    position = st.integers(0, 200)
    one = st.lists(position, min_size=1, max_size=40, unique=True).map(sorted)
    return draw(st.lists(one, min_size=1, max_size=3))


def paged_rows(positions: list[list[int]]) -> PagedRows:
    segments = []
    for own in positions:
        sums = Accumulators(
            torch.zeros(1, 2, own[-1] + 1), torch.zeros(1, HIDDEN), torch.zeros(1, HIDDEN)
        )
        table = torch.zeros(13, dtype=torch.int32)
        weights = torch.ones(len(own))
        segments.append(RowSegment(torch.arange(len(own)), torch.tensor(own), weights, table, sums))
    return PagedRows.build(segments, 2, 2, CPU)


@settings(deadline=None, max_examples=80)
@given(
    targets(),
    st.sampled_from([1, 3, 8]),
    st.sampled_from([4, 16]),
    st.sampled_from([(0, 0), (1, 0), (5, 0), (1000, 0), (0, 1), (0, 7), (0, 32), (0, 1000)]),
    st.sampled_from([1, 40, 4096]),
)
def test_every_pair_is_in_one_piece_of_work(positions, row_tile, key_tile, sight, enough) -> None:
    window, chunk = sight
    rows = paged_rows(positions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_rows, "_ENOUGH_PROGRAMS", enough)
        by_rows = rows.on_device.row_tiles(row_tile, key_tile, *sight)
        by_keys = rows.on_device.key_tiles(key_tile, row_tile, *sight)
    for work, is_split in ((by_rows, True), (by_keys, False)):
        times = [torch.zeros(len(own), own[-1] + 1, dtype=torch.int64) for own in positions]
        for segment, first, last, start, stop, slot, full in work.items.tolist():
            first, last = first - rows.first_row(segment), last - rows.first_row(segment)
            assert 0 <= first < last <= len(positions[segment])
            own = positions[segment][full - rows.first_row(segment) : last]
            assert full >= first + rows.first_row(segment)
            assert all(position >= stop - 1 for position in own) and not (own and any(sight))
            assert 0 <= start < stop <= positions[segment][-1] + 1
            assert slot < max(1, work.slots)
            times[segment][first:last, start:stop] += 1
            if is_split:
                assert last - first <= row_tile and start % key_tile == 0 and slot >= 0
            else:
                assert stop - start <= key_tile and start % key_tile == 0
        for count, own in zip(times, positions, strict=True):
            queries, keys = torch.tensor(own)[:, None], torch.arange(own[-1] + 1)
            seen = queries >= keys
            if window:
                seen &= queries - keys < window
            if chunk:
                seen &= queries // chunk == keys // chunk
            assert (count[seen] == 1).all() and (count <= 1).all()


@settings(deadline=None, max_examples=60)
@given(targets(), st.sampled_from([1, 40, 4096]))
def test_parts_of_a_key_tile_are_found_again(positions, enough) -> None:
    rows = paged_rows(positions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_rows, "_ENOUGH_PROGRAMS", enough)
        work = rows.on_device.key_tiles(16, 8, 0, 0)
    written = {
        slot: (s, start, stop) for s, _, _, start, stop, slot, _ in work.items.tolist() if slot >= 0
    }
    assert sorted(written) == list(range(work.slots))
    found = {}
    for segment, start, stop, first_slot, slots in work.reductions.tolist():
        assert slots > 1
        for slot in range(first_slot, first_slot + slots):
            found[slot] = (segment, start, stop)
    assert found == written


@settings(deadline=None, max_examples=30)
@given(targets(), st.sampled_from([1, 4096]))
def test_work_of_a_segment_does_not_depend_on_the_others(positions, enough) -> None:
    def cut(rows: PagedRows, index: int) -> list[list[int]]:
        work = rows.on_device.key_tiles(16, 8, 0, 0)
        return [
            [first - rows.first_row(index), last - rows.first_row(index), start, stop]
            for segment, first, last, start, stop, *_ in work.items.tolist()
            if segment == index
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_rows, "_ENOUGH_PROGRAMS", enough)
        together = paged_rows(positions)
        for index, own in enumerate(positions):
            assert cut(together, index) == cut(paged_rows([own]), 0)


@pytest.mark.parametrize("given", [("residual",), ("stream",), ("residual", "stream")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strided", [False, True])
def test_row_sums(given, dtype: torch.dtype, strided: bool) -> None:
    """More rows than are added at a time, few rows, one row; some rows of the stream are NaN."""
    case = make_case(SHAPE, [[*range(10, 200)], [3, 9], [7]])
    generator = torch.Generator().manual_seed(0)
    streams = {}
    for to in given:
        stream = torch.full((len(case.query), 2 * HIDDEN), torch.nan)
        for segment in case.rows.segments:
            rows = len(segment.rows)
            stream[segment.rows] = torch.randn(rows, 2 * HIDDEN, generator=generator)
        streams[to] = stream.to(dtype)[:, ::2] if strided else stream.to(dtype)[:, :HIDDEN]
    for layer, function in ((1, add_row_sums), (2, triton_row_sums), (2, triton_row_sums)):
        function(case.rows, layer, **streams)
    for segment in case.rows.segments:
        for to in ("residual", "stream"):
            sums = getattr(segment.sums, to)
            assert not sums[0].any()
            if to not in given:
                assert not sums.any()
                continue
            expected = segment.weights.double() @ streams[to][segment.rows].double()
            torch.testing.assert_close(sums[1].double(), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(sums[2].double(), 2 * expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_scaled_by_their_size(dtype: torch.dtype) -> None:
    case = make_case(SHAPE, [[*range(10, 80)], [3, 9], [7]])
    hidden, epsilon = 1031, 1e-3  # More than are squared at a time.
    size = torch.rand(len(case.query), 1, generator=torch.Generator().manual_seed(1))
    vectors = size * torch.randn(len(case.query), hidden, generator=torch.Generator())
    vectors = vectors.to(dtype)
    expected = (vectors.double().square().mean(1) + epsilon).rsqrt()
    places = torch.cat([segment.rows for segment in case.rows.segments])
    for form in (inverse_rms, triton_inverse_rms):
        scales = torch.empty(len(case.rows))
        form(case.rows, vectors, epsilon, scales)
        torch.testing.assert_close(scales.double(), expected[places], rtol=1e-6, atol=0)
    stream = vectors[:, :HIDDEN]
    for layer, function in ((1, add_row_sums), (2, triton_row_sums)):
        function(case.rows, layer, stream=stream, scales=scales)
    for segment in case.rows.segments:
        weights = segment.weights.double() * expected[segment.rows]
        theirs = weights @ stream[segment.rows].double()
        assert not segment.sums.residual.any()
        for layer in (1, 2):
            ours = segment.sums.stream[layer].double()
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_rows_that_lie_side_by_side_are_known() -> None:
    segments = [
        replace(one, rows=rows)
        for one, rows in zip(
            paged_rows([[2, 3], [5]]).segments,
            (torch.tensor([4, 5]), torch.tensor([6])),
            strict=True,
        )
    ]
    assert PagedRows.build(segments, 2, 2, CPU).adjacent == slice(4, 7)
    for rows in (torch.tensor([7]), torch.tensor([3])):
        apart = [segments[0], replace(segments[1], rows=rows)]
        assert PagedRows.build(apart, 2, 2, CPU).adjacent is None
    gap = [replace(segments[0], rows=torch.tensor([4, 6])), replace(segments[1], rows=rows + 2)]
    assert PagedRows.build(gap, 2, 2, CPU).adjacent is None


def test_rows_that_do_not_fit_are_refused() -> None:
    segment = make_case(SHAPE, [[3, 4, 9]]).rows.segments[0]
    sums = segment.sums
    wrong = {
        "of one length": {"weights": torch.ones(2)},
        "at least 1": {
            "rows": segment.rows[:0],
            "positions": segment.rows[:0],
            "weights": torch.ones(0),
        },
        "ascend": {"positions": torch.tensor([4, 3, 9])},
        "not be negative": {"positions": torch.tensor([-1, 3, 9])},
        "must be int32": {"block_table": segment.block_table.long()},
        "without gaps": {"block_table": segment.block_table.repeat(2)[::2]},
        "do not fit 2 heads": {"sums": sums._replace(column_sums=sums.column_sums[:, :1])},
        "9 columns|10 columns": {"sums": sums._replace(column_sums=sums.column_sums[..., :9])},
        "accumulators": {"sums": sums._replace(stream=sums.stream.double())},
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            PagedRows.build([replace(segment, **change)], 2, 2, CPU)
    with pytest.raises(ValueError, match="no target rows"):
        PagedRows.build([], 2, 2, CPU)
    with pytest.raises(ValueError, match="not a multiple of 3"):
        PagedRows.build([segment], 2, 3, CPU)
