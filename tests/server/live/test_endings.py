"""Two API servers in front of one engine, and how servers end while traces are under way."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import Any

import httpx
import psutil
import pytest

from tests.server.live_server import OURS, Server, serve
from tests.server.otlp_receiver import Receiver, receive
from tests.server.test_metrics import Samples, parse, value

pytestmark = pytest.mark.timeout(1200)

TRACE_ID, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
# Where the machine is busy all still wait when the last has come.
WAITING = {"max_concurrent_traces": 1, "max_waiting_seconds": 300.0}
# One place for traces, and short steps: what is generated beside a long trace takes a step a token.
ONE_PLACE = (
    "--max-num-batched-tokens=256",
    *("--additional-config", json.dumps({"flashtrace": WAITING})),
)
MOST = 20
"""Requests at once."""
# Hops that keep the engine busy for long enough to end the server meanwhile.
LONG = {
    "prompt": "Hello",
    "completion": [500 + i % 3000 for i in range(1900)],
    "flashtrace": {"hops": 8, "recurse_over": "generated", "target": "generated"},
}


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receive() as running:
        yield running


@pytest.fixture(scope="module")
def one(
    receiver: Receiver, model_path: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server with one place for traces, which says what it does to the receiver."""
    env = {
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }
    options = (f"--otlp-traces-endpoint={receiver.url}", *ONE_PLACE)
    log = tmp_path_factory.mktemp("one") / "server.log"
    with serve(OURS, model_path, log, *options, worker_process=True, **env) as running:
        yield running


@pytest.fixture(scope="module")
def pair(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two API servers; each has one place for traces."""
    options = (
        "--api-server-count=2",
        "--enable-prompt-tokens-details",
        "--shutdown-timeout=20",
        *ONE_PLACE,
    )
    log = tmp_path_factory.mktemp("pair") / "server.log"
    with serve(OURS, model_path, log, *options, worker_process=True, by_command=True) as running:
        yield running


def complete(server: Server, number: int = 0, **headers: str) -> dict[str, Any]:
    body = {"model": "m", "prompt": f"Number {number} is", "max_tokens": 8, "flashtrace": True}
    response = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=300)
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def attribute_long(server: Server) -> dict[str, Any]:
    body = {"model": "m", **LONG}
    response = httpx.post(f"{server.url}/v1/attributions", json=body, timeout=300)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def generate_long(server: Server, begun: Event) -> str:
    """A stream without a trace that takes longer than the server lives."""
    body = {"model": "m", "prompt": "One", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    lines = []
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=300) as response:
        for line in response.iter_lines():
            begun.set()
            lines.append(line)
    return "\n".join(lines)


def metrics(server: Server) -> Samples:
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    assert text.count("# TYPE flashtrace_requests_total counter") == 1
    return parse(text)


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.1)


def ended(server: Server) -> bool:
    """Whoever forked it may have collected it already."""
    try:
        return psutil.Process(server.pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def lost_lines(server: Server) -> list[str]:
    lines = server.log.read_text(errors="replace").splitlines()
    return [line for line in lines if "Trace ft-" in line]


# `test_data_parallel.py` has two API servers that run always.
@pytest.mark.long
def test_metrics_of_two_api_servers_add_up(pair):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: complete(pair, i), range(8)))
    assert {answer["flashtrace"]["status"] for answer in answers} == {"completed"}
    recomputed = sum(answer["flashtrace"]["usage"]["recomputed_tokens"] for answer in answers)
    for _ in range(4):  # Whichever server answers, it answers for both.
        samples = metrics(pair)
        assert value(samples, "requests_total", route="/v1/completions", status="completed") == 8
        assert value(samples, "recomputed_tokens_total") == recomputed
        assert value(samples, "phase_seconds_count", phase="total") == 8
        assert value(samples, "traces_running") == value(samples, "traces_waiting") == 0
    workers = httpx.get(f"{pair.url}/v1/attributions/status").json()["engine"]["workers"]
    budget = value(samples, "accumulator_budget_bytes")
    assert 0 <= workers[0]["accumulator_budget_bytes"] - budget <= 1


def test_vllms_spans_nest_under_ours_under_the_requests(one, receiver):
    header = f"00-{TRACE_ID}-{PARENT}-01"
    choice = complete(one, 99, traceparent=header)
    assert choice["flashtrace"]["status"] == "completed"

    def spans(name: str) -> list[Any]:
        return [span for span in receiver.of_trace(TRACE_ID) if span.name == name]

    def requests() -> int:
        return len(spans("llm_request")) - len(spans("flashtrace.hop"))

    until(lambda: spans("flashtrace.attribute") and requests() == 1)
    [attribution] = spans("flashtrace.attribute")
    assert attribution.parent_span_id.hex() == PARENT
    ours = {span.span_id: span for span in spans("flashtrace.hop")}
    assert ours
    assert {span.parent_span_id for span in ours.values()} == {attribution.span_id}
    below = sorted(span.parent_span_id.hex() for span in spans("llm_request"))
    assert below == sorted([PARENT, *(key.hex() for key in ours)])


def submit(pool: ThreadPoolExecutor, server: Server, wait: int) -> list[Future[Any]]:
    """A long attribution and completions, all generated, of which so many wait behind it."""
    before = known(metrics(server))
    futures = [pool.submit(attribute_long, server)]
    until(lambda: value(metrics(server), "traces_running") >= 1)

    def all_wait_or_ended() -> bool:
        samples = metrics(server)
        only_long_runs = value(samples, "traces_running") == 1
        return only_long_runs and known(samples) == before + len(futures)

    # Which of two servers takes a completion is left to chance.
    while value(metrics(server), "traces_waiting") < wait:
        assert len(futures) < MOST
        futures.append(pool.submit(complete, server, len(futures)))
        until(all_wait_or_ended)
    return futures


def known(samples: Samples) -> float:
    """Attributions that wait, run or have ended."""
    ended = sum(n for (name, _), n in samples.items() if name == "flashtrace_requests_total")
    return ended + value(samples, "traces_waiting") + value(samples, "traces_running")


def check_lost(server: Server, futures: list[Future[Any]]) -> None:
    """Every completion is there; every trace that is not says why, there and in one log line."""
    long, *completions = (future.result(timeout=300) for future in futures)
    assert all(answer["text"] for answer in completions)
    traces = [long, *(answer["flashtrace"] for answer in completions)]
    lost = [trace for trace in traces if trace["status"] != "completed"]
    assert long in lost and len(lost) >= 2
    assert {trace["error"]["code"] for trace in lost} <= {"engine_dead", "aborted"}
    lines = lost_lines(server)
    for trace in lost:
        [line] = [line for line in lines if trace["id"] in line]
        assert f"code={trace['error']['code']}" in line
    assert len(lines) == len(lost)


def core(server: psutil.Process) -> psutil.Process:
    """The engine core, which may have been forked off."""
    [found] = [each for each in server.children() if "resource_tracker" not in str(each.cmdline())]
    return found


def check_sigterm(server: Server, wait: int) -> None:
    with ThreadPoolExecutor(MOST) as pool:
        futures = submit(pool, server, wait)
        os.kill(server.pid, signal.SIGTERM)
        check_lost(server, futures)
    until(lambda: ended(server))


@pytest.mark.long
def test_sigterm_of_two_servers_that_may_take_their_time(pair):
    """The last test on this pair. Without ``--shutdown-timeout`` vLLM kills both at once."""
    check_sigterm(pair, wait=1)


def test_sigterm_while_traces_run_and_wait(one):
    """The last test on this server."""
    begun = Event()
    with ThreadPoolExecutor() as pool:
        generation = pool.submit(generate_long, one, begun)
        assert begun.wait(120)
        # vLLM would end a completion that it still generates with an error.
        check_sigterm(one, wait=4)
        # Stock vLLM may leave it waiting, and then never ends itself.
        assert "EngineCore encountered an issue" in generation.result(timeout=300)


@pytest.mark.parametrize("by_command", [False, pytest.param(True, marks=pytest.mark.long)])
def test_death_of_the_engine_while_traces_run_and_wait(by_command, model_path, tmp_path):
    log = tmp_path / "server.log"
    start = {"worker_process": True, "by_command": by_command}
    with serve(OURS, model_path, log, *ONE_PLACE, **start) as server:
        with ThreadPoolExecutor(MOST) as pool:
            futures = submit(pool, server, wait=4)
            core(psutil.Process(server.pid)).kill()
            check_lost(server, futures)
        until(lambda: ended(server))
