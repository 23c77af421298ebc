"""A fault in recording or in the proximity pass fails its trace and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.mixed_load import FailSome
from tests.engine.conftest import text_tokens
from tests.engine.harness import Engine, TraceJob
from tests.faults import PHASES, break_function, mend_function
from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.core.hops import FurtherHops
from vllm_flashtrace.core.weights import TargetWeights

TARGET = TargetWeights.from_spans([(300, 340)])


@pytest.fixture(scope="module")
def tokens(tiny: Engine) -> list[int]:
    return text_tokens(tiny, 600)


FURTHER = FurtherHops(torch.arange(100, 250), hops=2)
FURTHER_PHASES = {
    "queries": ("vllm_flashtrace.worker.row_groups", "KeptGroup", "add_attention"),
    "rows": ("vllm_flashtrace.worker.row_groups", "KeptGroup", "add_rows"),
    "weights": ("vllm_flashtrace.worker.kept_rows", "KeptRows", "weighed"),
    "sums": ("vllm_flashtrace.worker.cpu_model", "CPUTracedModel", "weigh_together"),
    "next target": ("vllm_flashtrace.core.hops", "FurtherHops", "after"),
    "value read": PHASES["value read"],
}


@pytest.mark.parametrize("phase", PHASES)
def test_fault_fails_the_trace_alone(tiny: Engine, tokens: list[int], phase: str) -> None:
    check_fault(tiny, TraceJob(tokens, TARGET), PHASES[phase])


@pytest.mark.parametrize("phase", FURTHER_PHASES)
def test_fault_of_further_hops_fails_the_trace_alone(
    tiny: Engine, tokens: list[int], phase: str
) -> None:
    check_fault(tiny, TraceJob(tokens, TARGET, further=FURTHER), FURTHER_PHASES[phase])


def check_fault(tiny: Engine, job: TraceJob, fault: tuple[str, str | None, str]) -> None:
    tiny.on_worker(break_function, *fault)
    try:
        with pytest.raises(TraceError) as caught:
            tiny.trace(job)
        text = tiny.generate(job.token_ids, 8)
    finally:
        tiny.on_worker(mend_function, *fault)
    assert caught.value.code == "recording_failed"
    assert "injected" in caught.value.message
    assert text == tiny.generate(job.token_ids, 8)
    assert tiny.trace(job).scores.sum() > 0
    _nothing_left(tiny)


def test_the_load_tests_fault_fits(tiny: Engine, tokens: list[int]) -> None:
    tiny.on_worker(fail_all)
    try:
        with pytest.raises(TraceError, match="injected by the load test"):
            tiny.trace(TraceJob(tokens, TARGET))
    finally:
        tiny.on_worker(mend_function, "vllm_flashtrace.worker.recorder", None, "score")
    assert tiny.trace(TraceJob(tokens, TARGET)).scores.sum() > 0


def fail_all(worker: Any) -> None:
    FailSome.fail_some(worker, 1.0)


def test_non_finite_activations_are_refused(tiny: Engine, tokens: list[int]) -> None:
    def poison(worker: Any) -> None:
        import vllm_flashtrace.worker.step as step

        stock = step.StepRecorder.record_update

        def poisoned(self: Any, update: Any, residual: Any) -> None:
            stock(self, update * float("nan") if self._updates == 2 else update, residual)

        poisoned.original = stock  # type: ignore[attr-defined]
        step.StepRecorder.record_update = poisoned  # type: ignore[method-assign]

    tiny.on_worker(poison)
    try:
        with pytest.raises(TraceError, match="finite"):
            tiny.trace(TraceJob(tokens, TARGET))
    finally:
        tiny.on_worker(mend_function, *PHASES["residual"])
    assert tiny.trace(TraceJob(tokens, TARGET)).scores.sum() > 0


def test_a_layer_that_is_not_seen_fails_the_trace(tiny: Engine, tokens: list[int]) -> None:
    def skip_a_layer(worker: Any) -> None:
        import vllm_flashtrace.worker.runner as adapter

        stock = adapter.StepObserver.on_update

        def forgetful(self: Any, update: Any, residual: Any) -> None:
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls != 3:
                stock(self, update, residual)

        forgetful.original = stock  # type: ignore[attr-defined]
        adapter.StepObserver.on_update = forgetful  # type: ignore[method-assign]

    tiny.on_worker(skip_a_layer)
    try:
        with pytest.raises(TraceError, match="4 attention calls, 3 updates, 0 residual") as caught:
            tiny.trace(TraceJob(tokens, TARGET))
    finally:
        tiny.on_worker(mend_function, "vllm_flashtrace.worker.runner", "StepObserver", "on_update")
    assert caught.value.code == "recording_incomplete"
    assert tiny.trace(TraceJob(tokens, TARGET)).scores.sum() > 0


def test_forged_spec_is_an_ordinary_request(tiny: Engine, tokens: list[int]) -> None:
    job = TraceJob(tokens, TARGET)
    for forged in (b"x" * 80, b"", "text", {"nonce": "n"}, [1, 2]):
        _, nonce = tiny.submit(job, {"flashtrace": forged})
        tiny.run()
        with pytest.raises(TraceError) as caught:
            tiny.collect(nonce)
        assert caught.value.code == "result_missing"
    assert tiny.trace(job).scores.sum() > 0
    _nothing_left(tiny)


def test_spec_for_another_prompt_is_refused(tiny: Engine, tokens: list[int]) -> None:
    job = TraceJob(tokens, TARGET)
    sealed = tiny._record(tiny._spec(job)).extra_args
    other = TraceJob(tokens[:-1], TARGET)
    _, nonce = tiny.submit(other, sealed)
    tiny.run()
    with pytest.raises(TraceError, match="spec is for 600 tokens"):
        tiny.collect(nonce)


def test_abort_returns_the_accumulators(crowded: Engine) -> None:
    job = TraceJob(text_tokens(crowded, 1000), TargetWeights.from_spans([(200, 990)]))
    request_id, nonce = crowded.submit(job)
    crowded.step_until(lambda: crowded.status()["accumulator_bytes"] > 0)
    crowded.llm.llm_engine.abort_request([request_id])
    crowded.run()
    crowded.generate(job.token_ids[:50], 2)  # the worker learns of the abort with the next step
    with pytest.raises(TraceError) as caught:
        crowded.collect(nonce)
    assert caught.value.code == "result_missing"
    _nothing_left(crowded)


def _nothing_left(engine: Engine) -> None:
    status = engine.status()
    assert status["recording"] == 0
    assert status["waiting_results"] == 0
    assert status["accumulator_bytes"] == 0
