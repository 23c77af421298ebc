"""Proof of ``vllm-flashtrace batch``: replicas side by side, kills, lost replicas, bad rows.

``python -m benchmarks.batch_runs --json OUT`` runs every piece on a tiny random model;
``--only kills`` one of them, whose figures are put into the file beside the others.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.batch_work import (
    Batch,
    attributions,
    difference,
    malformed,
    requests,
    results,
    write_lines,
)
from benchmarks.processes import engine_core

_RUN_SECONDS = 600.0


def scaling(folder: Path, rows: int) -> dict[str, Any]:
    """One replica on one core, two replicas on two cores, the same rows (four times as many)."""
    rows *= 4
    batch = prepare(folder, rows)
    cores = sorted(os.sched_getaffinity(0))
    rates, found = [], []
    for replicas in (1, 2):
        mine = replace(batch, output=folder / f"x{replicas}", replicas=replicas)
        run = mine.start(cores[:replicas])
        began = time.monotonic()
        # Until then replicas are starting.
        first = rows * 2 // 5
        at = run.wait_for_rows(first, _RUN_SECONDS)
        reached = run.rows()
        last = rows * 9 // 10
        end = run.wait_for_rows(last, _RUN_SECONDS)
        rates.append((last - reached) / (end - at))
        run.finish(_RUN_SECONDS)
        found.append(results(mine.output))
        print(f"{replicas} replicas: {rates[-1]:.2f} rows/s, {time.monotonic() - began:.1f} s")
    unequal, distance = difference(*found)
    return {
        "rows": rows,
        "attributions": attributions(found[0]),
        "rows_per_second": rates,
        "ratio": rates[1] / rates[0],
        "unequal_rows": unequal,
        "relative_l1": distance,
    }


def kills(folder: Path, rows: int) -> dict[str, Any]:
    """SIGKILL of the process group at three random points, then a run to the end."""
    batch = prepare(folder, rows)
    whole = replace(batch, output=folder / "whole")
    whole.start().finish(_RUN_SECONDS)
    points = sorted(random.Random(0).sample(range(rows // 20, rows * 4 // 5), 3))
    killed = replace(batch, output=folder / "killed")
    kept, survivors = [], 0
    for point in points:
        run = killed.start()
        run.wait_for_rows(point, _RUN_SECONDS)
        survivors += still_alive(run.kill())
        kept.append(run.rows())
    again = killed.start()
    stored = again.rows()
    again.finish(_RUN_SECONDS)
    found = results(whole.output)
    unequal, distance = difference(found, results(killed.output))
    return {
        "rows": rows,
        "attributions": attributions(found),
        "killed_at": points,
        "kept": kept,
        "not_asked_again": stored,
        "rows_in_the_end": len(results(killed.output)),
        "unequal_rows": unequal,
        "relative_l1": distance,
        "engines_left": survivors,
    }


def replica(folder: Path, rows: int) -> dict[str, Any]:
    """SIGKILL of a replica's process, and of another one's engine, half-way."""
    batch = replace(prepare(folder, rows), output=folder / "lost")
    run = batch.start()
    run.wait_for_rows(rows // 4, _RUN_SECONDS)
    victim = run.replicas()[0]
    victim.kill()
    run.wait_for_rows(rows // 2, _RUN_SECONDS)
    engine_core(run.replicas()[-1]).kill()
    run.finish(_RUN_SECONDS)
    found = results(batch.output)
    return {
        "rows": rows,
        "rows_in_the_end": len(found),
        "errors": sum(record["error"] is not None for record in found.values()),
    }


def bad_rows(folder: Path, rows: int) -> dict[str, Any]:
    """Twenty bad lines among good ones."""
    good = [json.dumps(request) for request in requests(rows, tokens=4)]
    lines = [*good, *map(malformed, range(20))]
    random.Random(1).shuffle(lines)
    batch = replace(prepare(folder, rows), output=folder / "bad")
    write_lines(batch.input, lines)
    batch.start().finish(_RUN_SECONDS)
    found = results(batch.output)
    errors = [record["error"] for record in found.values() if record["error"] is not None]
    return {"rows": len(lines), "bad": 20, "errors": len(errors), "answered": len(found) - 20}


def prepare(folder: Path, rows: int) -> Batch:
    """The model and the input."""
    from tests.tiny_models import make_tiny_model

    model = folder / "model"
    if not model.exists():
        make_tiny_model("llama", model)
    lines = [json.dumps(request) for request in requests(rows, tokens=24)]
    return Batch(write_lines(folder / "input.jsonl", lines), folder / "out", model)


def still_alive(processes: list[psutil.Process]) -> int:
    """How many of them outlive their parent by more than a few seconds."""
    return len(psutil.wait_procs(processes, timeout=15)[1])


PIECES: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "scaling": scaling,
    "kills": kills,
    "replica": replica,
    "bad_rows": bad_rows,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=PIECES, action="append")
    parser.add_argument("--rows", type=int, default=500)
    options = parser.parse_args()
    report: dict[str, Any] = {}
    if options.json is not None and options.json.exists():
        report = json.loads(options.json.read_text("utf-8"))
    for name in options.only or PIECES:
        with tempfile.TemporaryDirectory() as folder:
            report[name] = PIECES[name](Path(folder), options.rows)
        print(name, json.dumps(report[name]), flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
