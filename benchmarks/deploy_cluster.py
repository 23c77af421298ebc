"""A Ray cluster of this machine's own, and ``vllm-flashtrace deploy`` in it.

Invariant: everything listens on 127.0.0.1, and whatever was started is gone when the block ends.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

REPLICA_HEADER = "x-flashtrace-replica"
OPTIONS = (
    "--served-model-name=m",
    "--enforce-eager",
    "--dtype=float32",
    "--max-model-len=2048",
    "--kv-cache-memory-bytes=1G",
    "--disable-uvicorn-access-log",
)
_START_SECONDS = 120.0
_DEPLOY_SECONDS = 300.0
_STOP_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Cluster:
    """A running cluster.

    Attributes:
        url: Where deployments in it listen.
        environment: For commands that join it.
        log: File with the output of everything.
    """

    url: str
    environment: dict[str, str]
    log: Path

    def deploy(self, model: Path, replicas: int, drain_seconds: float) -> subprocess.Popen[bytes]:
        """Starts the command; it returns when the deployment is as asked for."""
        command = [_script("vllm-flashtrace"), "deploy", str(model), "--no-blocking"]
        command += [f"--port={self.url.rpartition(':')[2]}", f"--replicas={replicas}"]
        command += ["--cpus-per-replica=1", f"--drain-timeout={drain_seconds:g}", *OPTIONS]
        with self.log.open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=self.environment)

    def finish(self, command: subprocess.Popen[bytes]) -> None:
        """Waits for a command.

        Raises:
            RuntimeError: It failed.
        """
        if code := command.wait(_DEPLOY_SECONDS):
            raise RuntimeError(f"deploy ended with {code}:\n{self.log.read_text()[-3000:]}")

    def replicas(self) -> set[str]:
        """Names of the replicas that tell their metrics: those that requests are sent to."""
        text = httpx.get(f"{self.url}/metrics", timeout=30, trust_env=False).text
        return {line.split('"')[1] for line in text.splitlines() if "{replica=" in line}

    def process(self, replica: str) -> psutil.Process:
        """The process of a replica.

        Raises:
            RuntimeError: The replica does not answer.
        """
        for _ in range(200):
            url = f"{self.url}/v1/attributions/status"
            response = httpx.get(url, timeout=30, trust_env=False)
            if response.headers.get(REPLICA_HEADER) == replica:
                return psutil.Process(response.json()["processes"][-1]["pid"])
        raise RuntimeError(f"{replica} does not answer")


@contextmanager
def cluster(folder: Path, cpus: int) -> Iterator[Cluster]:
    """Runs a cluster for as long as the block lasts.

    Args:
        folder: For its files; a short path, for sockets are made in it.
        cpus: Cores that it has.

    Raises:
        RuntimeError: It does not start.
    """
    port, log = _free_port(), folder / "log"
    environment = {
        **os.environ,
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [_script("ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    command += [f"--port={port}", f"--num-cpus={cpus}", "--include-dashboard=false"]
    command += [f"--temp-dir={folder / 'ray'}", f"--object-store-memory={256 << 20}"]
    with log.open("ab") as output:
        head = subprocess.Popen(
            command, stdout=output, stderr=output, env={**environment, "RAY_ADDRESS": ""}
        )
    try:
        deadline = time.monotonic() + _START_SECONDS
        while "Ray runtime started" not in log.read_text():
            if head.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Ray did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.2)
        yield Cluster(f"http://127.0.0.1:{_free_port()}", environment, log)
    finally:
        _end(head)


def _end(head: subprocess.Popen[bytes]) -> None:
    started = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
    head.terminate()
    try:
        head.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        head.kill()
        head.wait()
    for process in psutil.wait_procs(started, timeout=_STOP_SECONDS)[1]:
        process.kill()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _script(name: str) -> str:
    return str(Path(sys.executable).with_name(name))
