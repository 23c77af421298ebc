"""A discrete-event simulation of replicas that serve completions and trace some of them.

Every engine step is simulated with what stands in it: one token of each decoding sequence, then
chunks of traces up to their share of the token budget, then chunks of new prompts. Steps that only
decode are taken together until something else can happen, which changes nothing but the speed.

Invariant: the engine takes in new requests between steps only, a replica never rests while it has
work it may do, and every request that arrives is finished when the simulation ends.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf, nan

from benchmarks.capacity_constants import Constants
from benchmarks.capacity_lengths import Lengths
from benchmarks.capacity_replica import Cluster, Job, Replica

__all__ = ["Cluster", "Outcome", "simulate"]


@dataclass(slots=True)
class Outcome:
    """What happened.

    Attributes:
        jobs: All requests, in the order of arrival.
        seconds: From the first arrival to the last result.
        utilisation: Share of the replicas' time that was in steps, while requests arrived.
        sequences: Mean number in a replica's engine, traces included, while requests arrived.
    """

    jobs: list[Job]
    seconds: float
    utilisation: float
    sequences: float

    @property
    def requests_per_second(self) -> float:
        """Requests, with their traces, per second."""
        return len(self.jobs) / self.seconds

    def completion_latencies(self) -> list[float]:
        """From arrival to the last token."""
        return [job.finished - job.arrived for job in self.jobs]

    def trace_lags(self) -> list[float]:
        """From the last token to the attribution, of traced requests."""
        return [job.attributed - job.finished for job in self.jobs if job.traced]


@dataclass(slots=True)
class _Run:
    constants: Constants
    cluster: Cluster
    waiting: list[Job]
    closed: bool
    window: float
    events: list[tuple[float, int, Job | None, Replica | None]] = field(default_factory=list)
    numbers: itertools.count[int] = field(default_factory=itertools.count)
    jobs: list[Job] = field(default_factory=list)
    busy: float = 0.0
    sequence_seconds: float = 0.0

    def push(self, moment: float, job: Job | None, replica: Replica | None) -> None:
        heapq.heappush(self.events, (moment, next(self.numbers), job, replica))

    def count(self, replica: Replica, now: float, seconds: float) -> None:
        """Books a step for the means."""
        inside = max(0.0, min(seconds, self.window - now))
        self.busy += inside
        self.sequence_seconds += inside * replica.sequences

    def send_next(self, moment: float) -> None:
        """The client of a closed loop sends another request."""
        if self.closed and self.waiting:
            self.push(moment, self.waiting.pop(), None)


def simulate(
    constants: Constants,
    cluster: Cluster,
    requests: Sequence[tuple[Lengths, bool]],
    *,
    arrivals: Sequence[float] | None = None,
    concurrency: int | None = None,
    stagger: float = 0.0,
) -> Outcome:
    """Runs all requests to their ends.

    Args:
        constants: Of each replica.
        cluster: Replicas and limits.
        requests: Lengths, and whether an attribution is asked for.
        arrivals: Open loop: seconds at which each request arrives, ascending.
        concurrency: Closed loop: so many clients, each sending the next request when the last one
            is over, an inline attribution included.
        stagger: Seconds between the first requests of a closed loop.

    Raises:
        ValueError: Neither or both kinds of loop, no request, or one that cannot fit.
    """
    if (arrivals is None) == (concurrency is None) or not requests:
        raise ValueError("give requests, and either arrivals or concurrency")
    room = inf if constants.kv_tokens is None else constants.kv_tokens
    if max(lengths.context for lengths, _ in requests) > room:
        raise ValueError(f"a request does not fit the KV cache of {constants.kv_tokens} tokens")
    jobs = [Job(lengths, traced) for lengths, traced in requests]
    # Means leave out the time in which the last requests drain.
    window = arrivals[-1] if arrivals is not None and arrivals[-1] > arrivals[0] else inf
    run = _Run(constants, cluster, jobs[::-1], arrivals is None, window)
    if arrivals is not None:
        for moment, job in zip(arrivals, jobs, strict=True):
            run.push(moment, job, None)
    else:
        for client in range(concurrency or 0):
            run.send_next(client * stagger)
    replicas = [Replica(constants, cluster) for _ in range(cluster.replicas)]
    first, last = run.events[0][0], nan
    while run.events:
        now, _, arrived, stepped = heapq.heappop(run.events)
        if arrived is not None:
            arrived.arrived = now
            run.jobs.append(arrived)
            replica = min(replicas, key=lambda each: each.in_flight)
            replica.accept(arrived)
        else:
            assert stepped is not None
            replica = stepped
            for _ in range(replica.end_step(now)):
                run.send_next(now)
            last = now
        if not replica.stepping and replica.has_work:
            horizon = run.events[0][0] if run.events else inf
            seconds = replica.begin_step(now, horizon)
            run.push(now + seconds, None, replica)
            run.count(replica, now, seconds)
    whole = cluster.replicas * (min(run.window, last) - first)
    return Outcome(run.jobs, last - first, run.busy / whole, run.sequence_seconds / whole)
