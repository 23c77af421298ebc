"""Measures several variants of a server alternately, under the same load.

Invariant: only one server is loaded at a time, every round measures every variant once, and every
second round goes through them backwards, so that a slow drift of the machine cancels out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.existing_text import ExistingTexts
from benchmarks.load_client import (
    Request,
    Timing,
    arrival_times,
    is_traced,
    random_prompts,
    run_load,
)
from benchmarks.load_stats import Block
from benchmarks.servers import cpu_seconds
from tests.server.live_server import Server

_ANSWER_TOKENS = 40
_WARM_UP_TOKENS = 24
EXISTING_PROMPT_TOKENS = 512
EXISTING_COMPLETION_TOKENS = 512
EXISTING_PAUSE_SECONDS = 5.0
_SETTLE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Variant:
    """What is measured under one name.

    Attributes:
        name: As reports show it.
        server: Key of the server it runs on.
        traced_share: Share of its requests that ask for an attribution.
        beside: Attributions of existing texts that are kept in flight beside its requests.
    """

    name: str
    server: str
    traced_share: float = 0.0
    beside: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    """What a client sends.

    Attributes:
        prompt_length: Tokens of each prompt.
        output_length: Tokens of each completion.
        target: ``two-hop`` or ``output``; see :func:`trace_field`.
        concurrency: Requests in flight in a closed loop, and in the warm-up.
        stagger: Seconds between the first requests of a closed loop.
        rate: Requests per second of an open loop; None for a closed one.
        seed: Of prompts and arrivals.
        limit_seconds: Longest time of one block.
    """

    prompt_length: int
    output_length: int
    target: str
    concurrency: int
    stagger: float
    rate: float | None
    seed: int
    limit_seconds: float

    def warm_up(self, server: Server, traced: bool) -> None:
        """Sends one wave of short completions."""
        field = trace_field(self.target, _WARM_UP_TOKENS) if traced else None
        seed = (self.seed, "warm-up", traced)
        prompts = random_prompts(seed, self.concurrency, self.prompt_length)
        requests = [Request(prompt, _WARM_UP_TOKENS, field) for prompt in prompts]
        run_load(
            server.url,
            requests,
            concurrency=self.concurrency,
            limit_seconds=self.limit_seconds,
        )

    def measure(
        self,
        server: Server,
        requests: Sequence[Request],
        texts: Sequence[ExistingTexts],
        number: int,
        on_done: Callable[[], None],
    ) -> Block:
        """Runs one block; arrivals of an open loop depend on the number of its round alone.

        Raises:
            RequestFailedError: A request failed or was not attributed as asked.
        """
        answers = run_load(
            server.url,
            requests,
            concurrency=self.concurrency if self.rate is None else None,
            stagger=self.stagger,
            arrivals=self._arrivals(number, len(requests)),
            beside=[text.attribute_until for text in texts],
            limit_seconds=self.limit_seconds,
            on_done=on_done,
        )
        timings = [timing for timing in answers if timing is not None]
        for timing in timings:
            self._check_hops(timing)
        return Block.of(timings, [seconds for text in texts for seconds in text.seconds])

    def _arrivals(self, number: int, count: int) -> list[float] | None:
        if self.rate is None:
            return None
        return arrival_times((self.seed, number), self.rate, count)

    def _check_hops(self, timing: Timing) -> None:
        if timing.attribution is not None and self.target == "two-hop":
            hops = len(timing.attribution["hops"])
            if hops != 2:
                raise RuntimeError(f"a trace took {hops} hops instead of two")


@dataclass(slots=True)
class Measured:
    """Everything that the rounds gave.

    Attributes:
        blocks: Per variant name, one block per round.
        idle_share: Most CPU that the servers not under load took in a block, in cores.
        client_share: Most CPU that the client took in a block, in cores.
    """

    blocks: dict[str, list[Block]]
    idle_share: float = 0.0
    client_share: float = 0.0

    @contextmanager
    def watch(self, idle: Sequence[Server]) -> Iterator[None]:
        """Notes what the servers not under load, and this process, take meanwhile."""
        idle_before = sum(map(cpu_seconds, idle))
        client_before, began = time.process_time(), time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        idle_taken = sum(map(cpu_seconds, idle)) - idle_before
        client_taken = time.process_time() - client_before
        self.idle_share = max(self.idle_share, idle_taken / seconds)
        self.client_share = max(self.client_share, client_taken / seconds)


def trace_field(target: str, output_length: int) -> dict[str, Any]:
    """The ``flashtrace`` field of a traced request.

    Args:
        target: ``output`` explains all generated tokens, in one hop since such text has no
            reasoning; ``two-hop`` explains the last tokens, with all before them as reasoning.
        output_length: Generated tokens of a completion.
    """
    if target == "output":
        return {"target": "output", "hops": 1}
    start = output_length - min(_ANSWER_TOKENS, output_length // 2)
    return {
        "target": {"tokens": [[start, output_length]]},
        "reasoning": {"tokens": [[0, start]]},
        "hops": 1,
    }


def measure_rounds(
    servers: Mapping[str, Server],
    variants: Sequence[Variant],
    load: Load,
    *,
    rounds: int,
    requests_per_round: int,
    on_block: Callable[[Variant, int], None],
    on_done: Callable[[], None],
) -> Measured:
    """Measures every variant once per round.

    Args:
        servers: Running servers by key.
        variants: What to measure.
        load: What to send.
        rounds: Number of rounds.
        requests_per_round: Requests of each variant in a round.
        on_block: Called before each block, with the number of its round.
        on_done: Called after each request.
    """
    measured = Measured({variant.name: [] for variant in variants})
    for number in range(rounds):
        for variant in variants if number % 2 == 0 else reversed(variants):
            on_block(variant, number)
            requests = _requests(variant, load, number, requests_per_round)
            texts = _texts(variant, load, number)
            time.sleep(_SETTLE_SECONDS)
            idle = [server for key, server in servers.items() if key != variant.server]
            with measured.watch(idle):
                block = load.measure(servers[variant.server], requests, texts, number, on_done)
            measured.blocks[variant.name].append(block)
    return measured


def _requests(variant: Variant, load: Load, number: int, count: int) -> list[Request]:
    """The requests of one block; no two blocks have a prompt in common."""
    prompts = random_prompts((load.seed, number, variant.name), count, load.prompt_length)
    field = trace_field(load.target, load.output_length)
    requests = []
    for index, prompt in enumerate(prompts, start=number * count):
        traced = is_traced(index, variant.traced_share)
        requests.append(Request(prompt, load.output_length, field if traced else None))
    return requests


def _texts(variant: Variant, load: Load, number: int) -> list[ExistingTexts]:
    return [
        ExistingTexts(
            EXISTING_PROMPT_TOKENS,
            EXISTING_COMPLETION_TOKENS,
            trace_field(load.target, EXISTING_COMPLETION_TOKENS),
            (load.seed, number, variant.name, place),
            EXISTING_PAUSE_SECONDS,
        )
        for place in range(variant.beside)
    ]
