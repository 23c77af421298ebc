from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vllm_flashtrace.scale.batch import inputs
from vllm_flashtrace.scale.batch.inputs import Defaults, RowError, input_files, read_rows
from vllm_flashtrace.scale.batch.source import FileRows, scan_input


def write(path: Path, *lines: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines))
    return path


def test_lines_keep_their_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '\ufeff{"custom_id": "x"}', "", '{"prompt": "p"}', "  ")
    rows = list(read_rows("a.jsonl", path))
    assert [(row.line, row.custom_id) for row in rows] == [(1, "x"), (3, "a.jsonl:3")]


@pytest.mark.parametrize("line", ['{"custom_id": "x"', b"\xff\xfe", "[" * 100_000, "{}x"])
def test_a_bad_line_is_a_row_of_its_own(line: str | bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"custom_id": "x"}', line, '{"custom_id": "y"}')
    first, bad, last = read_rows("a.jsonl", path)
    assert (first.custom_id, bad.custom_id, last.custom_id) == ("x", "a.jsonl:2", "y")
    assert isinstance(bad.error, RowError)


def test_an_endless_line_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "LONGEST_LINE", 20)
    path = write(tmp_path / "a.jsonl", '"' + "x" * 70 + '"', '{"custom_id": "y"}')
    long, last = read_rows("a.jsonl", path)
    assert long.error is not None and "longer" in long.error.message
    assert last.custom_id == "y"


def test_parquet_nulls_are_absent_and_json_text_is_read(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi", "name": None}]
    rows = [
        {"custom_id": "a", "messages": messages, "flashtrace": '{"top_k": null}', "seed": None},
        {"custom_id": None, "messages": messages, "flashtrace": "{", "seed": 3},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = read_rows("a.parquet", tmp_path / "a.parquet")
    assert first.value == {
        "custom_id": "a",
        "messages": [{"role": "user", "content": "hi"}],
        "flashtrace": {"top_k": None},
    }
    assert second.custom_id == "a.parquet:2"
    assert second.error is not None and "flashtrace" in second.error.message


def test_a_folder_is_read_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/z.jsonl", "a/b.jsonl", "notes.txt"):
        write(tmp_path / name, "{}")
    assert [name for name, _ in input_files(tmp_path)] == ["a/b.jsonl", "a/z.jsonl", "b.jsonl"]


def test_inputs_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"gone\.jsonl"):
        input_files(tmp_path / "gone.jsonl")
    with pytest.raises(ValueError, match="neither"):
        input_files(write(tmp_path / "a.txt", "x"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no \.jsonl"):
        input_files(tmp_path / "empty")
    with pytest.raises(ValueError, match="no row"):
        scan_input(write(tmp_path / "empty.jsonl", "", ""))
    with pytest.raises(ValueError, match="cannot be read"):
        scan_input(write(tmp_path / "broken.parquet", "PAR1"))


def test_the_first_of_equal_ids_keeps_it(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", *(json.dumps({"custom_id": c}) for c in "xyx"))
    write(tmp_path / "b.jsonl", *(json.dumps({"custom_id": c}) for c in "zyx"), "{}", "{}")
    scan = scan_input(tmp_path)
    assert scan.rows == 8
    assert [(file.first, file.rows) for file in scan.files] == [(0, 3), (3, 5)]
    assert scan.duplicates.tolist() == [2, 4, 5]


def test_a_row_may_have_the_id_that_another_would_get(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"custom_id": "a.jsonl:2"}', '{"prompt": "x"}')
    assert scan_input(tmp_path).duplicates.tolist() == [1]


def test_tables_hold_the_wanted_rows(tmp_path: Path) -> None:
    lines = [json.dumps({"custom_id": str(i), "prompt": "x"}) for i in range(200)]
    write(tmp_path / "a.jsonl", *lines[:3])
    lines[7], lines[9] = "{", json.dumps({"custom_id": "8", "prompt": "x"})
    write(tmp_path / "b.jsonl", *lines)
    scan = scan_input(tmp_path / "b.jsonl")
    [file] = scan.files
    wanted = bytes(i % 2 for i in range(200))
    tables = list(FileRows(file, wanted, frozenset(scan.duplicates.tolist()), Defaults())())
    rows = pa.concat_tables(tables).to_pylist()
    assert [row["row"] for row in rows] == list(range(1, 200, 2))
    errors = {row["row"]: json.loads(row["error"])["code"] for row in rows if row["error"]}
    assert errors == {7: "invalid_json_line", 9: "duplicate_custom_id"}
    assert json.loads(rows[0]["body"]) == {"prompt": "x", "flashtrace": True}
