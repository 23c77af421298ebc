"""Does the model predict a cluster? Measures one replica, predicts two, and measures them.

Two servers with SmolLM2-135M run on one core each. With the second one idle, the constants of
`capacity_constants` are measured on the first. Then both serve the same closed loop of requests of
different lengths, with several shares of them traced, and throughput and latencies are compared
with a simulation of the same requests. What two busy replicas lose to each other, through memory
and caches that they share, is no part of a single replica's constants; the comparison is
therefore given twice, as predicted, and scaled by what the untraced run lost.

Invariant: nothing measured on the two busy replicas enters the first prediction. A block during
which other processes took more than a fifth of a core is measured again, once, and the quieter of
the two counts, whatever it shows; constants are not taken on a machine so busy at all.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx

from benchmarks.capacity_cluster import (
    CLUSTER,
    MAX_CONTEXT,
    STAGGER_SECONDS,
    Others,
    lags,
    measure_constants,
    replica_server,
    send,
)
from benchmarks.capacity_constants import Constants
from benchmarks.capacity_lengths import Lengths, LogNormal, Traffic
from benchmarks.capacity_shapes import SHAPES
from benchmarks.capacity_simulation import Outcome, simulate
from benchmarks.load_client import Timing, is_traced
from benchmarks.load_stats import percentile
from benchmarks.servers import end_servers_on_signals
from tests.server.live_server import Server
from vllm_flashtrace.trace.budget import AccumulatorBudget

SHARES = (0.0, 0.25, 1.0)
TRAFFIC = Traffic(LogNormal(160, 0.5), LogNormal(32, 0.5), LogNormal(20, 0.4))
REPLICAS, CLIENTS, ROUNDS = 2, 4, 2
_QUIET_CORES = 0.2


def check(requests: int, seed: int = 0) -> dict[str, Any]:
    """Measures and predicts.

    Args:
        requests: Of the whole cluster in each round of each share.
        seed: Of lengths and prompts.

    Returns:
        Constants, settings and one row per share.

    Raises:
        RuntimeError: There are fewer than two cores.
        RequestFailedError: A request failed or was not attributed as asked.
    """
    end_servers_on_signals()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < REPLICAS:
        raise RuntimeError(f"{REPLICAS} replicas need {REPLICAS} cores")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        with ThreadPoolExecutor(REPLICAS) as pool:
            starting = [
                pool.submit(stack.enter_context, replica_server(Path(folder) / f"{core}.log", core))
                for core in cores[:REPLICAS]
            ]
        servers = [server.result() for server in starting]
        _warm_up(servers)
        began = time.monotonic()
        with Others(servers) as others:
            constants, measured = measure_constants(servers[0], seed)
        measuring = time.monotonic() - began
        if others.cores > _QUIET_CORES:
            raise RuntimeError(f"other processes took {others.cores:.2f} cores; nothing measured")
        accumulators = _accumulators(servers[0])
        lengths = TRAFFIC.draw(requests, (seed, "check"), MAX_CONTEXT - 1)
        blocks: dict[float, list[_Block]] = {share: [] for share in SHARES}
        for number in range(ROUNDS):
            for share in SHARES if number % 2 == 0 else reversed(SHARES):
                blocks[share].append(_measured(servers, lengths, share, (seed, number)))
    rows = [_row(constants, lengths, share, blocks[share]) for share in SHARES]
    lost = rows[0]["requests_per_second"] / rows[0]["predicted_requests_per_second"]
    for row in rows:
        scaled = row["predicted_requests_per_second"] * lost
        row["scaled_prediction"] = scaled
        row["scaled_error"] = scaled / row["requests_per_second"] - 1
    return {
        "settings": {
            "model": "SmolLM2-135M-Instruct, float32, eager",
            "replicas": REPLICAS,
            "cores_per_replica": 1,
            "clients_per_replica": CLIENTS,
            "requests": requests,
            "rounds": ROUNDS,
            "hops": CLUSTER.hops,
            "mean_tokens": {
                name: fmean(getattr(one, name) for one in lengths)
                for name in ("prompt", "reasoning", "output")
            },
            "seconds_measuring_constants": measuring,
            "other_cores_meanwhile": others.cores,
        },
        "constants": constants.to_dict(),
        "measured_on_one": measured,
        "accumulators": accumulators,
        "rows": rows,
    }


def _warm_up(servers: Sequence[Server]) -> None:
    lengths = [Lengths(160, 20, 12)] * CLIENTS
    for server in servers:
        send(server, lengths, [True] * CLIENTS, "warm-up", CLIENTS)


@dataclass(frozen=True, slots=True)
class _Block:
    """Answers of all replicas to one round of requests."""

    timings: list[Timing]
    other_cores: float

    @property
    def seconds(self) -> float:
        return max(t.ended for t in self.timings) - min(t.sent for t in self.timings)


def _parts(lengths: Sequence[Lengths], share: float) -> list[tuple[list[Lengths], list[bool]]]:
    """Every second request for each replica, and which of them are traced."""
    parts = [list(lengths[place::REPLICAS]) for place in range(REPLICAS)]
    return [(part, [is_traced(n, share) for n in range(len(part))]) for part in parts]


def _measured(
    servers: Sequence[Server], lengths: Sequence[Lengths], share: float, seed: object
) -> _Block:
    """The block, or the quieter of two if the first was disturbed."""
    block = _measure(servers, lengths, share, (seed, 0))
    if block.other_cores <= _QUIET_CORES:
        return block
    again = _measure(servers, lengths, share, (seed, 1))
    return min(block, again, key=lambda each: each.other_cores)


def _measure(
    servers: Sequence[Server], lengths: Sequence[Lengths], share: float, seed: object
) -> _Block:
    """One round of one share, on all replicas at once."""
    parts = _parts(lengths, share)
    with Others(servers) as others, ThreadPoolExecutor(REPLICAS) as pool:
        jobs = [
            pool.submit(send, server, *part, (seed, "cluster", share, place), CLIENTS)
            for place, (server, part) in enumerate(zip(servers, parts, strict=True))
        ]
        timings = [timing for job in jobs for timing in job.result()]
    return _Block(timings, others.cores)


def _row(
    constants: Constants, lengths: Sequence[Lengths], share: float, blocks: Sequence[_Block]
) -> dict[str, Any]:
    """What was measured at one share beside the simulation of it."""
    outcomes = [
        simulate(
            constants,
            CLUSTER,
            list(zip(*part, strict=True)),
            concurrency=CLIENTS,
            stagger=STAGGER_SECONDS,
        )
        for part in _parts(lengths, share)
    ]
    timings = [timing for block in blocks for timing in block.timings]
    rate = len(timings) / sum(block.seconds for block in blocks)
    predicted = len(lengths) / max(outcome.seconds for outcome in outcomes)
    return {
        "share": share,
        "requests_per_second": rate,
        "rounds": [len(block.timings) / block.seconds for block in blocks],
        "predicted_requests_per_second": predicted,
        "error": predicted / rate - 1,
        "completion_seconds": _middle([t.tokens[-1] - t.sent for t in timings]),
        "predicted_completion_seconds": _middle(_pooled(outcomes, "completion_latencies")),
        "lag_seconds": _middle(lags(timings)),
        "predicted_lag_seconds": _middle(_pooled(outcomes, "trace_lags")),
        "other_cores": fmean(block.other_cores for block in blocks),
    }


def _pooled(outcomes: Sequence[Outcome], name: str) -> list[float]:
    return [value for outcome in outcomes for value in getattr(outcome, name)()]


def _middle(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    return {"p50": percentile(seconds, 50), "p95": percentile(seconds, 95)}


def _accumulators(server: Server) -> dict[str, int]:
    """What the worker says an accumulator takes, beside what the shape says."""
    status = httpx.get(f"{server.url}/v1/attributions/status", timeout=30).json()
    told = _find(status, "accumulator_bytes_per_token")
    computed: AccumulatorBudget = SHAPES["SmolLM2-135M"].accumulators()
    return {"worker_bytes_per_token": told, "computed_bytes_per_token": computed.bytes_per_token}


def _find(value: Any, key: str) -> int:
    """A number anywhere in a status."""
    if isinstance(value, dict):
        if key in value:
            return int(value[key])
        for inner in value.values():
            if found := _find(inner, key):
                return found
    if isinstance(value, list):
        return next((found for inner in value if (found := _find(inner, key))), 0)
    return 0
