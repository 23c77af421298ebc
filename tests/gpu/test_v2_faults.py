"""A fault in recording fails its trace; the V2 runner's own result does not change by a bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults import break_function, mend_function
from tests.gpu.v2_engine import (
    V2Engine,
    apply_patches,
    assert_exact,
    traced,
    untraced,
    v2_engine,
)
from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.kernels import KeptQueries, RowSegment, SumsTouchedError
from vllm_flashtrace.patches import model_runner_v2
from vllm_flashtrace.trace.wire import decode_wire
from vllm_flashtrace.worker import gpu_model, recorded_trace, row_groups
from vllm_flashtrace.worker import runner as adapter
from vllm_flashtrace.worker.observer import current

CAPTURE, ADAPTER = "vllm_flashtrace.worker", "vllm_flashtrace.worker"
PHASES: dict[str, tuple[str, str | None, str]] = {
    "registration": (f"{CAPTURE}.recorder", None, "Trace"),
    "batch": ("vllm_flashtrace.patches.model_runner_v2", None, "batch_rows_v2"),
    "kernel blocks": (f"{ADAPTER}.runner", None, "kernel_block_table"),
    "step": (f"{CAPTURE}.recorder", "Recorder", "begin_step"),
    "chunk": (f"{CAPTURE}.recorded_trace", "Trace", "begin_chunk"),
    "row plan": (f"{ADAPTER}.gpu_model", "GPUTracedModel", "plan_rows"),
    "observer": (f"{ADAPTER}.runner", None, "StepObserver"),
    "layer name": (f"{ADAPTER}.gpu_model", "GPUTracedModel", "layer_index"),
    "queries": ("vllm_flashtrace.kernels.paged_attention", "KeptQueries", "keep"),
    "attention": (f"{ADAPTER}.gpu_model", None, "add_kept_column_sums"),
    "cache views": (f"{ADAPTER}.gpu_model", None, "key_value_views"),
    "residual": (f"{CAPTURE}.step", "StepRecorder", "record_update"),
    "finish": (f"{CAPTURE}.recorder", "Recorder", "finish_step"),
    "projection": (f"{ADAPTER}.gpu_model", "GPUTracedModel", "output_projection"),
    "proximity": (f"{ADAPTER}.gpu_model", None, "replace_by_proximities"),
    "end of step": (f"{ADAPTER}.gpu_model", "GPUTracedModel", "end_step"),
    "scores": (f"{CAPTURE}.finish", None, "sum_shares"),
}
LATE = ("end of step",)  # The trace is complete by then.


def steps(engine: V2Engine, trace: Any) -> list[torch.Tensor]:
    """Hidden states of three steps; the trace's target is in the first two."""
    new = {"trace": trace.new, "other": untraced(60, 1)}
    return [
        engine.step({"trace": 50, "other": 20}, new=new),
        engine.step({"other": 30, "trace": 30}),
        engine.step({"other": 10}, finished=["trace"]),
    ]


def nothing_left(engine: V2Engine) -> None:
    assert current() is None and model_runner_v2._running is None
    assert not engine.capture.records_step and not engine.capture.scheduled


@pytest.mark.parametrize("phase", PHASES)
def test_fault_fails_the_trace_alone(
    phase: str, tiny_llama: Path, float64_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace, after = traced(80, (40, 80)), traced(70, (30, 66), seed=2)
    with v2_engine(tiny_llama, monkeypatch) as engine:
        expected = steps(engine, trace)
        apply_patches(monkeypatch)
        engine = V2Engine(engine.model, engine.config, engine.layout)
        break_function(None, *PHASES[phase])
        try:
            found = steps(engine, trace)
            if phase not in LATE:
                with pytest.raises(TraceError, match="injected") as caught:
                    engine.report(trace)
                assert caught.value.code == "recording_failed"
        finally:
            mend_function(None, *PHASES[phase])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        nothing_left(engine)
        engine.step({"after": 70}, new={"after": after.new}, finished=["other"])
        assert_exact(engine, after, float64_llama)
        assert not engine.capture.recorder.active_requests


@pytest.mark.parametrize(
    "name", ["_has_trace", "RunnerCapture", "sealed_spec"], ids=lambda name: name.strip("_")
)
def test_scheduler_output_that_cannot_be_read(
    name: str, engine: V2Engine, float64_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace, after = traced(80, (40, 80)), traced(70, (30, 66), seed=2)
    with monkeypatch.context() as patch:

        def broken(*_: Any) -> None:
            raise RuntimeError("injected")

        patch.setattr(adapter, name, broken)
        engine.step({"trace": 80}, new={"trace": trace.new})
    engine.step({"after": 70}, new={"after": after.new})
    assert_exact(engine, after, float64_llama)


def test_fault_in_one_trace_spares_the_other(
    engine: V2Engine, float64_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_flashtrace.worker.recorded_trace import Trace

    bad, good = traced(80, (40, 80)), traced(70, (30, 66), seed=2)
    stock = Trace.begin_chunk

    def begin_chunk(self: Trace, row: Any) -> Any:
        if self.spec.nonce == bad.spec.nonce:
            raise RuntimeError("injected")
        return stock(self, row)

    monkeypatch.setattr(Trace, "begin_chunk", begin_chunk)
    engine.step({"bad": 80, "good": 70}, new={"bad": bad.new, "good": good.new})
    with pytest.raises(TraceError, match="injected"):
        engine.report(bad)
    assert_exact(engine, good, float64_llama)


CALLS: dict[str, tuple[Any, Callable[..., Any]]] = {
    "paged_column_sums": (gpu_model, lambda inputs, *_: inputs.rows),
    "add_kept_column_sums": (gpu_model, lambda kept, *_: kept.rows),
    "keep": (KeptQueries, lambda kept, *_: kept.rows),
    "add_row_sums": (row_groups, lambda rows, *_: rows),
}
"""What records the rows of a step, and how they are found among its arguments."""


def break_for(
    name: str, broken: Callable[[Sequence[RowSegment]], Exception | None], patch: Any
) -> None:
    """Makes what records the rows of a step raise what ``broken`` gives for their segments."""
    holder, rows_of = CALLS[name]
    stock = getattr(holder, name)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        if (error := broken(rows_of(*args).segments)) is not None:
            raise error
        return stock(*args, **kwargs)

    patch.setattr(holder, name, replaced)
    if name == "paged_column_sums":
        patch.setattr(gpu_model, "KEPT_ROWS", 0)


def step_of_two(engine: V2Engine) -> tuple[Any, Any]:
    """Two traces in the same two steps; told apart by the columns of their sums, 80 and 70."""
    bad, good = traced(80, (30, 80)), traced(70, (20, 70), seed=2)
    engine.step({"bad": 50, "good": 40}, new={"bad": bad.new, "good": good.new})
    engine.step({"bad": 30, "good": 30})
    return bad, good


def of_the_bad_one(segments: Sequence[RowSegment]) -> Exception | None:
    widths = {segment.sums.column_sums.shape[2] for segment in segments}
    return RuntimeError("injected") if 80 in widths else None


@pytest.mark.parametrize("name", CALLS)
def test_fault_in_the_rows_of_one_trace_spares_the_other(
    name: str, engine: V2Engine, float64_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_for(name, of_the_bad_one, monkeypatch)
    bad, good = step_of_two(engine)
    with pytest.raises(TraceError, match="injected"):
        engine.report(bad)
    assert_exact(engine, good, float64_llama)


def test_rows_that_do_not_fit_together_spare_the_other(
    engine: V2Engine, float64_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = gpu_model.GPUTracedModel.plan_rows

    def plan_rows(self: Any, segments: Sequence[RowSegment]) -> Any:
        if (error := of_the_bad_one(segments)) is not None:
            raise error
        return stock(self, segments)

    monkeypatch.setattr(gpu_model.GPUTracedModel, "plan_rows", plan_rows)
    bad, good = step_of_two(engine)
    with pytest.raises(TraceError, match="injected"):
        engine.report(bad)
    assert_exact(engine, good, float64_llama)


@pytest.mark.parametrize("name", CALLS)
def test_no_memory_for_all_rows_at_once_fails_no_trace(
    name: str, engine: V2Engine, float64_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(segments: Sequence[RowSegment]) -> Exception | None:
        return torch.OutOfMemoryError("injected") if len(segments) > 1 else None

    break_for(name, broken, monkeypatch)
    for trace in step_of_two(engine):
        assert_exact(engine, trace, float64_llama)


@pytest.mark.parametrize("name", ["add_kept_column_sums", "add_row_sums"])
def test_a_fault_after_the_sums_were_touched_fails_all(
    name: str, engine: V2Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Repeating the call would count rows twice."""
    fault = SumsTouchedError("of the call")
    fault.__cause__ = RuntimeError("injected")
    break_for(name, lambda segments: fault if len(segments) > 1 else None, monkeypatch)
    for trace in step_of_two(engine):
        with pytest.raises(TraceError, match="injected"):
            engine.report(trace)


def test_a_device_that_is_spoilt_fails_all_and_the_step_goes_on(
    engine: V2Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an illegal address every call raises, the engine's own next one too."""
    fault = torch.AcceleratorError(
        "CUDA error: an illegal memory access was encountered (injected)"
    )
    break_for("keep", lambda _: fault, monkeypatch)
    for trace in step_of_two(engine):
        with pytest.raises(TraceError, match="injected") as caught:
            engine.report(trace)
        assert caught.value.code == "recording_failed"


def test_no_memory_for_one_traces_accumulators(
    engine: V2Engine, float64_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = torch.zeros

    def zeros(*size: Any, **kwargs: Any) -> Any:
        if size[-1:] == (80,):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB. GPU 0 has 1 GiB")
        return stock(*size, **kwargs)

    monkeypatch.setattr(recorded_trace.torch, "zeros", zeros)
    bad, good = step_of_two(engine)
    with pytest.raises(TraceError, match=r"no memory left .*Tried 2 GiB\.$") as caught:
        engine.report(bad)
    assert caught.value.code == "overloaded"
    assert_exact(engine, good, float64_llama)


@pytest.mark.parametrize("where", ["prepare_inputs", "layer"])
def test_faults_of_the_runner_pass(
    where: str, engine: V2Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exception is vLLM's to handle; no observer and no step stay behind."""
    fault = RuntimeError("of vLLM")

    def broken(*_: Any) -> None:
        assert (current() is None) == (where == "prepare_inputs")
        raise fault

    if where == "layer":
        engine.model.model.layers[2].register_forward_pre_hook(broken)
    else:
        monkeypatch.setattr(engine.runner, "prepare_inputs", broken)
    with pytest.raises(RuntimeError) as raised:
        engine.step({"trace": 80}, new={"trace": traced(80, (40, 80)).new})
    assert raised.value is fault
    nothing_left(engine)


def test_a_model_that_is_refused_is_served(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = traced(80, (40, 80))
    with v2_engine(tiny_llama, monkeypatch) as engine:
        expected = steps(engine, trace)
        apply_patches(monkeypatch)
        engine = V2Engine(engine.model, engine.config, engine.layout)
        del engine.model._flashtrace_taps
        found = steps(engine, trace)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    capture = adapter.existing_capture(engine.runner)
    assert capture is not None and capture.refusal == "the model was loaded without taps"
    with pytest.raises(TraceError, match="without taps") as caught:
        decode_wire(capture.recorder.collect(trace.spec.nonce)).to_report()
    assert caught.value.code == "unsupported_model"
