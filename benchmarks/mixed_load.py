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
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.progress import Progress

from benchmarks.load import (
    DEV_MODE,
    MODEL,
    Answer,
    client,
    end_servers_on_signals,
    plugin_server,
    what_is_left,
)
from benchmarks.load import send_all as send
from benchmarks.processes import memory_mb
from benchmarks.tables import emit, plain
from tests.server.live_server import Server
from vllm_flashtrace.models import prepare_smollm2

FAILING = 0.05
"""Share of the traces that fail."""
_REQUEST_SECONDS = 300.0
_QUIET_SECONDS = 120.0
ABORTED, TRACED, STREAMED, DEFERRED = 0.2, 0.7, 0.5, 0.1
LONGEST_STAY_SECONDS = 4.0
_WORDS = ("river", "stone", "seven", "lamp", "north", "apple", "code", "4821", "green", "house")
_PATHS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
    "attributions": "/v1/attributions",
}
_FINAL = ("completed", "failed", "skipped")


@dataclass(slots=True)
class MixedRequest:
    """One request and what came of it.

    Attributes:
        route: Short name of the route.
        body: Its JSON body.
        attributions: Attribution objects that the answer must hold.
        deferred: Whether they are to be fetched later.
        stay_seconds: When the client leaves; None for one that waits.
        status: HTTP status, None if there was no answer.
        found: Attribution objects by id.
        fault: What was wrong with the answer, empty if nothing.
    """

    route: str
    body: dict[str, Any]
    attributions: int
    deferred: bool = False
    stay_seconds: float | None = None
    status: int | None = None
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    fault: str = ""

    @property
    def path(self) -> str:
        """Path of the route."""
        return _PATHS[self.route]

    @property
    def kind(self) -> str:
        """Route and form, for the tally."""
        streamed = " streamed" if self.body.get("stream") else ""
        traced = " traced" if self.attributions else ""
        return f"{self.route}{streamed}{traced}{' deferred' if self.deferred else ''}"

    def take(self, answer: Answer) -> None:
        """Checks an answer, unless the client has left."""
        if answer.left:
            return
        if answer.problem:
            self.fault = answer.problem
            return
        self.status, text = answer.status, answer.text
        if self.status != 200:
            self.fault = f"HTTP {self.status}: {text[:200]}"
            return
        events = list(_events(text)) if self.body.get("stream") else [json.loads(text)]
        for event in events:
            for attribution in _attributions(event):
                self.found[attribution["id"]] = attribution
        statuses = Counter(attribution["status"] for attribution in self.found.values())
        expected = ("queued", "running", *_FINAL) if self.deferred else _FINAL
        if len(self.found) != self.attributions:
            self.fault = f"{len(self.found)} attributions for {self.attributions}"
        elif not statuses.keys() <= set(expected):
            self.fault = f"statuses {dict(statuses)}"
        elif not _is_whole(self.route, events, self.body):
            self.fault = "the answer is not whole"


def make_request(index: int, seed: int) -> MixedRequest:
    """The request of an index."""
    source = random.Random(f"{seed}-{index}")
    route = source.choices(list(_PATHS), weights=[4, 3, 1, 1, 1])[0]
    traced = route == "attributions" or source.random() < TRACED
    deferred = traced and source.random() < DEFERRED
    stay = source.uniform(0, LONGEST_STAY_SECONDS) if source.random() < ABORTED else None
    prompt = " ".join(source.choices(_WORDS, k=source.randint(10, 80)))
    body, choices = _body(route, prompt, source)
    if route != "attributions" and source.random() < STREAMED:
        body["stream"] = True
    if traced:
        body["flashtrace"] = {"hops": source.choice([0, 1, "auto"]), "top_k": 5}
        body["flashtrace"] |= _parts(route, source)
        if deferred:
            body["flashtrace"]["mode"] = "deferred"
    return MixedRequest(route, body, choices if traced else 0, deferred, stay)


def _parts(route: str, source: random.Random) -> dict[str, Any]:
    """Parts of the answer that are explained one by one, or with their sources, or neither."""
    kind = source.random()
    if kind < 0.6:
        return {}
    if kind < 0.8:
        return {"targets": source.choice(["sentences", "lines"])}
    sources = [
        {"id": "a", "message": 0, "span": [0, 12]},
        {"id": "b", "message": 0, "span": [12, 30]},
    ]
    return {"sources": sources, **({} if route == "completions" else {"citations": True})}


def _body(route: str, prompt: str, source: random.Random) -> tuple[dict[str, Any], int]:
    """A body and its number of choices."""
    tokens, choices = source.randint(4, 20), source.randint(1, 3)
    message = [{"role": "user", "content": prompt}]
    body: dict[str, Any] = {"model": MODEL}
    if route == "chat":
        return body | {"messages": message, "max_tokens": tokens, "n": choices}, choices
    if route == "completions":
        return body | {"prompt": prompt, "max_tokens": tokens, "n": choices}, choices
    if route == "responses":
        return body | {"input": prompt, "max_output_tokens": tokens}, 1
    if route == "messages":
        return body | {"messages": message, "max_tokens": tokens}, 1
    answer = {"role": "assistant", "content": " ".join(source.choices(_WORDS, k=tokens))}
    return body | {"messages": [*message, answer]}, 1


def _events(text: str) -> Iterator[Any]:
    """The JSON payloads of a stream."""
    for line in text.splitlines():
        data = line.removeprefix("data:").strip()
        if data != line.strip() and data != "[DONE]":
            yield json.loads(data)


def _attributions(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        if node.get("object") == "flashtrace.attribution":
            yield node
        else:
            for value in node.values():
                yield from _attributions(value)
    elif isinstance(node, list):
        for value in node:
            yield from _attributions(value)


def _is_whole(route: str, events: list[Any], body: dict[str, Any]) -> bool:
    """Whether the completion itself came to its end."""
    if route == "attributions":
        return True
    if route in ("chat", "completions"):
        ended = {
            choice["index"]
            for event in events
            for choice in event.get("choices", ())
            if choice.get("finish_reason")
        }
        return ended == set(range(body["n"]))
    if body.get("stream"):
        last = "response.completed" if route == "responses" else "message_stop"
        # An answer cut short by its length ends as incomplete.
        ends = {last, "response.incomplete"}
        return any(event.get("type") in ends for event in events)
    return bool(events[0].get("output") or events[0].get("content"))


class FailSome:
    """``--worker-extension-cls`` of the server under load."""

    def fail_some(self, share: float) -> None:
        """Lets a share of all trace requests fail when they are scored, chosen by nonce."""
        from vllm_flashtrace.worker import recorder

        stock = recorder.score

        def score(measured: Any, *rest: Any) -> Any:
            if int(measured.trace.spec.nonce[:8], 16) < share * 2**32:
                raise RuntimeError("injected by the load test")
            return stock(measured, *rest)

        score.original = stock  # type: ignore[attr-defined]
        recorder.score = score


async def send_all(
    http: httpx.AsyncClient,
    requests: Sequence[MixedRequest],
    concurrency: int,
    done: Callable[[], Any] = lambda: None,
) -> list[Answer]:
    """Sends the requests, so many at a time, and lets each check its answer."""

    def take(index: int, answer: Answer) -> None:
        requests[index].take(answer)
        done()

    return await send(http, requests, concurrency, on_answer=take)


async def fetch_deferred(http: httpx.AsyncClient, requests: Sequence[MixedRequest]) -> None:
    """Waits for every deferred attribution that a client knows of, then deletes it."""
    deadline = time.monotonic() + _REQUEST_SECONDS
    for request in requests:
        if not request.deferred or request.fault:
            continue
        for name in request.found:
            path = f"/v1/attributions/{name}"
            while (found := (await http.get(path)).json()).get("status") not in _FINAL:
                if found.get("error") or time.monotonic() > deadline:
                    request.fault = f"deferred attribution: {found}"
                    break
                await asyncio.sleep(0.2)
            request.found[name] = found
            if (gone := await http.delete(path)).status_code >= 300 and not request.fault:
                request.fault = f"DELETE answered {gone.status_code}"


async def rest(http: httpx.AsyncClient, server: Server) -> dict[str, float]:
    """Waits for the server to come to rest; returns what it still holds then."""
    deadline = time.monotonic() + _QUIET_SECONDS
    while True:
        # Results that nobody fetched go when they are too old and the next trace comes.
        body = {"model": MODEL, "prompt": "One, two,", "max_tokens": 2, "flashtrace": True}
        (await http.post("/v1/completions", json=body, timeout=60)).raise_for_status()
        status = (await http.get("/v1/attributions/status")).json()
        load = {name: n for name, n in status["load"].items() if isinstance(n, int | float)}
        left = {**await asyncio.to_thread(what_is_left, server), **load}
        left = {name: value for name, value in left.items() if not name.endswith("budget_bytes")}
        if not any(left.values()) or time.monotonic() > deadline:
            return left
        await asyncio.sleep(2)


def tally(requests: Sequence[MixedRequest]) -> list[dict[str, Any]]:
    """How many requests of each kind ended in which way, and a row for all of them."""
    kinds: dict[str, Counter[str]] = {}
    for request in requests:
        row = kinds.setdefault(request.kind, Counter())
        row.update({"requests": 1, "faults": int(bool(request.fault))})
        if request.status is None and not request.fault:
            row["client left"] += 1
            continue
        for attribution in request.found.values():
            # What a fault left here may be no attribution.
            row[attribution.get("status", "no attribution")] += 1
            if (code := (attribution.get("error") or {}).get("code")) is not None:
                row[code] += 1
    total = sum(kinds.values(), Counter())
    names = ["requests", *sorted(total.keys() - {"requests"})]
    rows = [*sorted(kinds.items()), ("all", total)]
    return [{"kind": kind, **{name: row[name] for name in names}} for kind, row in rows]


async def run(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """Sends all requests and waits for the server to come to rest."""
    requests = [make_request(index, options.seed) for index in range(options.requests)]
    began = time.monotonic()
    async with client(server.url, _REQUEST_SECONDS) as http:
        fault = {"method": "fail_some", "args": [FAILING]}
        (await http.post("/collective_rpc", json=fault)).raise_for_status()
        memory = [{"requests": 0, **memory_mb(server.pid)}]
        with Progress() as progress:
            task = progress.add_task("requests", total=len(requests))
            quarter = -(-len(requests) // 4)
            for first in range(0, len(requests), quarter):
                part = requests[first : first + quarter]
                await send_all(http, part, options.concurrency, lambda: progress.advance(task))
                memory.append({"requests": first + len(part), **memory_mb(server.pid)})
        seconds = time.monotonic() - began
        await fetch_deferred(http, requests)
        left = await rest(http, server)
    return {
        "settings": {**vars(options), "json": None, "share_of_traces_that_fail": FAILING},
        "seconds": seconds,
        "tally": tally(requests),
        "faults": [f"{r.kind}: {r.fault}" for r in requests if r.fault],
        "left": left,
        "memory_mb": memory,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    end_servers_on_signals()
    engine = [
        "--enforce-eager",
        f"--max-num-seqs={4 * options.concurrency}",
        "--kv-cache-memory-bytes=1G",
        "--worker-extension-cls=benchmarks.mixed_load.FailSome",
    ]
    # Deferred ones are fetched at the end, however slow the machine is.
    config = {
        "result_ttl_seconds": 5.0,
        "stored_ttl_seconds": 86_400.0,
        "max_stored_attributions": 10_000,
    }
    env = {**DEV_MODE, "PYTHONPATH": str(Path(__file__).parents[1])}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        with plugin_server(prepare_smollm2(), log, engine, config, **env) as server:
            report = asyncio.run(run(server, options))
    emit(report, plain(report["tally"]), options.json)
    print(
        f"{report['seconds']:.0f} s; faults: {report['faults'] or 'none'}; left: {report['left']}"
    )
    print(plain(report["memory_mb"]))
    return int(bool(report["faults"]) or any(report["left"].values()))


if __name__ == "__main__":
    sys.exit(main())
