"""The files of an input: a first pass that numbers and checks all rows, and the rows for Ray Data.

Both depend on the files' names and bytes alone. Of two rows with one id the first in input order
keeps it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_flashtrace.scale.batch.inputs import (
    Defaults,
    RawRow,
    RowError,
    input_files,
    read_rows,
    request_of,
)

if TYPE_CHECKING:
    import pyarrow as pa

_DIGEST = 16
_ROWS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file of an input.

    Attributes:
        name: Its path within the input; rows are known by it.
        path: Where it lies.
        sha256: Of its bytes, in hex.
        first: Number of its first row over all files, from 0.
        rows: How many rows it has.
    """

    name: str
    path: Path
    sha256: str
    first: int
    rows: int


@dataclass(frozen=True, slots=True)
class Scan:
    """What an input holds.

    Attributes:
        files: In input order.
        rows: Of all files.
        duplicates: Numbers of the rows whose id an earlier row has, int64 ``[D]``, sorted.
    """

    files: Sequence[InputFile]
    rows: int
    duplicates: np.ndarray


def scan_input(path: Path) -> Scan:
    """Reads every row once; 16 bytes a row are kept meanwhile.

    Raises:
        OSError: A file cannot be read.
        ValueError: There is no row, or a file is broken.
    """
    files: list[InputFile] = []
    digests = bytearray()
    for name, file in input_files(path):
        first = len(digests) // _DIGEST
        try:
            for row in read_rows(name, file):
                digests += hashlib.blake2b(row.custom_id.encode(), digest_size=_DIGEST).digest()
        except ValueError as error:  # pyarrow's errors among them.
            raise ValueError(f"{file} cannot be read: {error}") from None
        with file.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        files.append(InputFile(name, file, sha256, first, len(digests) // _DIGEST - first))
    if not digests:
        raise ValueError(f"there is no row in {path}")
    return Scan(files, len(digests) // _DIGEST, _later_ones(bytes(digests)))


def _later_ones(digests: bytes) -> np.ndarray:
    """Positions whose digest occurs at an earlier one."""
    values = np.frombuffer(digests, dtype=[("high", "<u8"), ("low", "<u8")])
    order = np.lexsort((values["low"], values["high"]))  # Stable: ties stay in input order.
    ordered = values[order]
    return np.sort(order[1:][ordered[1:] == ordered[:-1]])


@dataclass(frozen=True, slots=True)
class FileRows:
    """What one read task reads.

    Attributes:
        file: The file.
        wanted: A byte for each of its rows; 0 where it is finished or was not asked for.
        duplicates: Its rows (numbers over all files) whose id an earlier row has.
        defaults: What rows get where they say nothing.
    """

    file: InputFile
    wanted: bytes
    duplicates: frozenset[int]
    defaults: Defaults

    def __call__(self) -> Iterator[pa.Table]:
        """The wanted rows, some at a time."""
        pending: list[dict[str, Any]] = []
        for number, raw in enumerate(read_rows(self.file.name, self.file.path)):
            if number >= len(self.wanted):
                raise RuntimeError(f"{self.file.path} has grown since the run began")
            if self.wanted[number]:
                pending.append(self._row(self.file.first + number, raw))
            if len(pending) == _ROWS_AT_ONCE:
                yield request_table(pending)
                pending = []
        if pending:
            yield request_table(pending)

    def _row(self, row: int, raw: RawRow) -> dict[str, Any]:
        error = raw.error
        if error is None and row in self.duplicates:
            error = RowError("duplicate_custom_id", f"custom_id {raw.custom_id!r} is taken already")
        columns = {"row": row, "source": self.file.name, "line": raw.line}
        return columns | request_columns(raw.custom_id, raw.value, self.defaults, error)


def request_columns(
    custom_id: str, value: Any, defaults: Defaults, error: RowError | None = None
) -> dict[str, Any]:
    """A row's columns ``custom_id``, ``url``, ``body`` and ``error``; the latter two are JSON.

    Args:
        custom_id: The row's id.
        value: The row as decoded.
        defaults: What it gets where it says nothing.
        error: Known already to be wrong with it.
    """
    columns: dict[str, Any] = {"custom_id": custom_id, "url": None, "body": None, "error": None}
    try:
        if error is not None:
            raise error
        request = request_of(value, defaults)
        return columns | {"url": request.url, "body": json.dumps(request.body)}
    except RowError as refused:
        return columns | {"error": json.dumps(refused.to_dict())}
    except (TypeError, ValueError) as refused:  # A Parquet file may hold dates, bytes, ….
        unusable = RowError("invalid_row", f"the row is not JSON: {refused}")
        return columns | {"error": json.dumps(unusable.to_dict())}


def request_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows as the table that replicas take."""
    import pyarrow as pa

    text, integer = pa.large_string(), pa.int64()
    schema = pa.schema(
        [
            ("row", integer),
            ("source", text),
            ("line", integer),
            ("custom_id", text),
            ("url", text),
            ("body", text),
            ("error", text),
        ]
    )
    return pa.Table.from_pylist(rows, schema=schema)
