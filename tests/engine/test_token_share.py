"""Traces beside decoding requests take their share of each step and no more."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.engine.conftest import text_tokens
from tests.engine.harness import Engine, TraceJob, relative_l1
from vllm_flashtrace.core.weights import TargetWeights

LIMIT = 5e-4
STEP = 160  # of the crowded engine
SHARE = 40  # a quarter
TARGET = TargetWeights.from_spans([(210, 330), (800, 1000)])


def start_log(_: Any) -> None:
    """Runs in the worker: keeps what every step schedules."""
    import vllm_flashtrace.worker.runner as runner

    stock = runner.RunnerCapture.observe

    def observe(self: Any, scheduler_output: Any) -> None:
        observe.steps.append(dict(scheduler_output.num_scheduled_tokens))  # type: ignore[attr-defined]
        stock(self, scheduler_output)

    observe.steps = []  # type: ignore[attr-defined]
    observe.stock = stock  # type: ignore[attr-defined]
    runner.RunnerCapture.observe = observe  # type: ignore[method-assign]


def take_log(_: Any) -> list[dict[str, int]]:
    """Runs in the worker: what was scheduled since the last call."""
    from vllm_flashtrace.worker.runner import RunnerCapture

    steps = list(RunnerCapture.observe.steps)  # type: ignore[attr-defined]
    RunnerCapture.observe.steps.clear()  # type: ignore[attr-defined]
    return [step for step in steps if step]


def stop_log(_: Any) -> None:
    from vllm_flashtrace.worker.runner import RunnerCapture

    RunnerCapture.observe = RunnerCapture.observe.stock  # type: ignore[attr-defined,method-assign]


@pytest.fixture
def logged(crowded: Engine) -> Iterator[Engine]:
    crowded.status()  # the capture exists from now on
    crowded.on_worker(start_log)
    yield crowded
    crowded.on_worker(stop_log)


def test_a_long_trace_among_decoding_requests(logged: Engine) -> None:
    job = TraceJob(text_tokens(logged, 1000), TARGET)
    alone = logged.trace(job)
    chunks = [count for step in logged.on_worker(take_log) for count in step.values()]
    assert chunks == [STEP] * 6 + [40]

    decoding = [text_tokens(logged, 30 + i, f"Decoding {i}. ") for i in range(4)]
    (report,) = logged.trace_many([job], decoding, new_tokens=80)
    steps = logged.on_worker(take_log)
    trace = _last_come(steps)
    with_trace = [step for step in steps if trace in step]
    lengths = list(map(len, decoding))
    left = STEP - sum(lengths)  # Of the first step, which has the decoding requests' prompts.
    assert 0 < left < SHARE
    assert [step.pop(trace) for step in with_trace] == [
        left,
        *[SHARE] * 24,
        1000 - left - 24 * SHARE,
    ]
    assert list(with_trace.pop(0).values()) == lengths
    for step in with_trace:
        assert list(step.values()) == [1] * 4  # every decoding request went on
    assert report.restarts == 0
    error = relative_l1(report.scores, alone.scores)
    print(f"in 26 chunks among 4 decoding requests: relative L1 {error:.2e}")
    assert error <= LIMIT


def test_two_traces_and_a_new_prompt(logged: Engine) -> None:
    """The prompt that comes after the traces is not held up by the one without a share."""
    jobs = [
        TraceJob(text_tokens(logged, 300, f"Trace {i}. "), TargetWeights.from_spans([(200, 300)]))
        for i in range(2)
    ]
    alone = [logged.trace(job).scores for job in jobs]
    logged.on_worker(take_log)
    with logged.held():
        [(first, nonce), (second, other)] = [logged.submit(job) for job in jobs]
        newcomer = logged.submit_completion(text_tokens(logged, 100, "New. "), 40)
    logged.run()
    steps = logged.on_worker(take_log)
    for step in steps:
        of_traces = sum(n for req, n in step.items() if req.startswith((first, second)))
        if any(req.startswith(newcomer) for req in step):
            assert of_traces <= SHARE
    starts = [
        next(i for i, step in enumerate(steps) if any(r.startswith(name) for r in step))
        for name in (newcomer, second)
    ]
    assert starts[0] < starts[1]
    for scores, key in zip(alone, (nonce, other), strict=True):
        assert relative_l1(logged.collect(key).scores, scores) <= LIMIT


def _last_come(steps: list[dict[str, int]]) -> str:
    seen = dict.fromkeys(req for step in steps for req in step)
    return list(seen)[-1]
