"""Servers to measure, what they still hold, and the client that loads them.

The stock server and the one with the plugin differ in the plugin alone: both get the same options
and the same other vLLM plugins, and listen on 127.0.0.1; the stock one is checked for being stock.
"""

from __future__ import annotations

import ast
import asyncio
import json
import random
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import httpx
import msgspec
import psutil

from tests.server.live_server import OURS, STOCK, Server, serve
from vllm_flashtrace.base.process import prepare_environment
from vllm_flashtrace.trace.config import SECTION

MODEL = "m"
DEV_MODE = {"VLLM_SERVER_DEV_MODE": "1"}
"""Environment in which `what_is_left` works."""

_PLUGIN = "flashtrace"
_ANSWER_TOKENS = 40
# Special tokens of the bundled model come first in its vocabulary.
_PLAIN_TOKENS = range(100, 49_000)
_HELD = ("accumulator_bytes", "recording", "waiting_results")
_GAUGES = {
    "requests_running": "vllm:num_requests_running",
    "requests_waiting": "vllm:num_requests_waiting",
    "kv_cache_usage": "vllm:kv_cache_usage_perc",
}


class Request(Protocol):
    """What the client sends: a POST, from which it walks away after ``stay_seconds`` if given."""

    @property
    def path(self) -> str: ...  # noqa: D102

    body: dict[str, Any]
    stay_seconds: float | None


@dataclass(slots=True)
class Answer:
    """What came back, undecoded so that the client takes as little of the machine as it can.

    Attributes:
        sent: When the request left, by `time.perf_counter`, like all moments here.
        ended: When the answer was over.
        status: HTTP status; None if none came.
        headers: Of the response.
        chunks: Arrival and bytes of each part of the body.
        problem: What broke the connection; empty if nothing did.
        left: Whether the client walked away.
    """

    sent: float
    ended: float = 0.0
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    chunks: list[tuple[float, bytes]] = field(default_factory=list)
    problem: str = ""
    left: bool = False

    @property
    def text(self) -> str:
        """The body."""
        return b"".join(chunk for _, chunk in self.chunks).decode()

    def lines(self) -> Iterator[tuple[float, str]]:
        """Lines that are not empty, with the arrival of what ended each."""
        rest = b""
        for moment, chunk in [*self.chunks, (self.ended, b"\n")]:
            *whole, rest = (rest + chunk).split(b"\n")
            yield from ((moment, line.decode()) for line in whole if line.strip())


def client(url: str, seconds: float = 300.0) -> httpx.AsyncClient:
    """A client for any number of requests at once, each of which may take ``seconds``."""
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=url, timeout=seconds, limits=limits, trust_env=False)


async def ask(http: httpx.AsyncClient, request: Request) -> Answer:
    """Sends one request and takes its answer; a broken connection is a `problem` of the answer."""
    answer = Answer(time.perf_counter())
    try:
        async with (
            asyncio.timeout(request.stay_seconds),
            http.stream("POST", request.path, json=request.body) as response,
        ):
            answer.status, answer.headers = response.status_code, dict(response.headers)
            async for chunk in response.aiter_bytes():
                answer.chunks.append((time.perf_counter(), chunk))
    except TimeoutError:
        answer.left = True
    except httpx.HTTPError as error:
        answer.problem = f"{type(error).__name__}: {error}"
    answer.ended = time.perf_counter()
    return answer


async def send_all(
    http: httpx.AsyncClient,
    requests: Sequence[Request],
    concurrency: int,
    *,
    stagger: float = 0.0,
    on_answer: Callable[[int, Answer], None] = lambda index, answer: None,
) -> list[Answer]:
    """Sends the requests in a closed loop and returns their answers.

    Args:
        http: From `client`.
        requests: What to ask for, in order.
        concurrency: So many requests are in flight until none are left.
        stagger: Seconds between the first ones; without it requests of equal length stay in step
            with each other, and none meets the prefill of another.
        on_answer: Called with the index of each request and its answer.
    """
    waiting, answers = iter(enumerate(requests)), {}

    async def sender(place: int) -> None:
        await asyncio.sleep(stagger * place)
        for index, request in waiting:
            answers[index] = await ask(http, request)
            on_answer(index, answers[index])

    async with asyncio.TaskGroup() as group:
        for place in range(concurrency):
            group.create_task(sender(place))
    return [answers[index] for index in range(len(requests))]


def random_prompt(seed: object, length: int) -> list[int]:
    """Random plain tokens; equal seeds give equal prompts, others share no prefix."""
    return random.Random(str(seed)).choices(_PLAIN_TOKENS, k=length)


def two_hops(output_length: int) -> dict[str, Any]:
    """A ``flashtrace`` field that explains the last tokens, with all before them as reasoning."""
    start = output_length - min(_ANSWER_TOKENS, output_length // 2)
    target, reasoning = {"tokens": [[start, output_length]]}, {"tokens": [[0, start]]}
    return {"target": target, "reasoning": reasoning, "hops": 1}


def is_chosen(index: int, share: float) -> bool:
    """Whether an index belongs to an evenly spread ``share`` of all."""
    return int((index + 1) * share + 0.5) > int(index * share + 0.5)


def end_servers_on_signals() -> None:
    """Turns SIGTERM into SystemExit, so that servers are stopped on the way out."""

    def leave(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)


@contextmanager
def stock_server(model: Path, log: Path, options: list[str]) -> Iterator[Server]:
    """Runs vLLM's own server, with every plugin it would load by itself except ours.

    Raises:
        RuntimeError: Something of ours is in it.
    """
    prepare_environment()
    groups = ("general", "io_processor", "platform", "stat_logger")
    entries = (e for group in groups for e in metadata.entry_points(group=f"vllm.{group}_plugins"))
    others = sorted({entry.name for entry in entries} - {_PLUGIN})
    env = {"VLLM_PLUGINS": ",".join(others) or "none", "VLLM_FLASHTRACE_DISABLE": "1"}
    with serve(
        STOCK, str(model), log, *options, worker_process=True, by_command=True, **env
    ) as server:
        _check_stock(server)
        yield server


@contextmanager
def plugin_server(
    model: Path, log: Path, options: list[str], config: dict[str, Any] | None = None, **env: str
) -> Iterator[Server]:
    """Runs the server of ``vllm-flashtrace serve``.

    Args:
        model: Folder of the model.
        log: File for the server's output.
        options: Further ``vllm serve`` options.
        config: The plugin's own options.
        **env: Further environment variables.
    """
    prepare_environment()
    extra = [f"--additional-config={json.dumps({SECTION: config})}"] if config else []
    options = [*options, *extra]
    with serve(
        OURS, str(model), log, *options, worker_process=True, by_command=True, **env
    ) as server:
        yield server


def _check_stock(server: Server) -> None:
    if _PLUGIN in psutil.Process(server.pid).environ()["VLLM_PLUGINS"].split(","):
        raise RuntimeError("the stock server loads the plugin")
    status = httpx.post(f"{server.url}/v1/attributions", json={}, timeout=30).status_code
    if status != 404:
        raise RuntimeError(f"the stock server answers /v1/attributions with {status}")
    loaded = re.search(rf"Load\w+ .*plugin {_PLUGIN}", server.log.read_text(errors="replace"))
    if loaded is not None:
        raise RuntimeError(f"the stock server's log says {loaded.group()!r}")


def what_is_left(server: Server) -> dict[str, float]:
    """Accumulators, recordings and results of the worker; requests and KV blocks of the engine.

    The server must have been started with `DEV_MODE`.
    """
    rpc, body = f"{server.url}/collective_rpc", {"method": "flashtrace_status"}
    response = httpx.post(rpc, json=body, timeout=60).raise_for_status()
    # The route answers with the text form of the bytes that the worker returned.
    [reply] = response.json()["results"]
    status: dict[str, Any] = msgspec.msgpack.decode(ast.literal_eval(reply))
    left = {key: status[key] for key in _HELD}
    text = httpx.get(f"{server.url}/metrics", timeout=60).text
    for name, metric in _GAUGES.items():
        found = re.findall(rf"^{metric}{{[^}}]*}} (\S+)$", text, flags=re.MULTILINE)
        if not found:
            raise RuntimeError(f"the server has no metric {metric}")
        left[name] = sum(map(float, found))
    return left
