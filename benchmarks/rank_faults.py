"""One tensor-parallel rank fails a trace, in each phase, beside other requests: is any lost?

Two ranks serve a tiny random model. For each phase of a trace and each rank, completions and traces
run together, and a call of that phase raises on that rank alone, again and again. Each fault must
fail a trace, or all of its step, with that reason. All else must be as in a run without faults:
every completion whole and with the same tokens, the scores of every other trace, nothing left in
the engine.

    python -m benchmarks.rank_faults [--requests 200] [--traces 16] [--json OUT]

About 5 minutes on 2 CPU cores. Exits 1 if anything was lost, differs or was left.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.tables import emit, plain
from tests.engine.harness import Engine, TraceJob, relative_l1
from tests.engine.worker_faults import on_rank
from tests.faults import PHASES, break_next_call, injected_faults, mend_function
from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.base.records import TraceReport
from vllm_flashtrace.core.weights import TargetWeights

RANKS = 2
NEW_TOKENS = 4
SCORE_LIMIT = 1e-5
"""Relative L1; the steps of two runs differ, and with them the last digits of float32."""

_FAULTS = 6
"""Injected faults per phase and rank, if so many calls come."""


@dataclass(frozen=True)
class Load:
    """Completions and traces that run together.

    Attributes:
        requests: The prompt of a completion or a trace, in the order in which they are sent.
    """

    requests: list[list[int] | TraceJob]

    @classmethod
    def make(cls, completions: int, traces: int, seed: int = 0) -> Load:
        """Random tokens; no two prompts share a prefix. A trace takes several steps."""
        source = random.Random(seed)

        def tokens(shortest: int, longest: int) -> list[int]:
            return [source.randrange(5, 500) for _ in range(source.randint(shortest, longest))]

        made: list[list[int] | TraceJob] = [tokens(8, 120) for _ in range(completions)]
        for i in range(traces):
            prompt = tokens(150, 400)
            weights = TargetWeights.from_spans([(100, 120), (130, len(prompt))])
            made.append(TraceJob(prompt, weights, layers=i % 2 == 0))
        source.shuffle(made)
        return cls(made)


@dataclass
class Outcome:
    """What came of a load, by the index of the request.

    Attributes:
        answers: Generated tokens of the completions that ended as they should.
        traces: Reports, or why there is none.
    """

    answers: dict[int, list[int]] = field(default_factory=dict)
    traces: dict[int, TraceReport | TraceError] = field(default_factory=dict)


def run_load(
    engine: Engine, load: Load, each: Callable[[int], None] = lambda done: None
) -> Outcome:
    """Sends all requests at once and runs the engine until all have ended.

    Args:
        engine: Its prefix cache is emptied first, so that traces record all of their prompt.
        load: What to send.
        each: Called before the first step and with the number of requests that have ended, each
            time one has.
    """
    core = engine.llm.llm_engine
    if not engine.llm.reset_prefix_cache():
        raise RuntimeError("the engine still holds blocks of earlier requests")
    outcome, indices, nonces = Outcome(), {}, {}
    for index, request in enumerate(load.requests):
        if isinstance(request, TraceJob):
            name, nonces[index] = engine.submit(request)
        else:
            name = engine.submit_completion(request, NEW_TOKENS)
        indices[name] = index
    done = 0
    each(done)
    while core.has_unfinished_requests():
        for output in core.step():
            if not output.finished:
                continue
            index, choice = indices[output.request_id], output.outputs[0]
            if index in nonces:
                outcome.traces[index] = _collected(engine, nonces[index])
            elif choice.finish_reason == "length" and len(choice.token_ids) == NEW_TOKENS:
                outcome.answers[index] = list(choice.token_ids)
            done += 1
            each(done)
    return outcome


def _collected(engine: Engine, nonce: str) -> TraceReport | TraceError:
    try:
        return engine.collect(nonce)
    except TraceError as error:
        return error


def run_with_faults(
    engine: Engine, load: Load, expected: Outcome, phase: str, rank: int
) -> dict[str, Any]:
    """Runs the load while one phase fails on one rank; returns a row of the table."""
    every = max(1, len(load.requests) // _FAULTS)
    before = _injected(engine)

    def arm(done: int) -> None:
        if done % every == 0 and done < len(load.requests):
            engine.on_worker(on_rank, rank, break_next_call, *PHASES[phase])

    began = time.monotonic()
    try:
        found = run_load(engine, load, arm)
    finally:
        engine.on_worker(on_rank, rank, mend_function, *PHASES[phase])
    seconds = time.monotonic() - began
    counts = [after - n for after, n in zip(_injected(engine), before, strict=True)]
    reports = {i: r for i, r in found.traces.items() if isinstance(r, TraceReport)}
    errors = [r for r in found.traces.values() if isinstance(r, TraceError)]
    injected = [e for e in errors if e.code == "recording_failed" and "injected" in e.message]
    status = engine.status()
    return {
        "phase": phase,
        "rank": rank,
        "faults": counts[rank],
        "faults_elsewhere": sum(counts) - counts[rank],
        "traces": len(expected.traces),
        "failed_as_injected": len(injected),
        "failed_otherwise": len(errors) - len(injected),
        "traces_completed": len(reports),
        "same_scores": sum(_same(r, expected.traces[i]) for i, r in reports.items()),
        "completions": len(expected.answers),
        "whole": len(found.answers),
        "same_tokens": sum(found.answers[i] == expected.answers[i] for i in found.answers),
        "left": status["recording"] + status["waiting_results"] + status["accumulator_bytes"],
        "seconds": round(seconds, 1),
        "reasons": sorted({f"{e.code}: {e.message}" for e in errors}),
    }


def _same(report: TraceReport, expected: TraceReport | TraceError) -> bool:
    if isinstance(expected, TraceError):
        return False
    return relative_l1(report.scores, expected.scores) <= SCORE_LIMIT


def _injected(engine: Engine) -> list[int]:
    """How many faults have happened on each rank."""
    return list(engine.llm.collective_rpc(injected_faults))


def lost(row: dict[str, Any]) -> list[str]:
    """What a row has that must not be; empty if all is well."""
    wrong = {
        "no fault happened": not row["faults"],
        "a fault on another rank": row["faults_elsewhere"],
        "faults that failed no trace": row["failed_as_injected"] < row["faults"],
        "traces failed for another reason": row["failed_otherwise"],
        "no trace completed": not row["traces_completed"],
        "traces lost": row["failed_as_injected"] + row["traces_completed"] != row["traces"],
        "other scores": row["same_scores"] != row["traces_completed"],
        "completions lost": row["whole"] != row["completions"],
        "other tokens": row["same_tokens"] != row["whole"],
        "left in the engine": row["left"],
    }
    return [what for what, holds in wrong.items() if holds]


@contextmanager
def two_ranks() -> Iterator[Engine]:
    """Two tensor-parallel ranks, each on a core of its own, with small steps."""
    from tests.tiny_models import make_tiny_model

    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(RANKS)))
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(
            make_tiny_model("qwen3", Path(folder) / "qwen3"),
            "faults of one rank under load",
            max_model_len=1024,
            max_num_batched_tokens=1024,
            max_num_seqs=128,
            kv_cache_memory_bytes=64 << 20,
            tensor_parallel_size=RANKS,
        )
        try:
            yield engine
        finally:
            engine.close()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=200, help="completions beside the traces")
    parser.add_argument("--traces", type=int, default=16)
    parser.add_argument("--phases", nargs="+", choices=list(PHASES), default=list(PHASES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    load = Load.make(options.requests, options.traces, options.seed)
    rows = []
    with two_ranks() as engine:
        expected = run_load(engine, load)
        errors = [r for r in expected.traces.values() if isinstance(r, TraceError)]
        if errors or len(expected.answers) != options.requests:
            raise RuntimeError(f"without faults: {len(expected.answers)} completions, {errors}")
        for phase in options.phases:
            for rank in range(RANKS):
                rows.append(run_with_faults(engine, load, expected, phase, rank))
                print(plain(rows[-1:]).splitlines()[-1], lost(rows[-1]), flush=True)
    result = {"settings": {**vars(options), "json": None}, "rows": rows}
    emit(result, plain(rows), options.json)
    wrong = {f"{row['phase']}, rank {row['rank']}": lost(row) for row in rows if lost(row)}
    print(f"lost: {wrong or 'nothing'}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
