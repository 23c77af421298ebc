"""A worker keeps to its accumulator budget and tells what a trace costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from tests.engine.harness import Engine, TraceJob
from vllm_flashtrace import FlashTrace
from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.base.records import Completion
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.trace.budget import AccumulatorBudget

TARGET = TargetWeights.from_spans([(500, 540)])


def set_budget(worker: Any, limit_bytes: int) -> int:
    """Runs in the worker; returns the former limit."""
    from vllm_flashtrace.worker.runner import capture_of

    recorder = capture_of(worker.model_runner).recorder
    former = recorder.budget.limit_bytes
    recorder.budget = dataclasses.replace(recorder.budget, limit_bytes=limit_bytes)
    return former


@pytest.fixture
def budget(smollm2: Engine) -> AccumulatorBudget:
    budget = AccumulatorBudget.from_status(smollm2.status())
    assert budget is not None
    return budget


@pytest.fixture
def tight(smollm2: Engine, budget: AccumulatorBudget) -> Iterator[Engine]:
    """Room for one trace of 540 tokens."""
    smollm2.on_worker(set_budget, budget.cost(540))
    yield smollm2
    smollm2.on_worker(set_budget, budget.limit_bytes)


def test_the_default_is_a_part_of_the_memory(budget: AccumulatorBudget) -> None:
    assert budget.limit_bytes == psutil.virtual_memory().total // 16
    assert budget.bytes_per_token == 30 * 9 * 4
    assert budget.fixed_bytes == 30 * 2 * 576 * 4


def test_what_does_not_fit_is_refused_alone(tight: Engine, trace_tokens: list[int]) -> None:
    fits = TraceJob(trace_tokens, TARGET)
    too_long = TraceJob(trace_tokens, TargetWeights.from_spans([(500, 541)]))
    with pytest.raises(TraceError, match=r"541 tokens needs .* bytes of accumulators") as caught:
        tight.trace(too_long)
    assert caught.value.code == "overloaded"
    assert tight.trace(fits).scores.sum() > 0
    assert tight.status()["accumulator_bytes"] == 0


def test_offline_jobs_are_skipped_alone(tight: Engine, trace_tokens: list[int]) -> None:
    ft = FlashTrace(llm=tight.llm)
    generated = trace_tokens[-10:]
    text = tight.llm.get_tokenizer().decode(generated)
    # Two of 310 tokens do not fit side by side, one of 570 not at all.
    records = [Completion(trace_tokens[:length], generated, text) for length in (300, 560, 300)]
    jobs = [ft._job(record, None, None) for record in records]
    answers = ft._attribute(ft._parse({"hops": 0}), jobs)
    assert [answer.status for answer in answers] == ["completed", "skipped", "completed"]
    assert answers[1].error is not None
    assert answers[1].error["code"] == "overloaded"
