"""The output folder of a run: its manifest, the store of finished rows, and the final files.

A row that :meth:`PartsWriter.add` returned for is on disk, and is kept once, the first time. A line
that a kill cut off counts for nothing; any other damage is an error. A folder belongs to one run,
known by the fingerprint in its manifest, and one process at a time works in it.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import numpy as np

from vllm_flashtrace.base.errors import FlashTraceError
from vllm_flashtrace.scale.batch.results import Outcome, make_table, result_schema, table_rows

MANIFEST, LOCK, PARTS = "manifest.json", ".lock", "parts"
OUTPUT, ERRORS, RESULTS = "output.jsonl", "errors.jsonl", "results.parquet"
_FORMAT = 1
_PART_BYTES = 1 << 30  # Few enough to hold all parts of a run open at once.
_NOWHERE = -1
_ROW_GROUP = 512


class OutputFolderError(FlashTraceError):
    """The output folder is in use, or holds results of another run."""

    def __init__(self, message: str) -> None:
        super().__init__("output_folder", message)


@dataclass(frozen=True, slots=True)
class Manifest:
    """One run.

    Attributes:
        facts: Everything that the results depend on, as JSON.
        finished: Whether the final files are written.
    """

    facts: Mapping[str, Any]
    finished: bool = False

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the facts, in hex."""
        return sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Replaces the folder's manifest in one step."""
        content = {"format": _FORMAT, "fingerprint": self.fingerprint, "finished": self.finished}
        with replacing(folder / MANIFEST) as path:
            path.write_text(json.dumps({**content, "run": self.facts}, indent=2) + "\n", "utf-8")


def claim(folder: Path, facts: Mapping[str, Any]) -> Manifest:
    """The manifest of this run in ``folder``: the one that is there, or a new one.

    Args:
        folder: The output folder, locked by the caller.
        facts: Everything that the results depend on, as JSON.

    Raises:
        OutputFolderError: The folder holds results of another run; the message names what
            differs.
    """
    path = folder / MANIFEST
    if not path.exists():
        for name in (OUTPUT, ERRORS, RESULTS, PARTS):
            if (folder / name).exists():
                raise OutputFolderError(f"{folder} has {name} but no {MANIFEST}; use another one")
        manifest = Manifest(facts)
        manifest.write(folder)
        return manifest
    try:
        content = json.loads(path.read_text("utf-8"))
        earlier, finished = content["run"], bool(content["finished"])
        known = content["format"] == _FORMAT
    except (ValueError, KeyError, TypeError) as error:
        raise OutputFolderError(f"{path} is damaged: {error!r}") from None
    if not known:
        raise OutputFolderError(f"{path} is of another version of vllm-flashtrace")
    differing = [
        name for name in sorted({*earlier, *facts}) if earlier.get(name) != facts.get(name)
    ]
    if differing and not finished and not has_rows(folder / PARTS):
        manifest = Manifest(facts)  # The earlier run came to nothing.
        manifest.write(folder)
        return manifest
    if differing:
        raise OutputFolderError(
            f"{folder} holds results of another run (other {', '.join(differing)}); "
            "use another output folder"
        )
    return Manifest(facts, finished)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps other runs out of it; a kill releases it.

    Raises:
        OSError: It cannot be made or written.
        OutputFolderError: Another run works in it.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise OutputFolderError(f"another run is working in {folder}") from None
    with lock:
        lock.release()  # ``with`` holds it once more.
        yield


@dataclass(frozen=True, slots=True)
class Totals:
    """Rows of the whole input by what became of them."""

    rows: int
    errors: int
    failed_traces: int


def finish(folder: Path, manifest: Manifest, finished: FinishedRows) -> Totals:
    """Writes ``output.jsonl``, ``errors.jsonl`` and ``results.parquet``; drops the store.

    Rows are in input order. A file appears whole or not at all, and the store goes only after the
    manifest says that the files are there, so that the step can be done again at any time.

    Args:
        folder: The output folder.
        manifest: The run's.
        finished: Every row of the input.
    """
    import pyarrow.parquet as pq

    fingerprint = manifest.fingerprint
    rows = errors = failed = 0
    pending: list[dict[str, Any]] = []
    with ExitStack() as stack:
        drafts = [stack.enter_context(replacing(folder / n)) for n in (OUTPUT, ERRORS, RESULTS)]
        files = [stack.enter_context(draft.open("w", encoding="ascii")) for draft in drafts[:2]]
        writer = stack.enter_context(pq.ParquetWriter(drafts[2], result_schema()))
        for _, record in finished.records():
            outcome = Outcome.from_json(record)
            is_error = outcome.error is not None
            files[is_error].write(json.dumps(outcome.to_batch_record(fingerprint)) + "\n")
            table = table_rows(outcome)
            rows, errors = rows + 1, errors + is_error
            failed += any(row["status"] in ("failed", "skipped") for row in table)
            pending += table
            if len(pending) >= _ROW_GROUP:
                writer.write_table(make_table(pending))
                pending = []
        if pending:
            writer.write_table(make_table(pending))
    replace(manifest, finished=True).write(folder)
    drop_store(folder)
    return Totals(rows, errors, failed)


def drop_store(folder: Path) -> None:
    """Deletes the store of a finished run.

    Raises:
        OutputFolderError: A final file is missing.
    """
    for name in (OUTPUT, ERRORS, RESULTS):
        if not (folder / name).exists():
            raise OutputFolderError(f"the run in {folder} had finished, but {name} is gone")
    if (folder / PARTS).exists():
        shutil.rmtree(folder / PARTS)


class DamagedPartError(FlashTraceError):
    """A part holds something that no kill can leave behind."""

    def __init__(self, message: str) -> None:
        super().__init__("damaged_part", message)


class FinishedRows:
    """Where every finished row is: its part and offset, 12 bytes for each row of the input."""

    def __init__(self, folder: Path, rows: int) -> None:
        """Reads what earlier runs left in ``folder``.

        Args:
            folder: Holds the parts; made if need be.
            rows: Rows of the input.

        Raises:
            DamagedPartError: A part is damaged, or holds a row that the input has not.
        """
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self._part = np.full(rows, _NOWHERE, dtype=np.int32)
        self._offset = np.zeros(rows, dtype=np.int64)
        self.count = 0
        self.parts = 0
        for path in sorted(folder.glob("part-*.jsonl")):
            number = int(path.stem.removeprefix("part-"))
            self.parts = number + 1
            for offset, row in _intact_lines(path):
                self.note(row, number, offset)

    def __contains__(self, row: int) -> bool:
        return bool(self._part[row] != _NOWHERE)

    @property
    def done(self) -> np.ndarray:
        """Whether each row is finished, bool ``[rows]``."""
        done: np.ndarray = self._part != _NOWHERE
        return done

    def note(self, row: int, part: int, offset: int) -> None:
        """Notes where a row is, unless it is known already.

        Raises:
            DamagedPartError: The input has no such row.
        """
        if not 0 <= row < len(self._part):
            raise DamagedPartError(f"{part_path(self.folder, part)} holds row {row} of another run")
        if row not in self:
            self._part[row], self._offset[row] = part, offset
            self.count += 1

    def records(self) -> Iterator[tuple[int, bytes]]:
        """Number and record of every finished row, in input order.

        Raises:
            DamagedPartError: A part changed meanwhile.
        """
        streams = [part_path(self.folder, n).open("rb") for n in range(self.parts)]
        try:
            for row in np.flatnonzero(self.done).tolist():
                stream = streams[int(self._part[row])]
                stream.seek(int(self._offset[row]))
                decoded = _decode(stream.readline())
                if decoded is None or decoded[0] != row:
                    raise DamagedPartError(f"{stream.name} no longer holds row {row}")
                yield decoded
        finally:
            for stream in streams:
                stream.close()


class PartsWriter:
    """Appends finished rows; every run begins a part of its own."""

    def __init__(self, finished: FinishedRows) -> None:
        """Opens nothing yet.

        Args:
            finished: Is told of every row that is written.
        """
        self._finished = finished
        self._descriptor: int | None = None
        self._number = 0
        self._size = 0

    def add(self, records: Iterable[tuple[int, bytes]]) -> int:
        """Stores records and waits until they are on disk.

        Args:
            records: Row number and record (one line without its end) each; rows that are finished
                already are left out.

        Returns:
            How many were stored.
        """
        fresh: dict[int, bytes] = {}
        for row, record in records:
            if row not in self._finished:
                fresh.setdefault(row, record)
        if not fresh:
            return 0
        if self._descriptor is None or self._size >= _PART_BYTES:
            self._begin()
        assert self._descriptor is not None
        places, lines, offset = [], [], self._size
        for row, record in fresh.items():
            line = _encode(row, record)
            places.append((row, offset))
            lines.append(line)
            offset += len(line)
        _write_all(self._descriptor, b"".join(lines))
        os.fsync(self._descriptor)
        self._size = offset
        for row, place in places:
            self._finished.note(row, self._number, place)
        return len(fresh)

    def close(self) -> None:
        """Closes the part; what was added is on disk already."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _begin(self) -> None:
        self.close()
        self._number, self._size = self._finished.parts, 0
        self._finished.parts += 1
        path = part_path(self._finished.folder, self._number)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        sync_folder(path.parent)


def part_path(folder: Path, number: int) -> Path:
    """Where the part with this number lies."""
    return folder / f"part-{number:05d}.jsonl"


def has_rows(folder: Path) -> bool:
    """Whether any part in ``folder`` holds anything."""
    return any(path.stat().st_size for path in folder.glob("part-*.jsonl"))


def _encode(row: int, record: bytes) -> bytes:
    content = b"%d %s" % (row, record)
    return b"%08x %s\n" % (zlib.crc32(content), content)


def _decode(line: bytes) -> tuple[int, bytes] | None:
    """Row and record of a line; None if it was cut off or damaged."""
    checksum, _, content = line.removesuffix(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(content):
        return None
    row, _, record = content.partition(b" ")
    return int(row), record


def _intact_lines(path: Path) -> Iterator[tuple[int, int]]:
    """Offset and row of every line but a last one that was cut off."""
    offset, damaged = 0, None
    with path.open("rb") as stream:
        for line in stream:
            decoded = _decode(line)
            if damaged is not None:
                raise DamagedPartError(f"{path} is damaged at byte {damaged}")
            if decoded is None:
                damaged = offset
            else:
                yield offset, decoded[0]
            offset += len(line)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes ``path`` in one step once the block is through."""
    draft = path.with_name(path.name + ".tmp")
    yield draft
    with draft.open("rb") as stream:
        os.fsync(stream.fileno())
    draft.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Waits until the names in ``folder`` are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
