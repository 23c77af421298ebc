"""Proof of ``vllm-flashtrace batch``: replicas side by side, kills, lost replicas, bad rows.

Runs the command in processes of its own on a tiny random model, watches and kills them, and
compares what they wrote.

    python -m benchmarks.batch_runs [--only kills] [--rows 500] [--json OUT]

``--only`` runs one piece, whose figures are put into the file beside the others.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.processes import engine_core, engine_processes

_RUN_SECONDS = 600.0
ENGINE_OPTIONS = (
    "--max-model-len=512",
    "--enforce-eager",
    "--dtype=float32",
    f"--kv-cache-memory-bytes={32 << 20}",
)
_POLL_SECONDS = 0.05
# Fields of an answer that differ from run to run by their nature.
_OF_A_RUN = ("id", "request_id", "created", "usage", "system_fingerprint")


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch that can be run again and again."""

    input: Path
    output: Path
    model: Path
    replicas: int = 1
    batch_size: int = 16

    def start(self, cores: Sequence[int] | None = None) -> Run:
        """Starts the command in a session of its own, on ``cores`` if given."""
        command = [str(Path(sys.executable).with_name("vllm-flashtrace")), "batch"]
        command += ["--input", str(self.input), "--output", str(self.output)]
        command += ["--model", str(self.model), "--replicas", str(self.replicas)]
        command += ["--batch-size", str(self.batch_size), "--", *ENGINE_OPTIONS]
        prefix = ["taskset", "-c", ",".join(map(str, cores))] if cores else []
        log = self.output.with_suffix(".log").open("ab")
        with log:
            process = subprocess.Popen(
                [*prefix, *command], stdout=log, stderr=log, start_new_session=True
            )
        return Run(self, process)


@dataclass(slots=True)
class Run:
    """A run under way."""

    batch: Batch
    process: subprocess.Popen[bytes]

    def rows(self) -> int:
        """Rows that are on disk."""
        parts = (self.batch.output / "parts").glob("part-*.jsonl")
        return sum(_line_count(part) for part in parts)

    def wait_for_rows(self, count: int, seconds: float) -> float:
        """Waits until so many rows are on disk; returns the time then (monotonic).

        Raises RuntimeError if the run ends before or takes longer.
        """
        deadline = time.monotonic() + seconds
        while self.rows() < count:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no {count} rows; see {self.log}")
            time.sleep(_POLL_SECONDS)
        return time.monotonic()

    def finish(self, seconds: float) -> None:
        """Waits for the end; raises RuntimeError if the run failed."""
        if code := self.process.wait(seconds):
            raise RuntimeError(f"exit code {code}; see {self.log}")

    def kill(self) -> list[psutil.Process]:
        """SIGKILL to the whole process group; returns its engines' processes."""
        self.process.send_signal(signal.SIGSTOP)  # It would end replicas that have no more to do.
        engines = [one for actor in self.replicas() for one in engine_processes(actor)]
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        return engines

    def replicas(self) -> list[psutil.Process]:
        """The actors' processes."""
        tree = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in tree if process.name().startswith("ray::MapWorker")]

    @property
    def log(self) -> Path:
        """What the command said."""
        return self.batch.output.with_suffix(".log")


def requests(count: int, *, tokens: int) -> list[dict[str, Any]]:
    """Chats, all scores asked for, greedy."""
    return [
        {
            "custom_id": f"row-{i}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "messages": [
                    {"role": "system", "content": "You are a helpful assistant."},
                    {"role": "user", "content": f"{i * 37 % 1009} apples and {i} pears. Total?"},
                ],
                "max_tokens": tokens,
                "temperature": 0,
                "ignore_eos": True,
                "flashtrace": {"top_k": None, "target": "generated"},
            },
        }
        for i in range(count)
    ]


def malformed(number: int) -> str:
    """A line that is wrong in one of ten ways."""
    own = {"custom_id": f"bad-{number}", "method": "POST", "url": "/v1/completions"}
    bodies: list[Any] = [
        {"prompt": "x", "stream": True},
        {"prompt": "x", "frobnicate": 1},
        {"prompt": "x", "max_tokens": "many"},
        {"prompt": "word " * 2000, "max_tokens": 4},
        {"prompt": "x", "flashtrace": {"hops": -1}},
        {"prompt": "x", "flashtrace": {"target": {"text": ""}}},
        {"max_tokens": 4},
        "text",
    ]
    kinds = [
        f'{{"custom_id": "bad-{number}", "body"',
        json.dumps([number]),
        *(json.dumps({**own, "body": body}) for body in bodies),
    ]
    return kinds[number % len(kinds)]


def write_lines(path: Path, lines: Sequence[str]) -> Path:
    """Writes a JSONL file."""
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return path


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """All rows of a finished run by custom id; raises RuntimeError if one occurs twice."""
    found: dict[str, dict[str, Any]] = {}
    for name in ("output.jsonl", "errors.jsonl"):
        for line in (folder / name).read_text("utf-8").splitlines():
            record = json.loads(line)
            if record["custom_id"] in found:
                raise RuntimeError(f"{record['custom_id']} occurs twice in {folder}")
            found[record["custom_id"]] = record
    return found


def attributions(found: dict[str, dict[str, Any]]) -> int:
    """How many completed attributions with scores there are."""
    return sum(bool(_scores(record)) for record in found.values())


def difference(
    one: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]]
) -> tuple[int, float]:
    """Rows that differ in anything but scores, and the largest relative L1 distance of scores."""
    if one.keys() != other.keys():
        return len(one.keys() ^ other.keys()), float("inf")
    unequal, distance = 0, 0.0
    for custom_id, record in one.items():
        ours, theirs = _essence(record), _essence(other[custom_id])
        unequal += ours != theirs
        scores, others = _scores(record), _scores(other[custom_id])
        if len(scores) != len(others):
            distance = float("inf")
        elif scores:
            gap = sum(abs(a - b) for a, b in zip(scores, others, strict=True))
            distance = max(distance, gap / sum(scores))
    return unequal, distance


def _scores(record: dict[str, Any]) -> list[float]:
    body = (record["response"] or {}).get("body") or {}
    choices = body.get("choices") or ()
    traced = [choice["flashtrace"] for choice in choices if "flashtrace" in choice]
    return [score["score"] for trace in traced for score in trace.get("scores") or ()]


def _essence(value: Any) -> Any:
    """Everything but numbers that are not whole and what belongs to one run."""
    if isinstance(value, dict):
        return {k: _essence(v) for k, v in value.items() if k not in _OF_A_RUN}
    if isinstance(value, list):
        return [_essence(item) for item in value]
    return None if isinstance(value, float) else value


def _line_count(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:  # The run has just finished.
        return 0


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
        survivors += len(psutil.wait_procs(run.kill(), timeout=15)[1])
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


PIECES: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "scaling": scaling,
    "kills": kills,
    "replica": replica,
    "bad_rows": bad_rows,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=PIECES, action="append")
    parser.add_argument("--rows", type=int, default=500)
    options = parser.parse_args(arguments)
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
