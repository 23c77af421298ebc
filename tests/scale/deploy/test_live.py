"""Two replicas of a tiny model behind Ray Serve; the tests run in order, the last ones break it.

Three engines start at once: the replicas, which have to be two, and a server without the plugin to
compare answers with. Two more take the place of the replicas that the tests kill.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from benchmarks.processes import engine_core, worker
from tests.scale.deploy.deployment import OPTIONS, REPLICA_HEADER, Deployment, deploy, stop, until
from tests.server import live_server
from tests.tiny_models import make_tiny_model

pytestmark = pytest.mark.timeout(1800)

# All servers have it, for vLLM's fingerprint of a configuration is in its answers.
PAGE = """--additional-config={"flashtrace": {"page": true}}"""
TEXT = {"prompt": "One, two, three,", "max_tokens": 8, "temperature": 0}
DEFERRED = {"mode": "deferred", "hops": 0}
_TOKENS = [100 + i % 300 for i in range(1900)]
# Hops that keep a replica busy for long enough to end it meanwhile.
LONG = {
    "prompt": "Hello",
    "completion": _TOKENS,
    "flashtrace": {"hops": 8, "recurse_over": "generated", "target": "generated"},
}
STREAM = {"prompt": "x", "max_tokens": 1900, "ignore_eos": True, "stream": True}


def answers(ask: Any) -> list[Any]:
    """What a server answers to requests without the field, with ids masked."""
    found = [ask(path, body) for path, body in live_server.PLAIN_REQUESTS]
    # Serve gives every request an id with dashes, which vLLM takes up.
    rest = r"ID(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    masked = [(code, kind, re.sub(rest, "ID", text)) for code, kind, text in found]
    return [
        (code, kind, live_server.without_pace(text) if "event-stream" in kind else text)
        for code, kind, text in masked
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("qwen3", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def started(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Deployment, list[Any]]]:
    """A deployment, and what vLLM without plugin and without Ray answers; they start together."""
    folder = tmp_path_factory.mktemp("logs")

    def stock_answers() -> list[Any]:
        env, log = live_server.STOCK_ENV, folder / "stock"
        with live_server.serve(live_server.STOCK, str(model), log, *OPTIONS, PAGE, **env) as server:
            return answers(lambda path, body: live_server.ask(server, path, body))

    with ThreadPoolExecutor(1) as pool:
        stock = pool.submit(stock_answers)
        options = ("--replicas=2", "--drain-timeout=60", PAGE)
        with deploy(model, folder / "deploy", *options) as running:
            yield running, stock.result()


@pytest.fixture
def two(started: tuple[Deployment, list[Any]]) -> Deployment:
    return started[0]


@pytest.fixture
def stock_answers(started: tuple[Deployment, list[Any]]) -> list[Any]:
    return started[1]


def defer(deployment: Deployment, **body: Any) -> httpx.Response:
    response = deployment.post("/v1/attributions", **{**LONG, "flashtrace": DEFERRED, **body})
    assert response.json()["status"] == "queued", response.text
    return response


def fetch(deployment: Deployment, attribution_id: str) -> dict[str, Any]:
    response = deployment.get(f"/v1/attributions/{attribution_id}")
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def test_without_the_field_it_answers_as_vllm_does(two, stock_answers):
    server = live_server.Server(two.url, two.log, two.process.pid)
    assert answers(lambda path, body: live_server.ask(server, path, body)) == stock_answers


def test_a_trace_runs_on_the_replica_of_its_completion(two):
    with ThreadPoolExecutor(4) as pool:
        asks = [
            pool.submit(two.post, "/v1/completions", **TEXT, flashtrace=True) for _ in range(12)
        ]
        found = [ask.result() for ask in asks]
    bodies = [response.json()["choices"][0]["flashtrace"] for response in found]
    assert {body["status"] for body in bodies} == {"completed"}
    by_replica = Counter(response.headers[REPLICA_HEADER] for response in found)
    assert len(by_replica) == 2
    for replica, count in by_replica.items():
        traced = two.metric("flashtrace_requests_total", replica=replica, status="completed")
        assert traced == count


def test_a_deferred_attribution_is_found_and_deleted_through_any_replica(two):
    body = {"prompt": "One,", "completion": " two,"}
    ids = [defer(two, **body).json()["id"] for _ in range(4)]
    until(lambda: all(fetch(two, one)["status"] == "completed" for one in ids))
    for replica in two.replicas():
        for one in ids:
            assert two.on(replica, f"/v1/attributions/{one}").json() == fetch(two, one)
    for one in ids:
        url = f"{two.url}/v1/attributions/{one}"
        assert httpx.delete(url, timeout=300).status_code == 200
        assert {two.get(f"/v1/attributions/{one}").status_code for _ in range(4)} == {404}


def test_the_page_and_the_status_of_each_replica_are_there(two):
    assert two.get("/flashtrace").status_code == 200
    pids = set()
    for replica in two.replicas():
        status = two.on(replica, "/v1/attributions/status").json()
        assert status["status"] == "ready"
        pids.add(status["processes"][-1]["pid"])
    assert len(pids) == 2


def test_a_stream_is_not_held_back_and_ends_with_its_client(two):
    running, generated = "vllm:num_requests_running", "vllm:generation_tokens_total"
    before = two.metric(generated)
    body = {"model": "m", **STREAM}
    with httpx.stream("POST", f"{two.url}/v1/completions", json=body, timeout=300) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
    until(lambda: two.metric(running) == 0)
    assert two.metric(generated) - before < STREAM["max_tokens"]


def begin_stream(deployment: Deployment, stack: ExitStack) -> tuple[str, Iterator[str]]:
    """A stream whose first event has come: which replica answers it, and the rest of its lines."""
    url, body = f"{deployment.url}/v1/completions", {"model": "m", **STREAM}
    response = stack.enter_context(httpx.stream("POST", url, json=body, timeout=300))
    lines = response.iter_lines()
    assert next(lines).startswith("data: ")
    return response.headers[REPLICA_HEADER], lines


def error_at_end(lines: Iterator[str]) -> str | None:
    """The code of the error that a stream ends with."""
    *_, last, end = (line for line in lines if line)
    assert end == "data: [DONE]"
    return json.loads(last.removeprefix("data: ")).get("error", {"code": None})["code"]


def resume(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.resume()


def test_death_of_a_replica_is_an_error_to_its_requests_alone(two):
    before = two.replicas()
    families = {replica: two.family(replica) for replica in before}
    workers = {replica: worker(actor) for replica, (actor, _) in families.items()}
    streams = {}
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor())
        for _ in before:
            replica, lines = begin_stream(two, stack)
            streams[replica] = lines
            workers[replica].suspend()  # What has begun does not end before the death.
            stack.callback(resume, workers[replica])
        assert set(streams) == before
        traces = [pool.submit(two.post, "/v1/attributions", **LONG) for _ in range(6)]
        running = "flashtrace_traces_running"
        until(lambda: all(two.metric(running, replica=replica) for replica in before))
        pending = defer(two)
        victim = pending.headers[REPLICA_HEADER]
        actor, engine = families[victim]
        actor.kill()
        for each in workers.values():
            resume(each)
        asks = [pool.submit(two.post, "/v1/completions", **TEXT) for _ in range(8)]
        assert [ask.result().status_code for ask in asks] == [200] * 8
        ends = {replica: error_at_end(lines) for replica, lines in streams.items()}
        answers = [trace.result() for trace in traces]
    assert ends == {replica: "replica_lost" if replica == victim else None for replica in before}
    lost = [answer for answer in answers if answer.status_code != 200]
    assert lost and len(lost) < len(answers)
    for answer in lost:
        assert answer.headers[REPLICA_HEADER] == victim
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "replica_lost"
        assert answer.headers["retry-after"] == "1"
    _, alive = psutil.wait_procs(engine, timeout=300)
    assert not alive
    failed = pending.json()["id"]
    until(lambda: fetch(two, failed)["status"] == "failed")
    assert fetch(two, failed)["error"]["code"] == "server_lost"
    until(lambda: len(two.replicas() - before) == 1 and victim not in two.replicas(), 600)


@pytest.mark.long  # As one whose process died, which is tested above.
def test_a_replica_whose_engine_died_is_replaced(two):
    before = two.replicas()
    victim = sorted(before)[0]
    actor, _ = two.family(victim)
    engine_core(actor).kill()
    psutil.wait_procs([actor], timeout=300)
    assert not actor.is_running()
    assert {two.post("/v1/completions", **TEXT).status_code for _ in range(6)} == {200}


def taken(deployment: Deployment) -> float:
    """Traces that ended or are under way on the replicas that live."""
    states = "requests_total|traces_running|traces_waiting"
    page = deployment.get("/metrics").text
    return sum(map(float, re.findall(rf"^flashtrace_(?:{states}){{.*}} (\S+)$", page, re.M)))


def test_sigterm_lets_what_was_begun_finish_and_leaves_nothing(two):
    children = psutil.Process(two.process.pid).children(recursive=True)
    before = taken(two)
    with ThreadPoolExecutor() as pool:
        traces = [pool.submit(two.post, "/v1/attributions", **LONG) for _ in range(3)]
        until(lambda: taken(two) - before >= 3)
        code = stop(two.process)
        assert {trace.result().json()["status"] for trace in traces} == {"completed"}
    assert code == 143
    _, alive = psutil.wait_procs(children, timeout=300)
    assert not alive
