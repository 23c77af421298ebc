"""Output projections kept for traces do not outlive the weights they came from."""

from __future__ import annotations

from typing import Any

from tests.engine.harness import Engine, TraceJob
from vllm_flashtrace.core.weights import TargetWeights


def kept_projections(worker: Any) -> int:
    from vllm_flashtrace.worker.runner import capture_of

    return len(capture_of(worker.model_runner)._model._projections)


def failing_update(worker: Any) -> None:
    import contextlib

    # Without a weight transfer engine vLLM refuses; that is enough to pass through the patch.
    with contextlib.suppress(Exception):
        worker.update_weights({})


def test_forgotten_after_an_update(smollm2: Engine, trace_tokens: list[int]) -> None:
    job = TraceJob(trace_tokens, TargetWeights.from_spans([(560, 600)]))
    before = smollm2.trace(job).scores
    assert smollm2.on_worker(kept_projections) == 30
    smollm2.on_worker(failing_update)
    assert smollm2.on_worker(kept_projections) == 0
    assert smollm2.trace(job).scores.equal(before)
