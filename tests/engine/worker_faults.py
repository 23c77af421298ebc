"""One of several workers of an engine fails or loses a result: what must hold then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from tests.engine.harness import Engine, TraceJob
from tests.faults import PHASES, break_function, mend_function
from vllm_flashtrace.base.errors import TraceError

# Each phase fails on one of the two workers; on the other one in the long runs.
FAULTS = [pytest.param(phase, i % 2) for i, phase in enumerate(PHASES)]
FAULTS += [pytest.param(phase, 1 - i % 2, marks=pytest.mark.long) for i, phase in enumerate(PHASES)]


def core_each(patch: pytest.MonkeyPatch, workers: int) -> None:
    """Gives each worker of the next engine a core of its own."""
    if workers > 1:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(str(core) for core in range(workers)))


def on_rank(worker: Any, rank: int, function: Any, *args: Any) -> None:
    """Runs in every worker: calls the function in one of them."""
    if worker.rank == rank:
        function(worker, *args)


def check_failing_rank(
    engine: Engine, rank: int, phase: str, job: TraceJob, prompt: Sequence[int]
) -> None:
    """The trace fails with its reason; completions beside it and the next trace do not."""
    engine.on_worker(on_rank, rank, break_function, *PHASES[phase])
    try:
        with pytest.raises(TraceError, match="injected") as caught:
            engine.trace(job)
        text = engine.generate(prompt, 2)
    finally:
        engine.on_worker(on_rank, rank, mend_function, *PHASES[phase])
    assert caught.value.code == "recording_failed"
    assert text == engine.generate(prompt, 2)
    assert engine.trace(job).scores.sum() > 0
    check_nothing_left(engine)


def check_lost_result(engine: Engine, rank: int, job: TraceJob) -> None:
    """A result that one worker no longer has fails its trace and leaves nothing in the others."""
    _, nonce = engine.submit(job)
    engine.run()
    engine.on_worker(on_rank, rank, _lose_results)
    with pytest.raises(TraceError) as caught:
        engine.collect(nonce)
    assert caught.value.code == "result_missing"
    check_nothing_left(engine)


def check_nothing_left(engine: Engine) -> None:
    """No worker records, keeps a result or holds memory for one."""
    status = engine.status()
    assert status["refusal"] is None
    left = (status["recording"], status["waiting_results"], status["accumulator_bytes"])
    assert left == (0, 0, 0)


def _lose_results(worker: Any) -> None:
    from vllm_flashtrace.worker.runner import capture_of

    capture_of(worker.model_runner).recorder._results.clear()
