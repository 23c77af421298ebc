"""Starts and stops a real deployment as a child process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.cores import IN_ENGINE, UNI
from tests.server.live_server import free_port

_MAIN = "from vllm_flashtrace.commands.cli import main; main()"
START_SECONDS = 900
STOP_SECONDS = 300
REPLICA_HEADER = "x-flashtrace-replica"
OPTIONS = (
    "--served-model-name=m",
    "--enforce-eager",
    "--dtype=float32",
    "--max-model-len=2048",
    "--max-num-seqs=8",
    "--kv-cache-memory-bytes=32M",
    UNI,
)


@dataclass(frozen=True)
class Deployment:
    """A running ``vllm-flashtrace deploy``.

    Attributes:
        url: Its base address.
        log: File with its output.
        process: The command.
    """

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json={"model": "m", **body}, timeout=600)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=300)

    def replicas(self) -> set[str]:
        """Names of the replicas that have metrics."""
        lines = self.get("/metrics").text.splitlines()
        return {line.split('"')[1] for line in lines if "{replica=" in line}

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples with these labels."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        lines = self.get("/metrics").text.splitlines()
        return sum(
            float(line.rpartition(" ")[2])
            for line in lines
            if line.startswith(f"{name}{{") and all(label in line for label in wanted)
        )

    def on(self, replica: str, path: str) -> httpx.Response:
        """GET answered by one replica."""
        for _ in range(200):
            response = self.get(path)
            if response.headers.get(REPLICA_HEADER) == replica:
                return response
        raise AssertionError(f"{replica} never answers")

    def family(self, replica: str) -> tuple[psutil.Process, list[psutil.Process]]:
        """A replica's process and those of its engine."""
        processes = self.on(replica, "/v1/attributions/status").json()["processes"]
        actor = psutil.Process(processes[-1]["pid"])
        return actor, actor.children(recursive=True)


@contextmanager
def deploy(model: Path | str, log: Path, *options: str, **env: str) -> Iterator[Deployment]:
    """Runs the command until the block ends; it is stopped with SIGTERM.

    Raises:
        RuntimeError: It ended or was not ready in time; has the end of its log.
    """
    port = free_port()
    command = [sys.executable, "-c", _MAIN, "deploy", str(model), f"--port={port}"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *OPTIONS, *options],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "RAY_ADDRESS": "", **IN_ENGINE, **env},
            start_new_session=True,
            cwd=Path(__file__).parents[3],
        )
    try:
        until(lambda: _ready(process, log), START_SECONDS)
        yield Deployment(f"http://127.0.0.1:{port}", log, process)
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> int:
    """Ends the command as a person would; its exit code."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(timeout=STOP_SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=30)


def until(condition: Callable[[], Any], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.2)


def _ready(process: subprocess.Popen[bytes], log: Path) -> bool:
    text = log.read_text(errors="replace")
    if process.poll() is not None:
        raise RuntimeError(f"ended with {process.returncode}:\n{text[-3000:]}")
    return " is ready at http" in text
