"""Has replicas answer the rows of a batch that are not finished, and stores what they say.

Invariant: when it returns, every row is finished. Rows whose replica was lost time and again are
tried once more by themselves, and only then become errors.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable
from typing import TextIO

import numpy as np

from vllm_flashtrace.base.errors import FlashTraceError
from vllm_flashtrace.scale.batch.batch_replica import ReplicaError
from vllm_flashtrace.scale.batch.dataset import read_requests
from vllm_flashtrace.scale.batch.inputs import read_rows
from vllm_flashtrace.scale.batch.options import BatchOptions
from vllm_flashtrace.scale.batch.outcome import Outcome
from vllm_flashtrace.scale.batch.parts import FinishedRows, PartsWriter
from vllm_flashtrace.scale.batch.pool import SPARE_CPUS, Pool
from vllm_flashtrace.scale.batch.progress import progress
from vllm_flashtrace.scale.batch.scan import Scan
from vllm_flashtrace.scale.batch.source import FileRows
from vllm_flashtrace.scale.interruption import Stopping, stop_on_signals
from vllm_flashtrace.scale.ray_cluster import connect, import_ray

_BLOCK_BYTES = 256 << 10
_OBJECT_STORE_BYTES = 1 << 30
# Given-up batches after which it is the engine that is at fault, not a row.
_MAX_LOST_BATCHES = 8
Report = Callable[[int, int], None]


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
