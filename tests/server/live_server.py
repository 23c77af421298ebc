"""Starts and stops a real server as a child process of the tests."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.cores import IN_ENGINE, UNI
from tests.forked import ForkedProcess, forked

START_SECONDS = 420
OPTIONS = [
    "--served-model-name=m",
    "--enforce-eager",
    "--dtype=float32",
    "--max-model-len=2048",
    "--max-num-seqs=8",
    "--kv-cache-memory-bytes=384M",
    "--disable-uvicorn-access-log",
    "--host=127.0.0.1",
]
OURS = [
    "-c",
    "import sys; from vllm_flashtrace.server.launcher import main; main(sys.argv[1:])",
]
STOCK = ["-m", "vllm.entrypoints.openai.api_server", "--model"]
STOCK_ENV = {"VLLM_PLUGINS": "none", "VLLM_FLASHTRACE_DISABLE": "1"}


_CHAT = {
    "model": "m",
    "messages": [{"role": "user", "content": "Name three colours."}],
    "max_tokens": 12,
    "temperature": 0,
}
_TEXT = {"model": "m", "prompt": "One, two, three,", "max_tokens": 8, "temperature": 0}
_RESPONSE = {"model": "m", "input": "Hi", "max_output_tokens": 4, "temperature": 0}
_USAGE = {"stream": True, "stream_options": {"include_usage": True}}
# Without the field our server must answer these exactly as vLLM does.
PLAIN_REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", _CHAT),
    ("/v1/chat/completions", {**_CHAT, "n": 2, "logprobs": True, "top_logprobs": 2}),
    ("/v1/chat/completions", {**_CHAT, **_USAGE}),
    ("/v1/chat/completions", {**_CHAT, "max_tokens": -1}),
    ("/v1/chat/completions", {**_CHAT, "vllm_xargs": {"other": 1}}),
    ("/v1/completions", _TEXT),
    ("/v1/completions", {**_TEXT, "n": 2, "echo": True, "stop": ["seven"]}),
    ("/v1/completions", {**_TEXT, "echo": True, "max_tokens": 0}),
    ("/v1/completions", {**_TEXT, **_USAGE}),
    ("/v1/completions", {**_TEXT, "prompt": ["Red, green,", "Up, down,"]}),
    ("/v1/completions", {**_TEXT, "use_beam_search": True, "n": 2}),
    ("/v1/responses", _RESPONSE),
    ("/v1/responses", {**_RESPONSE, "stream": True}),
    ("/v1/messages", _CHAT),
    ("/v1/messages", {**_CHAT, "stream": True}),
]


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: Its base address.
        log: File with its output.
        pid: Its process, and process group.
    """

    url: str
    log: Path
    pid: int


def ask(server: Server, path: str, body: dict[str, Any]) -> tuple[int, str, str]:
    """Status, content type and body, with ids and times masked."""
    response = httpx.post(f"{server.url}{path}", json=body, timeout=300)
    text = re.sub(r"(chatcmpl|cmpl|resp|msg|rs)[-_][0-9a-f]{8,}", r"\1-ID", response.text)
    text = re.sub(r'"(created|created_at|completed_at)":[0-9.]+', r'"\1":0', text)
    return response.status_code, response.headers["content-type"], text


def assert_same(answer: tuple[int, str, str], stock: tuple[int, str, str]) -> None:
    """Holds the result of `ask` to another; a busy vLLM joins tokens of a stream."""
    if answer != stock and "event-stream" in stock[1]:
        assert answer[:2] == stock[:2] and without_pace(answer[2]) == without_pace(stock[2])
    else:
        assert answer == stock


def metric_names(server: Server) -> list[str]:
    """Names and types of the metrics at ``/metrics``."""
    lines = httpx.get(f"{server.url}/metrics", timeout=30).text.splitlines()
    return [line for line in lines if line.startswith("# TYPE")]


def openapi(server: Server) -> Any:
    """The schema of the HTTP interface."""
    return httpx.get(f"{server.url}/openapi.json", timeout=30).json()


def _clean_environment() -> dict[str, str]:
    """Without what a plugin that was loaded into the tests' own process has left there."""
    return {name: value for name, value in os.environ.items() if name != "FLASHTRACE_PROCESSES"}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def serve(
    program: list[str],
    model: str,
    log: Path,
    *options: str,
    worker_process: bool = False,
    by_command: bool = False,
    **env: str,
) -> Iterator[Server]:
    """Runs ``program`` with ``model`` and options until the block ends.

    Args:
        program: ``OURS`` or ``STOCK``.
        model: What to serve.
        log: File for its output.
        options: Of the server, besides ``OPTIONS``.
        worker_process: Starts the worker as a process of its own, as vLLM does by default.
        by_command: Starts its processes as vLLM does, in three times the time; see
            :mod:`tests.forked`.
        env: What to add to the environment.

    Raises:
        RuntimeError: The server ended or did not answer in time; has the end of its log.
    """
    port = free_port()
    if not worker_process:
        options, env = (UNI, *options), {**IN_ENGINE, **env}
    command = [*program, model, *OPTIONS, f"--port={port}", *options]
    environment = {**_clean_environment(), **env}
    process = (_popen if by_command else forked)(command, log, environment)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(process, url, log)
        yield Server(url, log, process.pid)
    finally:
        _stop(process)


def _popen(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def _wait(process: subprocess.Popen[bytes] | ForkedProcess, url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}:\n{_tail(log)}")
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise RuntimeError(f"the server did not answer within {START_SECONDS} s:\n{_tail(log)}")


def _stop(process: subprocess.Popen[bytes] | ForkedProcess) -> None:
    """Ends the whole process group that :func:`serve` started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            continue
    process.wait(timeout=30)


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-40:])


def without_pace(stream: str) -> tuple[list[str], str]:
    """A stream's kinds of events in order, and its text.

    vLLM joins tokens when it is busy: those that came before the last chunk may all be in it, so
    chunks that only have text are not among the kinds.
    """
    text = ""

    def blank(value: Any, key: str = "") -> Any:
        nonlocal text
        if isinstance(value, dict):
            return {name: blank(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [blank(item) for item in value]
        if key in ("content", "text", "delta") and isinstance(value, str):
            text += value
            return ""
        return 0 if key == "sequence_number" else value

    lines = [line for line in stream.splitlines() if line]
    events = [line for line in lines if not line.startswith("data: {")]
    found = [json.loads(line.removeprefix("data: ")) for line in lines if line not in events]
    events += [json.dumps(event) for event in map(blank, found) if not _is_mere_text(event)]
    return list(dict.fromkeys(events)), text


def _is_mere_text(event: dict[str, Any]) -> bool:
    """Whether a chunk has nothing but the text of some tokens."""
    choices = event.get("choices")
    return bool(choices) and all(
        choice["finish_reason"] is None and "role" not in choice.get("delta", ())
        for choice in choices
    )
