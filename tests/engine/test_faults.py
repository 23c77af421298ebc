"""A fault in recording or in the proximity pass fails its trace and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.conftest import text_tokens
from tests.engine.harness import Engine, TraceJob
from tests.faults import PHASES, break_function, mend_function
from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.core.weights import TargetWeights

TARGET = TargetWeights.from_spans([(300, 340)])


@pytest.mark.parametrize("phase", PHASES)
def test_fault_fails_the_trace_alone(smollm2: Engine, trace_tokens: list[int], phase: str) -> None:
    smollm2.on_worker(break_function, *PHASES[phase])
    try:
        with pytest.raises(TraceError) as caught:
            smollm2.trace(TraceJob(trace_tokens, TARGET))
        text = smollm2.generate(trace_tokens, 8)
    finally:
        smollm2.on_worker(mend_function, *PHASES[phase])
    assert caught.value.code == "recording_failed"
    assert "injected" in caught.value.message
    assert text == smollm2.generate(trace_tokens, 8)
    assert smollm2.trace(TraceJob(trace_tokens, TARGET)).scores.sum() > 0
    _nothing_left(smollm2)


def test_non_finite_activations_are_refused(smollm2: Engine, trace_tokens: list[int]) -> None:
    def poison(worker: Any) -> None:
        import vllm_flashtrace.worker.step as step

        stock = step.StepRecorder.record_update

        def poisoned(self: Any, update: Any, residual: Any) -> None:
            stock(self, update * float("nan") if self._updates == 7 else update, residual)

        poisoned.original = stock  # type: ignore[attr-defined]
        step.StepRecorder.record_update = poisoned  # type: ignore[method-assign]

    smollm2.on_worker(poison)
    try:
        with pytest.raises(TraceError, match="finite"):
            smollm2.trace(TraceJob(trace_tokens, TARGET))
    finally:
        smollm2.on_worker(mend_function, *PHASES["residual"])
    assert smollm2.trace(TraceJob(trace_tokens, TARGET)).scores.sum() > 0


def test_a_layer_that_is_not_seen_fails_the_trace(smollm2: Engine, trace_tokens: list[int]) -> None:
    def skip_a_layer(worker: Any) -> None:
        import vllm_flashtrace.worker.runner as adapter

        stock = adapter.StepObserver.on_update

        def forgetful(self: Any, update: Any, residual: Any) -> None:
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls != 5:
                stock(self, update, residual)

        forgetful.original = stock  # type: ignore[attr-defined]
        adapter.StepObserver.on_update = forgetful  # type: ignore[method-assign]

    smollm2.on_worker(skip_a_layer)
    try:
        with pytest.raises(
            TraceError, match="30 attention calls, 29 updates and 0 residual"
        ) as caught:
            smollm2.trace(TraceJob(trace_tokens, TARGET))
    finally:
        smollm2.on_worker(
            mend_function, "vllm_flashtrace.worker.runner", "StepObserver", "on_update"
        )
    assert caught.value.code == "recording_incomplete"
    assert smollm2.trace(TraceJob(trace_tokens, TARGET)).scores.sum() > 0


def test_forged_spec_is_an_ordinary_request(smollm2: Engine, trace_tokens: list[int]) -> None:
    job = TraceJob(trace_tokens, TARGET)
    for forged in (b"x" * 80, b"", "text", {"nonce": "n"}, [1, 2]):
        _, nonce = smollm2.submit(job, {"flashtrace": forged})
        smollm2.run()
        with pytest.raises(TraceError) as caught:
            smollm2.collect(nonce)
        assert caught.value.code == "result_missing"
    assert smollm2.trace(job).scores.sum() > 0
    _nothing_left(smollm2)


def test_spec_for_another_prompt_is_refused(smollm2: Engine, trace_tokens: list[int]) -> None:
    job = TraceJob(trace_tokens, TARGET)
    sealed = smollm2._record(smollm2._spec(job)).extra_args
    other = TraceJob(trace_tokens[:-1], TARGET)
    spec_nonce = _nonce(sealed["flashtrace"])
    smollm2.submit(other, sealed)
    smollm2.run()
    with pytest.raises(TraceError, match="spec is for 600 tokens"):
        smollm2.collect(spec_nonce)


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


def test_results_nobody_fetches_expire(smollm2: Engine, trace_tokens: list[int]) -> None:
    def set_ttl(worker: Any, seconds: float) -> None:
        from vllm_flashtrace.worker.runner import capture_of

        capture_of(worker.model_runner).recorder._ttl = seconds

    smollm2.on_worker(set_ttl, 0.0)
    try:
        _, nonce = smollm2.submit(TraceJob(trace_tokens, TARGET))
        smollm2.run()
        with pytest.raises(TraceError) as caught:
            smollm2.collect(nonce)
    finally:
        smollm2.on_worker(set_ttl, 60.0)
    assert caught.value.code == "result_missing"
    _nothing_left(smollm2)


def _nothing_left(engine: Engine) -> None:
    status = engine.status()
    assert status["recording"] == 0
    assert status["waiting_results"] == 0
    assert status["accumulator_bytes"] == 0


def _nonce(sealed: bytes) -> str:
    from vllm_flashtrace.trace.wire import unseal

    return unseal(sealed).nonce
