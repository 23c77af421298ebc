"""Sends streamed completions to a server and records when each event arrived.

Invariant: nothing is decoded while requests are in flight, so that the client takes as little of
the machine as it can, and a request that did not do exactly what it was sent for raises.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

MODEL = "m"
_DATA = "data: "
_FINISHED = '"finish_reason":"'
# Special tokens of the bundled model come first in its vocabulary.
_FIRST_PLAIN_TOKEN = 100
_LAST_PLAIN_TOKEN = 49_000

Event = tuple[float, str]
# Runs until the event is set, and then finishes what it has begun.
Companion = Callable[[asyncio.Event, httpx.AsyncClient], Coroutine[Any, Any, None]]


class RequestFailedError(RuntimeError):
    """A request was refused, ended early, or lacks the attribution it asked for."""


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to ask for.

    Attributes:
        prompt: Token ids.
        output_length: Tokens to generate; end-of-sequence is ignored.
        flashtrace: The field to send, None for a request without it.
        leave_after_events: The client leaves when this many events have come.
        leave_after_finish: The client leaves this many seconds after the last token.
    """

    prompt: Sequence[int]
    output_length: int
    flashtrace: dict[str, Any] | None = None
    leave_after_events: int | None = None
    leave_after_finish: float | None = None

    @property
    def leaves(self) -> bool:
        """Whether the client is to leave before the end."""
        return self.leave_after_events is not None or self.leave_after_finish is not None

    def body(self) -> dict[str, Any]:
        """The JSON body of ``/v1/completions``."""
        field = {} if self.flashtrace is None else {"flashtrace": self.flashtrace}
        return {
            "model": MODEL,
            "prompt": list(self.prompt),
            "max_tokens": self.output_length,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **field,
        }


@dataclass(frozen=True, slots=True)
class Timing:
    """When the parts of one answer arrived, in seconds on one clock.

    Attributes:
        traced: Whether an attribution was asked for.
        sent: The request left.
        tokens: Each event with generated text arrived.
        ended: The stream was over.
        attributed: The attribution arrived.
        attribution: The attribution itself.
        output_tokens: Tokens generated, as the server counts them.
    """

    traced: bool
    sent: float
    tokens: tuple[float, ...]
    ended: float
    attributed: float | None
    attribution: dict[str, Any] | None
    output_tokens: int


def random_prompts(seed: object, count: int, length: int) -> list[list[int]]:
    """Prompts of random plain tokens; equal seeds give equal prompts, others share no prefix."""
    source = random.Random(str(seed))
    return [
        [source.randrange(_FIRST_PLAIN_TOKEN, _LAST_PLAIN_TOKEN) for _ in range(length)]
        for _ in range(count)
    ]


def is_traced(index: int, share: float) -> bool:
    """Whether request ``index`` of a sequence belongs to the evenly spread traced ``share``."""
    return int((index + 1) * share + 0.5) > int(index * share + 0.5)


def arrival_times(seed: object, rate: float, count: int) -> list[float]:
    """Seconds from the start at which requests of a Poisson process arrive."""
    source = random.Random(str(seed))
    return list(itertools.accumulate(source.expovariate(rate) for _ in range(count)))


def run_load(
    url: str,
    requests: Sequence[Request],
    *,
    concurrency: int | None = None,
    stagger: float = 0.0,
    arrivals: Sequence[float] | None = None,
    beside: Sequence[Companion] = (),
    limit_seconds: float,
    on_done: Callable[[], None] = lambda: None,
) -> list[Timing | None]:
    """Sends all requests and waits for their answers.

    Args:
        url: Base address of the server.
        requests: What to ask for, in order.
        concurrency: Closed loop: so many requests are in flight until none are left.
        stagger: Seconds between the first requests of a closed loop; without it requests of equal
            length stay in step with each other, and none meets the prefill of another.
        arrivals: Open loop: when each request is sent, in seconds from now.
        beside: What else to run on the same client until all answers are there.
        limit_seconds: Longest time for all of them together.
        on_done: Called after each request.

    Returns:
        One entry per request, None where the client left early on purpose.

    Raises:
        RequestFailedError: Of the first request that failed; the others are given up.
        TimeoutError: The limit was reached.
    """
    if (concurrency is None) == (arrivals is None):
        raise ValueError("give either concurrency or arrivals")
    # Each of these sends the requests it takes from ``waiting``, from its moment on.
    waiting = iter(range(len(requests)))
    if arrivals is not None:
        senders = [(moment, iter([next(waiting)])) for moment in arrivals]
    else:
        assert concurrency is not None
        senders = [(stagger * i, waiting) for i in range(concurrency)]
    return asyncio.run(_run(url, requests, senders, beside, limit_seconds, on_done))


async def _run(
    url: str,
    requests: Sequence[Request],
    senders: Sequence[tuple[float, Iterator[int]]],
    beside: Sequence[Companion],
    limit_seconds: float,
    on_done: Callable[[], None],
) -> list[Timing | None]:
    answers: dict[int, tuple[float, list[Event]]] = {}

    async def send(client: httpx.AsyncClient, moment: float, waiting: Iterator[int]) -> None:
        await asyncio.sleep(moment)
        for index in waiting:
            answers[index] = await _ask(client, requests[index])
            on_done()

    async def send_all(client: httpx.AsyncClient) -> None:
        try:
            await _all_or_first_error([send(client, *sender) for sender in senders])
        finally:
            over.set()

    over = asyncio.Event()
    limits = httpx.Limits(max_connections=None)
    async with (
        asyncio.timeout(limit_seconds),
        httpx.AsyncClient(base_url=url, timeout=limit_seconds, limits=limits) as client,
    ):
        companions = [companion(over, client) for companion in beside]
        await _all_or_first_error([send_all(client), *companions])
    return [
        None if request.leaves else read_answer(request, *answers[index])
        for index, request in enumerate(requests)
    ]


async def _all_or_first_error(jobs: Sequence[Any]) -> None:
    tasks = [asyncio.create_task(job) for job in jobs]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _ask(client: httpx.AsyncClient, request: Request) -> tuple[float, list[Event]]:
    """Sends one request; when it left, and every event with its arrival."""
    events: list[Event] = []
    sent = time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=request.body()) as response:
        if response.status_code != 200:
            await response.aread()
            raise RequestFailedError(f"HTTP {response.status_code}: {response.text[:500]}")
        async for line in response.aiter_lines():
            if not line:
                continue
            events.append((time.perf_counter(), line))
            if request.leave_after_events is not None and (
                len(events) >= request.leave_after_events
            ):
                break
            if request.leave_after_finish is not None and _FINISHED in line:
                await asyncio.sleep(request.leave_after_finish)
                break
    return sent, events


def read_answer(request: Request, sent: float, events: Sequence[Event]) -> Timing:
    """Decodes the events of one whole answer.

    Raises:
        RequestFailedError: The stream ended in an error or early, has another number of tokens
            than asked for, or its attribution is absent or not completed.
    """
    tokens: list[float] = []
    attribution, attributed, output_tokens, finish = None, None, None, None
    if not events or events[-1][1] != f"{_DATA}[DONE]":
        raise RequestFailedError(f"the stream ended early: {events[-1:]}")
    for moment, line in events[:-1]:
        chunk = json.loads(line.removeprefix(_DATA))
        if "choices" not in chunk:
            raise RequestFailedError(f"the stream holds an error: {line[:500]}")
        if not chunk["choices"]:
            output_tokens = chunk["usage"]["completion_tokens"]
            continue
        [choice] = chunk["choices"]
        if "flashtrace" in choice:
            attribution, attributed = choice["flashtrace"], moment
            continue
        tokens.append(moment)
        finish = choice.get("finish_reason") or finish
    if output_tokens != request.output_length or finish != "length" or not tokens:
        raise RequestFailedError(
            f"{output_tokens} tokens instead of {request.output_length}, finish reason {finish!r}"
        )
    _check_attribution(request, attribution)
    return Timing(
        traced=request.flashtrace is not None,
        sent=sent,
        tokens=tuple(tokens),
        ended=events[-1][0],
        attributed=attributed,
        attribution=attribution,
        output_tokens=output_tokens,
    )


def _check_attribution(request: Request, attribution: dict[str, Any] | None) -> None:
    if request.flashtrace is None:
        if attribution is not None:
            raise RequestFailedError("an attribution that nobody asked for")
    elif attribution is None or attribution["status"] != "completed":
        raise RequestFailedError(f"no completed attribution: {str(attribution)[:500]}")
