"""Replicas to measure, each on a core of its own, and the constants of one of them.

Invariant: all processes of a server, its API server included, stay on its core; requests have the
lengths that the model is told, and a traced one has its target and its reasoning where they say.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, Self

import psutil  # type: ignore[import-untyped]

from benchmarks.capacity_constants import MEASURED, Constants
from benchmarks.capacity_fit import nonnegative_fit, prefill_features, recorded_pairs
from benchmarks.capacity_lengths import Lengths
from benchmarks.capacity_model import hops_of
from benchmarks.capacity_simulation import Cluster
from benchmarks.load_client import Request, Timing, random_prompts, run_load
from benchmarks.load_stats import token_gaps
from benchmarks.servers import cpu_seconds, plugin_server
from tests.server.live_server import Server
from vllm_flashtrace.models import prepare_smollm2

CLUSTER = Cluster(max_num_seqs=8, max_num_batched_tokens=2048)
MAX_CONTEXT = 1024
STAGGER_SECONDS = 0.5
_BLOCK = 128
_PREFILLS = (32, 128, 256, 512, 768, 1000)
_DECODING = (1, 2, 4)
_DECODED = 24
_TRACES = ((64, 24, 12), (128, 64, 20), (256, 32, 20), (384, 96, 32), (700, 24, 12))
_LIMIT_SECONDS = 240.0


@contextmanager
def replica_server(log: Path, core: int) -> Iterator[Server]:
    """A server whose processes all stay on one core, which they inherit from this thread."""
    before = os.sched_getaffinity(0)  # Of this thread alone; the others start servers meanwhile.
    options = [f"--max-num-seqs={CLUSTER.max_num_seqs}", f"--max-model-len={MAX_CONTEXT}"]
    options.append(f"--max-num-batched-tokens={CLUSTER.max_num_batched_tokens}")
    with ExitStack() as stack:
        os.sched_setaffinity(0, {core})
        try:
            server = stack.enter_context(
                plugin_server(prepare_smollm2(), log, options, VLLM_CPU_OMP_THREADS_BIND=str(core))
            )
        finally:
            os.sched_setaffinity(0, before)
        yield server


@dataclass(slots=True)
class Others:
    """CPU that everything but the servers takes meanwhile, in cores: the client and strangers."""

    servers: Sequence[Server]
    cores: float = 0.0
    _began: float = 0.0
    _taken: float = 0.0

    def __enter__(self) -> Self:
        self._began, self._taken = time.monotonic(), self._not_ours()
        return self

    def __exit__(self, *_: object) -> None:
        self.cores = (self._not_ours() - self._taken) / (time.monotonic() - self._began)

    def _not_ours(self) -> float:
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        return sum(times) - idle - sum(map(cpu_seconds, self.servers))


def measure_constants(server: Server, seed: int) -> tuple[Constants, dict[str, Any]]:
    """Measures one replica: prefills, decoding at several sequences, and lone attributions."""
    prefilled = [
        (length, median(_first_token(server, length, (seed, length, i)) for i in range(3)))
        for length in _PREFILLS
    ]
    pooled: dict[int, list[float]] = {count: [] for count in _DECODING}
    for number in range(3):
        for count in _DECODING:
            alike = [Lengths(96, 0, _DECODED)] * count
            timings = send(server, alike, [False] * count, (seed, "decode", number), count)
            pooled[count] += token_gaps(timings)
    gaps = [median(pooled[count]) for count in _DECODING]
    decode = nonnegative_fit([[1, count] for count in _DECODING], gaps)
    # One fit of both, since an attribution is a prefill and more.
    features = [[*prefill_features([(0, length)]), 0.0, 0, 0] for length, _ in prefilled]
    seconds = [value for _, value in prefilled]
    for place, (prompt, reasoning, output) in enumerate(_TRACES):
        lengths = Lengths(prompt, reasoning, output)
        hops = hops_of(lengths, _BLOCK, 1)
        timings = send(server, [lengths] * 2, [True] * 2, (seed, "trace", place), 1)
        pieces = prefill_features([(hop.cached, hop.end) for hop in hops])
        features.append([*pieces, recorded_pairs(hops), len(hops), sum(h.end for h in hops)])
        seconds.append(fmean(lags(timings)))
    fit = nonnegative_fit(features, seconds)
    step, token, pair, recording_pair, hop_seconds, hop_context = fit.coefficients
    constants = Constants(
        name="SmolLM2-135M, one CPU core, eager",
        basis=MEASURED,
        source="benchmarks.capacity --check: one replica with its API server on one core",
        gpus=0,
        block_size=_BLOCK,
        kv_tokens=None,
        step_seconds=step,
        decode_step_seconds=decode.coefficients[0],
        token_seconds=token,
        pair_seconds=pair,
        decode_token_seconds=decode.coefficients[1],
        context_seconds=0.0,  # In the decoding seconds, which hold contexts like the cluster's.
        recording_pair_seconds=recording_pair,
        hop_seconds=hop_seconds,
        hop_context_seconds=hop_context,
    )
    measured = {
        "prefill_seconds": {str(length): value for length, value in prefilled},
        "decode_step_seconds": dict(zip(map(str, _DECODING), gaps, strict=True)),
        "trace_seconds": dict(zip(map(str, _TRACES), seconds[len(prefilled) :], strict=True)),
        "worst_error_of_fit": {"prefills and traces": fit.worst, "decode": decode.worst},
    }
    return constants, measured


def send(
    server: Server,
    lengths: Sequence[Lengths],
    traced: Sequence[bool],
    seed: object,
    clients: int,
) -> list[Timing]:
    """A closed loop of requests of given lengths, some of them traced."""
    requests = [
        Request(
            random_prompts((seed, number), 1, one.prompt)[0],
            one.generated,
            _field(one) if asked else None,
        )
        for number, (one, asked) in enumerate(zip(lengths, traced, strict=True))
    ]
    stagger = STAGGER_SECONDS if len(requests) > clients else 0.0
    answers = run_load(
        server.url, requests, concurrency=clients, stagger=stagger, limit_seconds=_LIMIT_SECONDS
    )
    return [timing for timing in answers if timing is not None]


def _field(lengths: Lengths) -> dict[str, Any]:
    first, end = lengths.reasoning, lengths.generated
    return {
        "target": {"tokens": [[first, end]]},
        "reasoning": {"tokens": [[0, first]]},
        "hops": CLUSTER.hops,
    }


def _first_token(server: Server, length: int, seed: object) -> float:
    [timing] = send(server, [Lengths(length, 0, 1)], [False], (seed, "prefill"), 1)
    return timing.tokens[0] - timing.sent


def lags(timings: Sequence[Timing]) -> list[float]:
    """From the last token to the attribution, of traced requests."""
    return [t.attributed - t.tokens[-1] for t in timings if t.attributed is not None]
