"""``vllm-flashtrace batch``: its options, and how the rows of a run are answered.

Whatever is known to be wrong is said before an engine starts. Whatever ends a run, finished rows
stay finished, and the same command goes on from there.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from vllm_flashtrace.base import __version__
from vllm_flashtrace.base.errors import FlashTraceError
from vllm_flashtrace.offline.engine import engine_log
from vllm_flashtrace.scale.batch.batch_replica import ReplicaError
from vllm_flashtrace.scale.batch.dataset import SPARE_CPUS, Pool, read_requests
from vllm_flashtrace.scale.batch.inputs import Defaults, read_rows
from vllm_flashtrace.scale.batch.results import Outcome
from vllm_flashtrace.scale.batch.source import FileRows, Scan, scan_input
from vllm_flashtrace.scale.batch.store import (
    PARTS,
    FinishedRows,
    PartsWriter,
    Totals,
    claim,
    drop_store,
    finish,
    locked,
)
from vllm_flashtrace.scale.ray_cluster import (
    Interrupted,
    Stopping,
    connect,
    import_ray,
    stop_on_signals,
)

_STDERR = 2
_BLOCK_BYTES = 256 << 10
_OBJECT_STORE_BYTES = 1 << 30
# Given-up batches after which it is the engine that is at fault, not a row.
_MAX_LOST_BATCHES = 8
_LINE_SECONDS = 10.0
# They name the model, or belong to a server's socket.
_NO_ENGINE_OPTIONS = ("--model", "--host", "--port", "--api-key", "--uds")

Report = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """Options of the command.

    Attributes:
        input: File or folder.
        output: Folder for the results.
        model: Model name or folder.
        argv: Options of ``vllm serve``.
        replicas: Fewest and most engines.
        batch_size: Rows that an engine is handed at once.
        defaults: What rows get that say nothing.
    """

    input: Path
    output: Path
    model: str
    argv: tuple[str, ...]
    replicas: tuple[int, int]
    batch_size: int
    defaults: Defaults


def run_batch(options: BatchOptions) -> int:
    """Runs or goes on with a batch.

    Returns:
        Exit code: 0, or 130 or 143 when a signal stopped it.

    Raises:
        OSError: A file cannot be read or written.
        ValueError: The input or an option is bad.
        FlashTraceError: The output folder is another run's, Ray or the engine did not start, ….
    """
    import_ray("ray.data")
    if options.output.resolve().is_relative_to(options.input.resolve()):
        raise ValueError(f"the output {options.output} lies in the input {options.input}")
    # Standard error goes to a log while engines run; what the user is told goes here.
    with os.fdopen(os.dup(_STDERR), "w", buffering=1) as console:
        scan = scan_input(options.input)
        with locked(options.output):
            return _run(options, scan, console)


def _run(options: BatchOptions, scan: Scan, console: TextIO) -> int:
    manifest = claim(options.output, _facts(options, scan))
    if manifest.finished:
        drop_store(options.output)
        print(f"all {scan.rows} rows are in {options.output} already", file=console)
        return 0
    finished = FinishedRows(options.output / PARTS, scan.rows)
    if finished.count:
        print(f"{finished.count} of {scan.rows} rows are finished already", file=console)
    try:
        with stop_on_signals():
            if finished.count < scan.rows:
                with engine_log(), redirect_stdout(sys.stderr):  # Ray prints warnings there.
                    answer_rows(options, scan, finished, console)
            totals = finish(options.output, manifest, finished)
    except Interrupted as stopped:
        print(
            f"stopped with {finished.count} of {scan.rows} rows finished; "
            "the same command goes on from there",
            file=console,
        )
        return stopped.code
    print(_sentence(totals, options.output), file=console)
    return 0


def _facts(options: BatchOptions, scan: Scan) -> dict[str, Any]:
    return {
        "input": [[file.name, file.sha256] for file in scan.files],
        "model": options.model,
        "engine options": list(options.argv),
        "flashtrace": options.defaults.flashtrace,
        "max tokens": options.defaults.max_tokens,
        "vllm-flashtrace": __version__,
    }


def _sentence(totals: Totals, folder: Path) -> str:
    return (
        f"{totals.rows} rows in {folder}: {totals.rows - totals.errors} answered "
        f"({totals.failed_traces} of them with a failed attribution), {totals.errors} errors"
    )


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


def parse_flashtrace(text: str) -> Any:
    """The default ``flashtrace`` field: ``true``, ``false`` or an object.

    Raises:
        ValueError: It is not JSON.
        InvalidRequestError: The field is refused.
    """
    from vllm_flashtrace.api.request import RequestLimits, parse_flashtrace_field

    try:
        field = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--flashtrace is not JSON: {error}") from None
    parsed = parse_flashtrace_field(field, RequestLimits(max_hops=64, heads=True))
    if parsed is not None and parsed.mode != "inline":
        raise ValueError("--flashtrace: mode must be inline in a batch")
    return field


def parse_replicas(text: str) -> tuple[int, int]:
    """``2`` or ``1-4`` as the fewest and the most replicas.

    Raises:
        ValueError: It is neither.
    """
    fewest, dash, most = text.partition("-")
    sizes = (fewest, most if dash else fewest)
    if all(size.isascii() and size.isdigit() and int(size) > 0 for size in sizes):
        low, high = map(int, sizes)
        if low <= high:
            return low, high
    raise ValueError(f"--replicas must be a number of at least 1, or two as in 1-4, got {text!r}")


def engine_argv(arguments: Sequence[str]) -> tuple[str, ...]:
    """Arguments after ``--`` as engine options.

    Raises:
        ValueError: One that the command sets itself is among them.
    """
    for argument in arguments:
        if argument.partition("=")[0] in _NO_ENGINE_OPTIONS:
            raise ValueError(f"{argument} is no engine option of a batch")
    return tuple(arguments)
