"""Traces whose log-sum-exp comes from FlashAttention, under vLLM's own ``forward`` of it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.harness import relative_l1
from tests.gpu.standin import FlashKernel
from tests.gpu.test_fp8_cache import layers
from tests.gpu.test_start_proof import proof
from tests.gpu.v2_engine import (
    LIMIT,
    Traced,
    V2Engine,
    apply_patches,
    assert_exact,
    traced,
    untraced,
    v2_engine,
)
from tests.oracle import as_float64
from tests.tiny_models import make_tiny_model
from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.core.hops import FurtherHops, TracedTarget
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.kernels import KeptQueries
from vllm_flashtrace.patches import attention_backends
from vllm_flashtrace.trace.wire import TraceSpec
from vllm_flashtrace.worker import gpu_model, runner
from vllm_flashtrace.worker.observer import observing


@pytest.fixture
def kernel(engine: V2Engine, monkeypatch: pytest.MonkeyPatch) -> FlashKernel:
    """FlashAttention 3 under the engine; whatever queries are kept, with their log-sum-exp."""
    monkeypatch.setattr(gpu_model, "WORTH_KEEPING_LSE", 0)
    return FlashKernel(layers(engine), monkeypatch)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call for column sums, whether it was given the log-sum-exp."""
    found: list[bool] = []
    stock, stock_kept = gpu_model.paged_column_sums, gpu_model.add_kept_column_sums

    def at_once(inputs: Any, *args: Any) -> None:
        found.append(inputs.lse is not None)
        stock(inputs, *args)

    def kept(queries: KeptQueries, keys: Any) -> None:
        found.append(queries.lse is not None)
        stock_kept(queries, keys)

    monkeypatch.setattr(gpu_model, "paged_column_sums", at_once)
    monkeypatch.setattr(gpu_model, "add_kept_column_sums", kept)
    return found


def run(engine: V2Engine, name: str, trace: Traced, before: str | None = None) -> None:
    """A trace in three steps, of which the second has a row of it and nothing else."""
    finished = [done for done in (before, f"{before} beside") if done in engine.steps.computed]
    engine.step({name: 60}, new={name: trace.new}, finished=finished)
    if trace.spec.kept_rows:  # Which are all told, or all computed.
        engine.step({name: 40})
        return
    engine.step({name: 1})
    engine.step({name: 39, f"{name} beside": 20}, new={f"{name} beside": untraced(20, 1)})


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "at once"])
def test_traces(
    kept: bool,
    engine: V2Engine,
    float64_llama: Any,
    kernel: FlashKernel,
    given: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with our own pass, which goes on where there is one query for each request."""
    if not kept:
        monkeypatch.setattr(gpu_model.GPUTracedModel, "keep_queries", lambda *_: None)
    trace, again = (traced(100, (52, 64), (90, 100), seed=2) for _ in range(2))
    engine.step({"plain": 30}, new={"plain": untraced(30, 9)})
    assert kernel.asked == [(False, 30)] * 4, "nobody is traced"
    kernel.asked.clear()
    run(engine, "trace", trace)
    assert kernel.asked == [*[(True, 60)] * 4, *[(False, 1)] * 4, *[(True, 39)] * 4]
    assert given == [on for on in (True, False, True) for _ in range(1 if kept else 4)]
    scores = assert_exact(engine, trace, float64_llama).scores
    monkeypatch.setattr(attention_backends, "told", lambda call: False)
    given.clear()
    run(engine, "again", again)
    assert relative_l1(scores, engine.report(again).scores) < 1e-5 and not any(given)


def test_a_step_before_the_first_row_is_not_asked(engine: V2Engine, kernel: FlashKernel) -> None:
    engine.step({"trace": 40}, new={"trace": traced(100, (90, 100)).new})
    engine.step({"trace": 60})
    assert kernel.asked == [*[(False, 40)] * 4, *[(True, 60)] * 4]


@pytest.mark.parametrize("spans", [((20, 61),), ((20, 40), (45, 61))], ids=["near", "apart"])
def test_further_hops(
    spans: Any, engine: V2Engine, float64_llama: Any, kernel: FlashKernel, given: list[bool]
) -> None:
    """Each hop weighs rows with the log-sum-exp that was told when they were computed."""
    further = FurtherHops(TargetWeights.from_spans(spans).positions, hops=2)
    target = traced(100, (70, 80), (90, 100))
    spec = TraceSpec.create([TracedTarget(target.weights, further)], 100, exact_fraction=1.0)
    trace = dataclasses.replace(target, spec=spec)
    engine.step({"trace": 50}, new={"trace": trace.new})
    engine.step({"trace": 50})
    report = assert_exact(engine, trace, float64_llama)
    weights, mass = further.after(report.scores, 1.0)
    assert weights is not None and mass > 0
    exact = dataclasses.replace(target, weights=weights).oracle(float64_llama)
    assert relative_l1(report.later_scores[0], exact) < LIMIT
    assert given and all(given)


def test_heads_of_kept_rows(engine: V2Engine, kernel: FlashKernel, given: list[bool]) -> None:
    """Rows whose queries alone are kept have it with them, also after a preemption."""
    engine.step({"first": 20}, new={"first": traced(20, (10, 20)).new})  # Makes the capture.
    model = engine.capture.recorder._model
    assert model is not None
    model.take_head_weights(torch.rand(model.shape.num_layers, model.shape.num_heads))
    further = FurtherHops(TargetWeights.from_spans([(20, 61)]).positions, hops=1)
    target = traced(100, (70, 80))
    heads = TraceSpec.create(
        [TracedTarget(target.weights, further)], 100, exact_fraction=1.0, heads=True
    )
    trace = dataclasses.replace(target, spec=heads)
    given.clear()
    engine.step({"trace": 50}, new={"trace": trace.new})
    kept = engine.capture.recorder._traces["trace"].rows
    assert kept is not None and kept.lse is not None and kept.lse_told
    kept.lse_told = False
    engine.capture.recorder._traces["trace"]._restart(0)
    assert kept.lse_told
    engine.step({"trace": 50})
    assert len(engine.report(trace).later_scores) == 1
    assert given and all(given)


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "of the row before": lambda lse: lse.roll(1, dims=1),
    "of another head": lambda lse: lse.roll(1, dims=0),
    "to base 2": lambda lse: lse / math.log(2),
    "1 % too large": lambda lse: lse * 1.01,
    "not a number": lambda lse: lse * torch.nan,
}


@pytest.mark.parametrize("hops", [0, 1])
def test_what_is_wrong_is_refused(hops: int, engine: V2Engine, kernel: FlashKernel) -> None:
    """Of a trace in several chunks, by the worker at its end, and by the proof at the start."""
    further = FurtherHops(TargetWeights.from_spans([(20, 61)]).positions, hops=hops)
    for number, (before, name) in enumerate(itertools.pairwise([None, *WRONG])):
        kernel.change = WRONG[name]
        trace = traced(100, (58, 64), (90, 100), seed=number)
        if hops:
            spec = TraceSpec.create([TracedTarget(trace.weights, further)], 100, exact_fraction=1.0)
            trace = dataclasses.replace(trace, spec=spec)
        run(engine, name, trace, before)
        with pytest.raises(TraceError) as raised:
            engine.report(trace)
        assert raised.value.code == "recording_failed", name
    if not hops:
        for change in WRONG.values():
            kernel.change = change
            assert "failed in layer 0" in proof(engine)["refusal"]
        kernel.change = lambda lse: lse
        assert proof(engine)["refusal"] is None


def test_one_that_does_not_fit_fails_its_traces_alone(
    engine: V2Engine, kernel: FlashKernel
) -> None:
    kernel.change = lambda lse: lse.t().contiguous()
    trace = traced(100, (58, 64), (90, 100))
    run(engine, "trace", trace)
    with pytest.raises(TraceError, match="log-sum-exp"):
        engine.report(trace)


def test_sinks_and_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a sink takes is missing in the column sums, and known."""
    from transformers import AutoModelForCausalLM

    folder = make_tiny_model("gpt_oss", tmp_path)
    reference = as_float64(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    monkeypatch.setattr(runner, "check_architecture", lambda _: None)  # Nothing was proven.
    support = "vllm.v1.attention.backends.flash_attn.flash_attn_supports_sinks"
    monkeypatch.setattr(support, lambda: True, raising=False)  # It asks the device.
    monkeypatch.setattr(gpu_model, "WORTH_KEEPING_LSE", 0)
    with v2_engine(folder, monkeypatch, disable_hybrid_kv_cache_manager=True) as engine:
        apply_patches(monkeypatch)
        kernel = FlashKernel(layers(engine), monkeypatch)
        trace = traced(100, (60, 100))
        run(engine, "trace", trace)
        assert_exact(engine, trace, reference)
        kernel.change = lambda lse: lse + 5e-3
        wrong = traced(100, (60, 100), seed=1)
        run(engine, "wrong", wrong)
        with pytest.raises(TraceError, match="do not add up"):
            engine.report(wrong)


def test_normed_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries that wait for a norm, with their log-sum-exp; sums of attention beside them."""
    from transformers import AutoModelForCausalLM

    folder = make_tiny_model("glm4", tmp_path)
    reference = as_float64(AutoModelForCausalLM.from_pretrained(folder))
    monkeypatch.setattr(runner, "check_architecture", lambda _: None)
    monkeypatch.setattr(gpu_model.GPUTracedModel, "keep_queries", lambda *_: None)
    with v2_engine(folder, monkeypatch) as engine:
        apply_patches(monkeypatch)
        kernel = FlashKernel(layers(engine), monkeypatch)
        trace = traced(100, (60, 100))
        run(engine, "trace", trace)
        assert_exact(engine, trace, reference)
        kernel.change = WRONG["of the row before"]
        wrong = traced(100, (60, 100), seed=1)
        run(engine, "wrong", wrong)
        with pytest.raises(TraceError, match="do not add up"):
            engine.report(wrong)


CALL = {
    "fa_version": 3,
    "block_table": torch.zeros(1, 1),
    "max_seqlen_q": 2,
    "alibi_slopes": None,
    "softcap": 0,
    "k": torch.zeros(1),
}


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({}, True),
        ({"fa_version": 2}, True),
        ({"s_aux": torch.zeros(1), "num_splits": 32, "window_size": [7, 0]}, True),
        ({"fa_version": 4}, False),
        ({"fa_version": None}, False),
        ({"block_table": None}, False),
        ({"max_seqlen_q": 1}, False),
        ({"alibi_slopes": torch.zeros(1)}, False),
        ({"softcap": 30.0}, False),
        ({"k": torch.zeros(1).to(torch.float8_e4m3fn)}, False),
        ({"return_softmax_lse": True}, False),
    ],
)
def test_which_calls_tell(other: dict[str, Any], expected: bool) -> None:
    assert attention_backends.told({**CALL, **other}) == expected


def test_without_an_observer_the_call_passes_through() -> None:
    calls: list[tuple[Any, Any]] = []

    def stock(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return ("out", torch.zeros(1, 1)) if kwargs.get("return_softmax_lse") else "out"

    wrapped = attention_backends.telling_lse(stock)
    assert wrapped(**CALL) == "out" and calls.pop() == ((), CALL)
    observer: Any = object()
    with observing(observer):
        assert wrapped(**CALL) == "out"
        assert calls.pop() == ((), {**CALL, "return_softmax_lse": True})
        assert wrapped(1, **CALL) == "out" and calls.pop() == ((1,), CALL)
