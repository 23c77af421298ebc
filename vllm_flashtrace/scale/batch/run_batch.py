"""What ``vllm-flashtrace batch`` does.

Invariant: everything that can be known to be wrong is said before an engine starts; whatever ends
the run, finished rows stay finished, and the same command goes on from there.
"""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from vllm_flashtrace.base import __version__
from vllm_flashtrace.offline.engine_log import engine_log
from vllm_flashtrace.scale.batch.execution import Totals, answer_rows, drop_store, finish
from vllm_flashtrace.scale.batch.options import BatchOptions
from vllm_flashtrace.scale.batch.source import Scan, scan_input
from vllm_flashtrace.scale.batch.store import PARTS, FinishedRows, claim, locked
from vllm_flashtrace.scale.ray_cluster import Interrupted, import_ray, stop_on_signals

_STDERR = 2


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
