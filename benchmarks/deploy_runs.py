"""Proof of ``vllm-flashtrace deploy``: two replicas under load, one of them killed, one drained.

Mixed requests of all routes, some streamed, some traced, some deferred, some with several choices.
A replica's process gets SIGKILL when two fifths of the answers are there. Afterwards deferred
attributions are given to both replicas while the deployment is scaled down to one. Everything
listens on 127.0.0.1, in a Ray cluster of this machine's own.

    python -m benchmarks.deploy_runs --json OUT [--quick]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import secrets
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.load import Answer, client, send_all
from benchmarks.mixed_load import MixedRequest, make_request
from benchmarks.tables import Column, count, decimals, emit, markdown
from tests.server.live_server import free_port

REPLICA_HEADER = "x-flashtrace-replica"
REPLICAS, CONCURRENCY = 2, 8
_OPTIONS = (
    "--served-model-name=m",
    "--enforce-eager",
    "--dtype=float32",
    "--max-model-len=2048",
    "--kv-cache-memory-bytes=1G",
    "--disable-uvicorn-access-log",
)
_SEED = 0
_START_SECONDS, _DEPLOY_SECONDS, _STOP_SECONDS = 120.0, 300.0, 30.0
_DRAIN_SECONDS, _RESULT_SECONDS, _REPLACEMENT_SECONDS = 120.0, 180.0, 240.0
_PENDING_AT_ONCE = 16


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

    def deploy(self, model: Path, replicas: int) -> subprocess.Popen[bytes]:
        """Starts the command; it returns when the deployment is as asked for."""
        command = [_script("vllm-flashtrace"), "deploy", str(model), "--no-blocking"]
        command += [f"--port={self.url.rpartition(':')[2]}", f"--replicas={replicas}"]
        command += ["--cpus-per-replica=1", f"--drain-timeout={_DRAIN_SECONDS:g}", *_OPTIONS]
        with self.log.open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=self.environment)

    def finish(self, command: subprocess.Popen[bytes]) -> None:
        """Waits for a command; raises RuntimeError if it fails."""
        if code := command.wait(_DEPLOY_SECONDS):
            raise RuntimeError(f"deploy ended with {code}")

    def replicas(self) -> set[str]:
        """Names of the replicas that tell their metrics: those that requests are sent to."""
        text = httpx.get(f"{self.url}/metrics", timeout=30, trust_env=False).text
        return {line.split('"')[1] for line in text.splitlines() if "{replica=" in line}

    def process(self, replica: str) -> psutil.Process:
        """The process of a replica; raises RuntimeError if the replica does not answer."""
        for _ in range(200):
            url = f"{self.url}/v1/attributions/status"
            response = httpx.get(url, timeout=30, trust_env=False)
            if response.headers.get(REPLICA_HEADER) == replica:
                return psutil.Process(response.json()["processes"][-1]["pid"])
        raise RuntimeError(f"{replica} does not answer")


@contextmanager
def cluster(folder: Path, cpus: int) -> Iterator[Cluster]:
    """Runs a cluster while the block lasts; ``folder`` needs a short path, for its sockets.

    Raises:
        RuntimeError: It does not start.
    """
    port, log = free_port(), folder / "log"
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
        own = {**environment, "RAY_ADDRESS": ""}
        head = subprocess.Popen(command, stdout=output, stderr=output, env=own)
    try:
        deadline = time.monotonic() + _START_SECONDS
        while "Ray runtime started" not in log.read_text():
            if head.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Ray did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.2)
        yield Cluster(f"http://127.0.0.1:{free_port()}", environment, log)
    finally:
        running = head.poll() is None
        started = psutil.Process(head.pid).children(recursive=True) if running else []
        head.terminate()
        try:
            head.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            head.kill()
            head.wait()
        for process in psutil.wait_procs(started, timeout=_STOP_SECONDS)[1]:
            process.kill()


async def run(running: Cluster, model: Path, requests: int, tokens: int) -> dict[str, Any]:
    """Both parts; ``tokens``: of the text that each attribution in the second one explains."""
    began = time.monotonic()
    running.finish(running.deploy(model, REPLICAS))
    report: dict[str, Any] = {"ready_seconds": time.monotonic() - began}
    async with client(running.url) as http:
        report["killed"] = await killed(running, http, requests)
        report["drained"] = await drained(running, http, model, tokens)
    return report


async def killed(running: Cluster, http: httpx.AsyncClient, requests: int) -> dict[str, Any]:
    """A load in the middle of which one replica is killed."""
    before = running.replicas()
    victim = random.Random(_SEED).choice(sorted(before))
    actor = running.process(victim)
    engine = actor.children(recursive=True)
    moments: dict[str, float] = {}
    due, done = asyncio.Event(), Counter[str]()
    load = [make_request(index, _SEED) for index in range(requests)]
    for request in load:
        request.stay_seconds = None  # Nobody leaves: every answer counts.

    def take(index: int, answer: Answer) -> None:
        load[index].take(answer)
        done["answers"] += 1
        if done["answers"] >= requests * 2 // 5:
            due.set()

    async def kill() -> None:
        await due.wait()
        actor.kill()
        moments["killed"] = time.perf_counter()
        while not await asyncio.to_thread(running.replicas) - before:
            if time.perf_counter() - moments["killed"] > _REPLACEMENT_SECONDS:
                raise RuntimeError("no replica came in the place of the one that was killed")
            await asyncio.sleep(0.2)
        moments["replaced"] = time.perf_counter()

    answers, _ = await asyncio.gather(send_all(http, load, CONCURRENCY, on_answer=take), kill())
    seconds = max(a.ended for a in answers) - min(a.sent for a in answers)

    def was_on_it(answer: Answer) -> bool:
        on_victim = answer.headers.get(REPLICA_HEADER) == victim
        return on_victim and answer.sent <= moments["killed"] <= answer.ended

    failed = [(r, a) for r, a in zip(load, answers, strict=True) if r.fault]
    deferred = [name for request in load if request.deferred for name in request.found]
    found = await results(http, deferred)
    return {
        "requests": len(load),
        "kinds": len({request.kind for request in load}),
        "completed": len(load) - len(failed),
        "failed": tally(_code(*pair) for pair in failed),
        "failed_elsewhere": sum(not was_on_it(answer) for _, answer in failed),
        "by_replica": list(tally(a.headers.get(REPLICA_HEADER) for a in answers).values()),
        "deferred": len(deferred),
        "deferred_found": sum(status is not None for status in found.values()),
        "deferred_results": tally(found.values()),
        "seconds": seconds,
        "requests_per_second": (len(load) - len(failed)) / seconds,
        "replacement_seconds": moments["replaced"] - moments["killed"],
        "engine_processes_left": len(psutil.wait_procs(engine, timeout=30)[1]),
    }


async def drained(
    running: Cluster, http: httpx.AsyncClient, model: Path, tokens: int
) -> dict[str, Any]:
    """Deferred attributions on both replicas, one of which is taken away meanwhile."""
    before = running.replicas()
    made_on: dict[str, str] = {}
    pending: set[str] = set()
    command, left = running.deploy(model, 1), before
    while left == before and command.poll() is None:
        told = await statuses(http, sorted(pending))
        pending -= {one for one, status in told.items() if status == "completed"}
        while len(pending) < _PENDING_AT_ONCE:
            response = await http.post("/v1/attributions", json=_long(len(made_on), tokens))
            made_on[response.json()["id"]] = response.headers[REPLICA_HEADER]
            pending.add(response.json()["id"])
        left = await asyncio.to_thread(running.replicas)
    await asyncio.to_thread(running.finish, command)
    left = await asyncio.to_thread(running.replicas)
    [gone] = before - left
    theirs = [one for one, replica in made_on.items() if replica == gone]
    unfinished = pending.intersection(theirs)
    found = await results(http, list(made_on))
    return {
        "deferred": len(made_on),
        "on_the_replica_that_left": len(theirs),
        "unfinished_when_it_left": len(unfinished),
        "of_these_completed": sum(found[one] == "completed" for one in unfinished),
        "results": tally(found.values()),
        "replicas_that_stayed": len(left & before),
    }


async def results(http: httpx.AsyncClient, ids: Sequence[str]) -> dict[str, str | None]:
    """Waits for deferred attributions: the status of each, or its error's code; None: unknown."""
    deadline = time.monotonic() + _RESULT_SECONDS
    found = await statuses(http, ids)
    while time.monotonic() < deadline and not {"queued", "running"}.isdisjoint(found.values()):
        await asyncio.sleep(0.25)
        found = await statuses(http, ids)
    return found


async def statuses(http: httpx.AsyncClient, ids: Sequence[str]) -> dict[str, str | None]:
    """What `results` tells, as it is now."""
    found: dict[str, str | None] = {}
    for one in ids:
        response = await http.get(f"/v1/attributions/{one}")
        body = response.json() if response.status_code == 200 else {}
        found[one] = (body.get("error") or {}).get("code") or body.get("status")
    return found


def tally(values: Any) -> dict[str, int]:
    """Counts, the most frequent first."""
    return {str(value): number for value, number in Counter(values).most_common()}


def _code(request: MixedRequest, answer: Answer) -> str:
    """The code of the error that an answer is, or ends with."""
    for line in reversed([answer.text, *answer.text.splitlines()]):
        try:
            payload = json.loads(line.removeprefix("data:"))
        except ValueError:
            continue
        error = payload.get("error") or payload if isinstance(payload, dict) else None
        if isinstance(error, dict) and error.get("code"):
            return str(error["code"])
    return request.fault


def _long(index: int, tokens: int) -> dict[str, Any]:
    source = random.Random(f"{_SEED}-{index}")
    text = [source.randrange(100, 400) for _ in range(tokens)]
    fields = {"mode": "deferred", "hops": 2, "target": "generated", "recurse_over": "generated"}
    return {"model": "m", "prompt": text[:8], "completion": text[8:], "flashtrace": fields}


def _script(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def table(report: dict[str, Any]) -> str:
    """What the run showed, as Markdown."""
    load, drain = report["killed"], report["drained"]
    row = {
        **load,
        "failures": ", ".join(f"{n} {code}" for code, n in load["failed"].items()) or "none",
        "found": f"{load['deferred_found']} of {load['deferred']}",
        "survived": f"{drain['of_these_completed']} of {drain['unfinished_when_it_left']}",
    }
    columns = [
        Column("requests", "requests", count),
        Column("completed", "completed", count),
        Column("failed", "failures", str),
        Column("failed that were not on the killed replica", "failed_elsewhere", count),
        Column("deferred ids found afterwards", "found", str),
        Column("unfinished ones of a replica that left, completed", "survived", str),
        Column("requests/s", "requests_per_second", decimals(2)),
        Column("seconds to a replacement", "replacement_seconds", decimals(1)),
    ]
    return markdown(columns, [row])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="a tiny random model, less of it")
    options = parser.parse_args(arguments)
    # Sockets are made in it, whose paths must be short.
    with tempfile.TemporaryDirectory(prefix="dr-") as name:
        folder = Path(name)
        if options.quick:
            from tests.tiny_models import make_tiny_model

            model, requests, tokens = make_tiny_model("llama", folder / "model"), 80, 1500
        else:
            from vllm_flashtrace.models import prepare_smollm2

            model, requests, tokens = prepare_smollm2(), 300, 700
        with cluster(folder, REPLICAS) as running:
            try:
                report = asyncio.run(run(running, model, requests, tokens))
            except Exception:
                print(running.log.read_text(errors="replace")[-5000:])
                raise
    report["model"] = "tiny llama" if options.quick else "SmolLM2-135M-Instruct"
    emit(report, table(report), options.json)


if __name__ == "__main__":
    main()
