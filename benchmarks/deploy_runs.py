"""Proof of ``vllm-flashtrace deploy``: two replicas under load, one of them killed, one drained.

Mixed requests of all routes, some streamed, some traced, some deferred, some with several choices.
A replica's process gets SIGKILL when two fifths of the answers are there. Afterwards deferred
attributions are given to both replicas while the deployment is scaled down to one.

    python -m benchmarks.deploy_runs --json OUT [--quick]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.deploy_cluster import REPLICA_HEADER, Cluster, cluster
from benchmarks.deploy_load import Sent, client, results, send_all, statuses, tally
from benchmarks.mixed_requests import make_request
from benchmarks.tables import Column, count, decimals, markdown

REPLICAS = 2
CONCURRENCY = 8
_SEED = 0
_DRAIN_SECONDS = 120.0
_RESULT_SECONDS = 180.0
_REPLACEMENT_SECONDS = 240.0
_POLL_SECONDS = 0.2
_PENDING_AT_ONCE = 16


async def run(running: Cluster, model: Path, requests: int, tokens: int) -> dict[str, Any]:
    """Both parts; ``tokens``: of the text that each attribution in the second one explains."""
    began = time.monotonic()
    running.finish(running.deploy(model, REPLICAS, _DRAIN_SECONDS))
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

    async def kill() -> None:
        actor.kill()
        moments["killed"] = time.monotonic()
        while not await asyncio.to_thread(running.replicas) - before:
            if time.monotonic() - moments["killed"] > _REPLACEMENT_SECONDS:
                raise RuntimeError("no replica came in the place of the one that was killed")
            await asyncio.sleep(_POLL_SECONDS)
        moments["replaced"] = time.monotonic()

    load = [make_request(index, _SEED) for index in range(requests)]
    for request in load:
        request.stay_seconds = None  # Nobody leaves: every answer counts.
    began = time.monotonic()
    sent = await send_all(http, load, CONCURRENCY, requests * 2 // 5, kill)
    seconds = max(one.ended for one in sent) - began
    failed = [one for one in sent if one.code is not None]
    deferred = [i for one in sent if one.request.deferred for i in one.request.found]
    found = await results(http, deferred, _RESULT_SECONDS)
    return {
        "requests": len(sent),
        "kinds": len({one.request.kind for one in sent}),
        "completed": len(sent) - len(failed),
        "failed": tally([one.code for one in failed]),
        "failed_elsewhere": len([one for one in failed if not _was_on(one, victim, moments)]),
        "by_replica": sorted(tally([one.replica for one in sent]).values(), reverse=True),
        "deferred": len(deferred),
        "deferred_found": len([status for status in found.values() if status is not None]),
        "deferred_results": tally(list(found.values())),
        "seconds": seconds,
        "requests_per_second": (len(sent) - len(failed)) / seconds,
        "replacement_seconds": moments["replaced"] - moments["killed"],
        "engine_processes_left": len(psutil.wait_procs(engine, timeout=30)[1]),
    }


def _was_on(one: Sent, victim: str, moments: dict[str, float]) -> bool:
    """Whether a request was in flight on the replica that was killed, when it was."""
    return one.replica == victim and one.began <= moments["killed"] <= one.ended


async def drained(
    running: Cluster, http: httpx.AsyncClient, model: Path, tokens: int
) -> dict[str, Any]:
    """Deferred attributions on both replicas, one of which is taken away meanwhile."""
    before = running.replicas()
    made_on: dict[str, str] = {}
    pending: set[str] = set()
    command, left = running.deploy(model, 1, _DRAIN_SECONDS), before
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
    found = await results(http, list(made_on), _RESULT_SECONDS)
    return {
        "deferred": len(made_on),
        "on_the_replica_that_left": len(theirs),
        "unfinished_when_it_left": len(unfinished),
        "of_these_completed": len([one for one in unfinished if found[one] == "completed"]),
        "results": tally(list(found.values())),
        "replicas_that_stayed": len(left & before),
    }


def _long(index: int, tokens: int) -> dict[str, Any]:
    source = random.Random(f"{_SEED}-{index}")
    text = [source.randrange(100, 400) for _ in range(tokens)]
    fields = {"mode": "deferred", "hops": 2, "target": "generated", "recurse_over": "generated"}
    return {"model": "m", "prompt": text[:8], "completion": text[8:], "flashtrace": fields}


def table(report: dict[str, Any]) -> str:
    """What the run showed, as Markdown."""
    load, drain = report["killed"], report["drained"]
    rows = [
        {
            **load,
            "failures": ", ".join(f"{n} {code}" for code, n in load["failed"].items()) or "none",
            "found": f"{load['deferred_found']} of {load['deferred']}",
            "survived": f"{drain['of_these_completed']} of {drain['unfinished_when_it_left']}",
        }
    ]
    columns: Sequence[Column] = [
        Column("requests", "requests", count),
        Column("completed", "completed", count),
        Column("failed", "failures", str),
        Column("failed that were not on the killed replica", "failed_elsewhere", count),
        Column("deferred ids found afterwards", "found", str),
        Column("unfinished ones of a replica that left, completed", "survived", str),
        Column("requests/s", "requests_per_second", decimals(2)),
        Column("seconds to a replacement", "replacement_seconds", decimals(1)),
    ]
    return markdown(columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="a tiny random model, less of it")
    options = parser.parse_args()
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
        report = {"model": "tiny llama" if options.quick else "SmolLM2-135M-Instruct", **report}
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    print(json.dumps(report, indent=2))
    print(table(report))


if __name__ == "__main__":
    main()
