"""Input files of a batch, read row by row.

Invariant: reading a file twice gives the same rows with the same numbers; a line that cannot be
read is a row with an error, and only a file that cannot be read at all stops the run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_flashtrace.scale.batch.rows import RowError, custom_id_of

JSONL, PARQUET = ".jsonl", ".parquet"
LONGEST_LINE = 64 << 20
_BOM = b"\xef\xbb\xbf"
_RECORDS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it stands in its file.

    Attributes:
        line: Line of a JSONL file, or record of a Parquet file, from 1.
        custom_id: The row's own id, else its file's name and its line.
        value: What was decoded; None when ``error`` says why nothing was.
        error: Why the row cannot be read.
    """

    line: int
    custom_id: str
    value: Any
    error: RowError | None = None


def input_files(path: Path) -> list[tuple[str, Path]]:
    """The files of an input with the names that rows are known by, in sorted order.

    Args:
        path: A ``.jsonl`` or ``.parquet`` file, or a folder searched through for them.

    Raises:
        OSError: There is no such path.
        ValueError: It is neither, or the folder has none.
    """
    if not path.is_dir():
        path.stat()
        if path.suffix not in (JSONL, PARQUET):
            raise ValueError(f"{path} is neither a {JSONL} nor a {PARQUET} file")
        return [(path.name, path)]
    found = sorted(
        (file.relative_to(path).as_posix(), file)
        for file in path.rglob("*")
        if file.suffix in (JSONL, PARQUET) and file.is_file()
    )
    if not found:
        raise ValueError(f"there is no {JSONL} or {PARQUET} file in {path}")
    return found


def read_rows(name: str, path: Path) -> Iterator[RawRow]:
    """All rows of a file; blank lines are none.

    Raises:
        OSError: The file cannot be read.
        ValueError: A Parquet file is broken.
    """
    records = _records(path) if path.suffix == PARQUET else _lines(path)
    for line, value in records:
        own = f"{name}:{line}"
        if isinstance(value, RowError):
            yield RawRow(line, own, None, value)
        else:
            yield RawRow(line, custom_id_of(value) or own, value)


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as stream:
        number = 0
        while raw := stream.readline(LONGEST_LINE + 1):
            number += 1
            if len(raw) > LONGEST_LINE and not raw.endswith(b"\n"):
                while (rest := stream.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                    pass
                yield number, _malformed(f"it is longer than {LONGEST_LINE} bytes")
                continue
            text = raw.removeprefix(_BOM) if number == 1 else raw
            if text.strip():
                yield number, _decoded(text)


def _decoded(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode())
    except RecursionError:
        return _malformed("it is nested too deeply")
    except ValueError as error:
        return _malformed(str(error))


def _malformed(reason: str) -> RowError:
    return RowError("invalid_json_line", f"this line is not JSON that can be read: {reason}")


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet as pq

    number = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_RECORDS_AT_ONCE):
            for record in batch.to_pylist():
                number += 1
                yield number, plain_record(record)


def plain_record(record: dict[str, Any]) -> Any:
    """A record of a table as JSON.

    A null is an absent key. ``flashtrace`` and ``body`` may be JSON text, which keeps its nulls.

    Args:
        record: Columns by name.

    Returns:
        The value, or the `RowError` that says why there is none.
    """
    value = {name: _without_nulls(item) for name, item in record.items() if item is not None}
    for name in ("flashtrace", "body"):
        if isinstance(value.get(name), str):
            try:
                value[name] = json.loads(value[name])
            except (ValueError, RecursionError) as error:
                return RowError("invalid_row", f"{name} is a text that is not JSON: {error}")
    return value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
