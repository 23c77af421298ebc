"""Has replicas answer the rows that are not finished, shows progress, and writes the final files.

How far a run is: a bar in a terminal, a line now and then elsewhere.

Invariant: the last figures are always shown.

The last step: final files from the store of finished rows.

Invariant: a final file appears whole or not at all, rows are in input order, and doing the step
again gives the same bytes. The store is deleted only after the manifest says that they are there.

Has replicas answer the rows of a batch that are not finished, and stores what they say.

Invariant: when it returns, every row is finished. Rows whose replica was lost time and again are
tried once more by themselves, and only then become errors.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from vllm_flashtrace.base.errors import FlashTraceError
from vllm_flashtrace.scale.batch.batch_replica import ReplicaError
from vllm_flashtrace.scale.batch.dataset import SPARE_CPUS, Pool, read_requests
from vllm_flashtrace.scale.batch.inputs import read_rows
from vllm_flashtrace.scale.batch.options import BatchOptions
from vllm_flashtrace.scale.batch.results import Outcome, make_table, result_schema, table_rows
from vllm_flashtrace.scale.batch.source import FileRows, Scan
from vllm_flashtrace.scale.batch.store import (
    ERRORS,
    OUTPUT,
    PARTS,
    RESULTS,
    FinishedRows,
    Manifest,
    OutputFolderError,
    PartsWriter,
    replacing,
)
from vllm_flashtrace.scale.ray_cluster import Stopping, connect, import_ray, stop_on_signals

_LINE_SECONDS = 10.0

Report = Callable[[int, int], None]


@contextmanager
def progress(console: TextIO, total: int, done: int) -> Iterator[Report]:
    """Shows progress for as long as the block lasts.

    Args:
        console: Where to show it.
        total: Rows of the input.
        done: Rows that earlier runs finished.

    Yields:
        ``report(rows, errors)`` to call with the rows finished since the last call, and how many of
        these are errors.
    """
    if console.isatty():
        with _bar(console, total, done) as report:
            yield report
        return
    lines = _Lines(console, total, done)
    try:
        yield lines.report
    finally:
        lines.show()


class _Lines:
    def __init__(self, console: TextIO, total: int, done: int) -> None:
        self._console = console
        self._total, self._done, self._errors, self._new = total, done, 0, 0
        self._began = self._shown = time.monotonic()

    def report(self, rows: int, errors: int) -> None:
        self._done, self._errors, self._new = (
            self._done + rows,
            self._errors + errors,
            self._new + rows,
        )
        if time.monotonic() - self._shown >= _LINE_SECONDS:
            self.show()

    def show(self) -> None:
        self._shown = time.monotonic()
        rate = self._new / max(self._shown - self._began, 1e-9)
        left = f", {(self._total - self._done) / rate:.0f} s left" if rate else ""
        print(
            f"{self._done}/{self._total} rows, {self._errors} errors, {rate:.2f} rows/s{left}",
            file=self._console,
            flush=True,
        )


@contextmanager
def _bar(console: TextIO, total: int, done: int) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[errors]} errors"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    began, new, failed = time.monotonic(), 0, 0
    with Progress(*columns, console=Console(file=console)) as shown:
        task = shown.add_task("rows", total=total, completed=done, errors=0, rate="")

        def report(rows: int, errors: int) -> None:
            nonlocal new, failed
            new, failed = new + rows, failed + errors
            rate = new / max(time.monotonic() - began, 1e-9)
            shown.update(task, advance=rows, errors=failed, rate=f"{rate:.2f} rows/s")

        yield report


_ROW_GROUP = 512


@dataclass(frozen=True, slots=True)
class Totals:
    """Rows of the whole input by what became of them."""

    rows: int
    errors: int
    failed_traces: int


def finish(folder: Path, manifest: Manifest, finished: FinishedRows) -> Totals:
    """Writes ``output.jsonl``, ``errors.jsonl`` and ``results.parquet``; drops the store.

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


_BLOCK_BYTES = 256 << 10
_OBJECT_STORE_BYTES = 1 << 30
# Given-up batches after which it is the engine that is at fault, not a row.
_MAX_LOST_BATCHES = 8


class BatchError(FlashTraceError):
    """The replicas cannot go on."""

    def __init__(self, message: str) -> None:
        super().__init__("batch_failed", message)


def answer_rows(options: BatchOptions, scan: Scan, finished: FinishedRows, console: TextIO) -> None:
    """Answers every row that is not finished.

    Args:
        options: Of the command.
        scan: The input.
        finished: Is told of every row that is on disk.
        console: Where progress is shown.

    Raises:
        RayUnavailableError: Ray cannot be started or joined.
        BatchError: The engine does not start, or fails on batch after batch.
        ValueError: The replicas do not fit the machine.
    """
    local = {
        "num_cpus": len(os.sched_getaffinity(0)) + SPARE_CPUS,
        "object_store_memory": _OBJECT_STORE_BYTES,
    }
    with (
        connect(**local),
        stop_on_signals() as stopping,  # Ray has just put handlers of its own in place.
        PartsWriter(finished) as writer,
        progress(console, scan.rows, finished.count) as report,
    ):
        _prepare_ray_data()
        pool = Pool.plan(options.model, options.argv, options.replicas, options.batch_size)
        _answer(pool, options, scan, finished, writer, report, stopping)
        if finished.count < scan.rows:
            gc.collect()  # The first replicas end, and free what they hold, with their handles.
            _answer(pool, options, scan, finished, writer, report, stopping, one_by_one=True)
        _give_up(scan, finished, writer, report)


def _answer(
    pool: Pool,
    options: BatchOptions,
    scan: Scan,
    finished: FinishedRows,
    writer: PartsWriter,
    report: Report,
    stopping: Stopping,
    *,
    one_by_one: bool = False,
) -> None:
    requests = read_requests(unfinished(options, scan, finished))
    answers = pool.answer(requests, one_by_one=one_by_one)
    try:
        for batch in answers.iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=0
        ):
            stopping.check()
            records = zip(
                batch.column("row").to_pylist(), batch.column("outcome").to_pylist(), strict=True
            )
            _store([(row, text.encode()) for row, text in records], writer, report)
    except Exception as error:  # Ray wraps what a replica raised in many ways.
        raise BatchError(_reason(error)) from error


def unfinished(options: BatchOptions, scan: Scan, finished: FinishedRows) -> list[FileRows]:
    """What is left to read of each file; files without any are left out."""
    duplicates = set(scan.duplicates.tolist())
    wanted = np.logical_not(finished.done).astype(np.uint8)
    tasks = []
    for file in scan.files:
        rows = range(file.first, file.first + file.rows)
        mine = wanted[rows.start : rows.stop].tobytes()
        if any(mine):
            later = frozenset(row for row in duplicates if row in rows)
            tasks.append(FileRows(file, mine, later, options.defaults))
    return tasks


def _store(records: list[tuple[int, bytes]], writer: PartsWriter, report: Report) -> None:
    errors = sum(Outcome.from_json(record).error is not None for _, record in records)
    report(writer.add(records), errors)


def _give_up(scan: Scan, finished: FinishedRows, writer: PartsWriter, report: Report) -> None:
    """Makes errors of the rows that took every replica with them."""
    lost = {
        "code": "replica_lost",
        "message": "the engine ended every time that it was asked this row",
    }
    for file in scan.files:
        rows = range(file.first, file.first + file.rows)
        if finished.done[rows.start : rows.stop].all():
            continue
        for row, raw in zip(rows, read_rows(file.name, file.path), strict=True):
            if row not in finished:
                outcome = Outcome(raw.custom_id, file.name, raw.line, error=lost)
                _store([(row, outcome.to_json().encode())], writer, report)


def _prepare_ray_data() -> None:
    """Settings of Ray Data for the datasets of this process."""
    ray_data = import_ray("ray.data")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray_data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = _BLOCK_BYTES
    context.max_errored_blocks = _MAX_LOST_BATCHES


def _reason(error: BaseException) -> str:
    """What a replica said, in one line, or else the last line of what Ray says."""
    marker = f"{ReplicaError.__name__}: "
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in reversed(lines):
        if marker in line:
            return line.partition(marker)[2]
    return lines[-1] if lines else type(error).__name__
