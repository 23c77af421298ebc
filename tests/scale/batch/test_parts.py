"""The store of finished rows under kills at any byte."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_flashtrace.scale.batch import store as parts
from vllm_flashtrace.scale.batch.store import DamagedPartError, FinishedRows, PartsWriter

ROWS = 40


def record(row: int) -> bytes:
    return b'{"row": %d, "text": "%s"}' % (row, b"x" * (row % 7))


def run(folder: Path, batch: int) -> tuple[FinishedRows, int]:
    """Does what is left; returns how many rows it had to do."""
    finished = FinishedRows(folder, ROWS)
    left = [row for row in range(ROWS) if row not in finished]
    with PartsWriter(finished) as writer:
        for start in range(0, len(left), batch):
            writer.add([(row, record(row)) for row in left[start : start + batch]])
    return finished, len(left)


def cut(folder: Path, size: int) -> set[int]:
    """What a kill leaves of the newest part; returns the rows that were whole before the cut."""
    last = max(folder.glob("part-*.jsonl"))
    content = last.read_bytes()[:size]
    last.write_bytes(content)
    return {int(line.split(b" ")[1]) for line in content.splitlines(True) if line.endswith(b"\n")}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0, 1)), max_size=5), st.integers(1, 9))
def test_exactly_once_over_kills(kills: list[tuple[int, float]], last: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for batch, share in kills:
            before = FinishedRows(folder, ROWS).done.copy()
            run(folder, batch)
            newest = max(folder.glob("part-*.jsonl"))
            if not before.all():
                whole = cut(folder, int(share * newest.stat().st_size))
                kept = FinishedRows(folder, ROWS)
                # Neither more nor fewer than what was on disk.
                assert set(kept.done.nonzero()[0]) == whole | set(before.nonzero()[0])
        already = FinishedRows(folder, ROWS).count
        finished, done = run(folder, last)
        assert done == ROWS - already
        assert list(finished.records()) == [(row, record(row)) for row in range(ROWS)]
        assert list(FinishedRows(folder, ROWS).records()) == list(finished.records())


def test_a_row_is_kept_once(tmp_path: Path) -> None:
    finished = FinishedRows(tmp_path, ROWS)
    with PartsWriter(finished) as writer:
        assert writer.add([(3, b"first"), (3, b"second"), (4, b"other")]) == 2
        assert writer.add([(3, b"third")]) == 0
    assert list(FinishedRows(tmp_path, ROWS).records()) == [(3, b"first"), (4, b"other")]


def test_parts_have_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_PART_BYTES", 100)
    finished, _ = run(tmp_path, 2)
    assert len(list(tmp_path.glob("part-*.jsonl"))) > 3
    assert [row for row, _ in finished.records()] == list(range(ROWS))


def test_damage_that_no_kill_leaves_is_refused(tmp_path: Path) -> None:
    run(tmp_path, 5)
    [part] = tmp_path.glob("part-*.jsonl")
    content = bytearray(part.read_bytes())
    content[20] ^= 1
    part.write_bytes(content)
    with pytest.raises(DamagedPartError, match="damaged at byte 0"):
        FinishedRows(tmp_path, ROWS)


def test_rows_of_another_input_are_refused(tmp_path: Path) -> None:
    run(tmp_path, 5)
    with pytest.raises(DamagedPartError, match="row 3"):
        FinishedRows(tmp_path, 3)
