"""Sends mixed requests to a deployment and remembers which replica had each, and when."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import httpx

from benchmarks.deploy_cluster import REPLICA_HEADER
from benchmarks.mixed_requests import MixedRequest

_TIMEOUT = httpx.Timeout(300.0)
_POLL_SECONDS = 0.25
_PENDING = ("queued", "running")


@dataclass(slots=True)
class Sent:
    """One request and its fate.

    Attributes:
        request: What was asked, and its attributions.
        began: When it was sent (monotonic).
        ended: When its answer was over.
        replica: Which replica had it; None if none took it.
        code: Of the error; None for an answer that is whole.
    """

    request: MixedRequest
    began: float
    ended: float = 0.0
    replica: str | None = None
    code: str | None = None


def client(url: str) -> httpx.AsyncClient:
    """A client for :func:`send_all` and the others."""
    return httpx.AsyncClient(base_url=url, timeout=_TIMEOUT, trust_env=False)


async def send_all(
    http: httpx.AsyncClient,
    requests: Sequence[MixedRequest],
    concurrency: int,
    at: int,
    event: Callable[[], Awaitable[None]],
) -> list[Sent]:
    """Sends all requests, so many at once, with an event when ``at`` answers are there.

    Args:
        http: From :func:`client`.
        requests: What to ask for.
        concurrency: Requests in flight.
        at: How many answers come before the event.
        event: What happens then, while the others go on.
    """
    waiting, sent, answered = iter(requests), [], 0
    due = asyncio.Event()

    async def sender() -> None:
        nonlocal answered
        for request in waiting:
            sent.append(one := Sent(request, time.monotonic()))
            await _send(http, one)
            answered += 1
            if answered >= at:
                due.set()

    async def happen() -> None:
        await due.wait()
        await event()

    await asyncio.gather(happen(), *(sender() for _ in range(concurrency)))
    return sent


async def _send(http: httpx.AsyncClient, one: Sent) -> None:
    request = one.request
    try:
        async with http.stream("POST", request.path, json=request.body) as response:
            one.replica = response.headers.get(REPLICA_HEADER)
            text = (await response.aread()).decode()
            request.take(response.status_code, text)
            if request.fault:
                one.code = _code(text) or request.fault
    except httpx.HTTPError as error:
        one.code = type(error).__name__
    one.ended = time.monotonic()


async def results(
    http: httpx.AsyncClient, ids: Sequence[str], seconds: float
) -> dict[str, str | None]:
    """Waits for deferred attributions: the status of each, or its error's code; None: unknown."""
    deadline = time.monotonic() + seconds
    found = await statuses(http, ids)
    while time.monotonic() < deadline and not set(found.values()).isdisjoint(_PENDING):
        await asyncio.sleep(_POLL_SECONDS)
        found = await statuses(http, ids)
    return found


async def statuses(http: httpx.AsyncClient, ids: Sequence[str]) -> dict[str, str | None]:
    """What :func:`results` tells, as it is now."""
    found: dict[str, str | None] = {}
    for one in ids:
        response = await http.get(f"/v1/attributions/{one}")
        body = response.json() if response.status_code == 200 else {}
        found[one] = (body.get("error") or {}).get("code") or body.get("status")
    return found


def tally(values: Sequence[str | None]) -> dict[str, int]:
    """Counts, the most frequent first."""
    return {str(value): number for value, number in Counter(values).most_common()}


def _code(text: str) -> str | None:
    """The code of the error that an answer is, or ends with."""
    for line in reversed([text, *text.splitlines()]):
        try:
            payload = json.loads(line.removeprefix("data:"))
        except ValueError:
            continue
        error = payload.get("error") or payload if isinstance(payload, dict) else None
        if isinstance(error, dict) and error.get("code"):
            return str(error["code"])
    return None
