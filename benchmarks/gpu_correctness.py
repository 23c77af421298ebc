"""Runs the comparisons with float64 in several processes on one GPU.

Invariant: every case ends as passed, failed or not run, whatever another one does to its process.
Most of the time goes into compiling, which is why processes share the work; one that dies or hangs
takes nothing with it but time, and what it left is run again, one process each.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.gpu_cases import Case
from benchmarks.gpu_checks import Outcome, check_case

_LONGEST_WAIT = 90.0
"""Seconds without any result after which what is missing counts as lost."""

_MOST_RETRIES = 12


def run_checks(
    cases: Sequence[Case],
    device: str,
    jobs: int,
    limit_seconds: float,
    on_done: Callable[[], None],
) -> dict[str, Any]:
    """Checks all cases.

    Args:
        cases: What to check.
        device: ``cuda`` or ``cpu``.
        jobs: Processes; 1 runs the cases in this one.
        limit_seconds: Time for all of them; what is left then is not run.
        on_done: Called after every case.

    Returns:
        ``cases``, ``failed``, ``not_run``, ``seconds``, ``errors`` (worst of each kernel by type)
        and ``failures`` (name and lines).
    """
    began = time.perf_counter()
    deadline = began + limit_seconds
    if jobs == 1:
        outcomes: dict[str, Outcome] = {}
        for case in cases:
            if time.perf_counter() > deadline:
                break
            outcomes[case.name] = check_case(case, device)
            on_done()
    else:
        outcomes = _run_pool(cases, device, jobs, deadline, on_done)
        again = [c for c in cases if c.name not in outcomes or outcomes[c.name].crashed]
        for case in again[:_MOST_RETRIES]:
            remaining = deadline - time.perf_counter()
            if remaining > 0:
                alone = _run_pool([case], device, 1, time.perf_counter() + remaining, on_done)
                outcomes.update(alone)
    return _summary(cases, outcomes, time.perf_counter() - began)


def _run_pool(
    cases: Sequence[Case], device: str, jobs: int, deadline: float, on_done: Callable[[], None]
) -> dict[str, Outcome]:
    """What finished, by name. Ends its processes in any case."""
    outcomes: dict[str, Outcome] = {}
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:  # Terminates on leaving.
        results = pool.imap_unordered(_check, [(case, device) for case in cases])
        for _ in cases:
            remaining = min(_LONGEST_WAIT, deadline - time.perf_counter())
            try:
                outcome = results.next(timeout=max(0.0, remaining))
            except multiprocessing.TimeoutError:
                break
            outcomes[outcome.name] = outcome
            on_done()
    return outcomes


def _check(arguments: tuple[Case, str]) -> Outcome:
    return check_case(*arguments)


def _summary(cases: Sequence[Case], outcomes: dict[str, Outcome], seconds: float) -> dict[str, Any]:
    done = list(outcomes.values())
    worst: dict[str, dict[str, float]] = {}
    for case in cases:
        outcome = outcomes.get(case.name)
        for kernel, error in (outcome.errors if outcome else {}).items():
            kind = worst.setdefault("float32" if case.tolerance < 1e-4 else "narrower", {})
            kind[kernel] = max(error, kind.get(kernel, 0.0))
    return {
        "cases": len(cases),
        "failed": sum(bool(outcome.failures) for outcome in done),
        "not_run": [case.name for case in cases if case.name not in outcomes],
        "seconds": seconds,
        "errors": worst,
        "failures": [
            {k: v for k, v in asdict(o).items() if k in ("name", "failures", "errors")}
            for o in done
            if o.failures
        ],
    }
