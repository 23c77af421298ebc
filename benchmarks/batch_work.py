"""Runs of ``vllm-flashtrace batch`` in processes of their own, watched, killed and compared."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.processes import engine_processes

ENGINE_OPTIONS = (
    "--max-model-len",
    "512",
    "--enforce-eager",
    "--dtype",
    "float32",
    "--kv-cache-memory-bytes",
    str(128 << 20),
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

        Raises:
            RuntimeError: The run ended before, or took longer.
        """
        deadline = time.monotonic() + seconds
        while self.rows() < count:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no {count} rows; see {self.log}")
            time.sleep(_POLL_SECONDS)
        return time.monotonic()

    def finish(self, seconds: float) -> None:
        """Waits for the end.

        Raises:
            RuntimeError: It failed.
        """
        if code := self.process.wait(seconds):
            raise RuntimeError(f"exit code {code}; see {self.log}")

    def kill(self) -> list[psutil.Process]:
        """SIGKILL to the whole process group; returns its engines' processes."""
        engines = self.engines()
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        return engines

    def replicas(self) -> list[psutil.Process]:
        """The actors' processes."""
        tree = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in tree if process.name().startswith("ray::MapWorker")]

    def engines(self) -> list[psutil.Process]:
        """The processes of the actors' engines."""
        return [process for actor in self.replicas() for process in engine_processes(actor)]

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
    """All rows of a finished run by custom id.

    Raises:
        RuntimeError: An id occurs twice.
    """
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
