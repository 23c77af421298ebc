"""What the step that finishes a trace leaves for the pick-up, and where it lies on the host."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.kernels import SumsTouchedError, paged_proximity
from vllm_flashtrace.trace.budget import ModelShape
from vllm_flashtrace.trace.wire import ModelPart, TraceSpec, decode_wire
from vllm_flashtrace.worker import finish
from vllm_flashtrace.worker.clock import HostClock, Pieces, TimeSpent
from vllm_flashtrace.worker.host_buffers import HostBuffers, host_bytes
from vllm_flashtrace.worker.rank_agreement import TotalsExchange
from vllm_flashtrace.worker.recorded_trace import Trace
from vllm_flashtrace.worker.recorder import Recorder

CPU = torch.device("cpu")
PAGE = 1 << 16
LAYERS, HEADS, HIDDEN = 5, 3, 8


class Model:
    """A worker's model whose proximities are given; it counts what is asked of it."""

    shape = ModelShape(LAYERS, HEADS, HEADS, HIDDEN)
    device, clock, part, first_head = CPU, HostClock(), ModelPart(0, LAYERS, LAYERS, 1), 0

    def __init__(self, proximities: Tensor) -> None:
        self.proximities = proximities
        self.calls = 0

    batched, normed, scaled, gate_width, measures_mass = True, False, False, 0, False

    def replace_by_proximities(self, traces: Any, tables: Any, adapter: int | None) -> None:
        self.calls += 1
        for trace in traces:
            trace.sums.column_sums[:, 0] = self.proximities
            trace.totals.copy_(self.proximities.sum(1, dtype=torch.float64))
            trace.residual.copy_(trace.sums.residual.sum(1))


def segment_of(trace: Trace, row: Any) -> Any:
    """Target rows of a trace that has one target."""
    rows = types.SimpleNamespace(sums=trace.sums, mass=None)
    return types.SimpleNamespace(trace=trace, batch_row=row, row_segment=rows)


def finished(
    recorder: Recorder, model: Any, context: int, name: str = "a", layers: bool = False
) -> str:
    """A step that records the last rows of a trace; returns its nonce."""
    weights = TargetWeights.from_spans([(context - 2, context)])
    spec = TraceSpec.create(weights, context, exact_fraction=1.0, layers=layers)
    trace = Trace(spec, model)
    trace.started, trace.next_position = 0.0, context
    trace.sums.residual.fill_(0.25)
    trace.sums.stream.fill_(1.0)
    trace.weights.note(torch.tensor(7))
    recorder._traces[name], recorder._nonces[name] = trace, spec.nonce
    row: Any = types.SimpleNamespace(req_id=name, block_tables=[torch.zeros(1, dtype=torch.int32)])
    segment = segment_of(trace, row)
    step: Any = types.SimpleNamespace(
        flush=lambda: None,
        check_complete=lambda: None,
        note_adapters=lambda: None,
        segments=[segment],
        model=model,
    )
    recorder.finish_step(step)
    recorder.score_finished()
    return spec.nonce


class Segments:
    """Traces that end in a step, and what becomes of them."""

    def __init__(self, *adapters: int | None) -> None:
        self.failed: dict[str, BaseException] = {}
        self.calls: list[tuple[int, int | None]] = []
        self.segments: list[Any] = []
        for number, adapter in enumerate(adapters):
            weights = TargetWeights.from_spans([(2, 3 + number)])
            spec = TraceSpec.create(weights, 3 + number, exact_fraction=1.0)
            trace = Trace(spec, Model(torch.zeros(0)), adapter)  # type: ignore[arg-type]
            trace.sums.residual.fill_(0.5)
            trace.stream_lacks_residual = number != 1
            table = torch.zeros(1, dtype=torch.int32)
            row = types.SimpleNamespace(req_id=f"{number}", block_tables=[table])
            self.segments.append(segment_of(trace, row))

    def measure(self, model: Any) -> list[str]:
        """The traces that do not fail."""
        stock = model.replace_by_proximities

        def replaced(traces: Any, tables: Any, adapter: int | None) -> None:
            self.calls.append((len(traces), adapter))
            stock(traces, tables, adapter)

        model.replace_by_proximities = replaced
        return sorted(finish.measure(self.segments, model, self.failed.__setitem__))


class Broken(Model):
    """Fails for a trace of five tokens, or for more than one."""

    def __init__(self, error: Exception, *, together: bool) -> None:
        super().__init__(torch.zeros(0))
        self.error, self.together = error, together

    def replace_by_proximities(self, traces: Any, tables: Any, adapter: int | None) -> None:
        if len(traces) > 1 if self.together else any(trace.tokens == 5 for trace in traces):
            raise self.error


def test_traces_of_one_projection_are_measured_together() -> None:
    """In one call; ``x`` is completed before it, once."""
    step = Segments(None, 7, None, 7)
    assert step.measure(Broken(RuntimeError(), together=False)) == ["0", "1", "3"]
    assert step.calls == [(2, None), (2, 7), (1, None), (1, None)]
    streams = [segment.trace.sums.stream for segment in step.segments]
    assert [float(stream.unique()) for stream in streams] == [0.5, 0.0, 0.5, 0.5]


def test_a_model_that_is_not_batched_is_asked_for_one_trace_at_a_time() -> None:
    step, model = Segments(None, None), Broken(RuntimeError(), together=True)
    model.batched = False
    assert step.measure(model) == ["0", "1"] and step.calls == [(1, None), (1, None)]


def test_a_fault_before_sums_are_touched_fails_the_trace_it_is_of() -> None:
    step = Segments(None, None, None)
    assert step.measure(Broken(RuntimeError("injected"), together=False)) == ["0", "1"]
    assert list(step.failed) == ["2"] and str(step.failed["2"]) == "injected"
    step = Segments(None, None, None)
    assert step.measure(Broken(RuntimeError("injected"), together=True)) == ["0", "1", "2"]
    assert step.calls == [(3, None), (1, None), (1, None), (1, None)] and not step.failed


def test_a_fault_after_sums_were_touched_fails_all_of_the_call() -> None:
    """What is there is no column sums any more."""
    fault = SumsTouchedError("of the call")
    fault.__cause__ = ValueError("injected")
    step = Segments(None, None, 7)
    assert step.measure(Broken(fault, together=True)) == ["2"]
    assert step.calls == [(2, None), (1, 7)]
    assert step.failed == {"0": fault.__cause__, "1": fault.__cause__}


@pytest.mark.parametrize("layers", [False, True])
@pytest.mark.parametrize("context", [3, paged_proximity._TOKENS_AT_ONCE + 5])
def test_scores_are_exact(layers: bool, context: int) -> None:
    """Against float64; the proximities lie where the column sums were."""
    generator = torch.Generator().manual_seed(context)
    proximities = torch.rand(LAYERS, context, generator=generator) ** 8
    proximities[2] = 0
    model: Any = Model(proximities.clone())
    recorder = Recorder(model, 60.0)
    report = decode_wire(
        recorder.collect(finished(recorder, model, context, layers=layers))
    ).to_report()
    residual = HIDDEN * 0.25
    exact = proximities.double()
    exact = exact / (exact.sum(1) + residual)[:, None]
    assert torch.allclose(report.scores.double(), exact.sum(0), rtol=1e-6, atol=0)
    assert (report.layer_scores is not None) == layers
    if report.layer_scores is not None:
        assert torch.allclose(report.layer_scores.double(), exact, rtol=1e-6, atol=0)


def test_a_pick_up_does_nothing_with_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits is ``[N]`` and a few numbers per layer, made before anybody asks."""
    context = 40_000
    model: Any = Model(torch.rand(LAYERS, context))
    recorder = Recorder(model, 60.0)
    nonce = finished(recorder, model, context)
    [stored] = recorder._results.values()
    kept = [tuple(one.shape) for one in stored.result.copied.tensors]  # type: ignore[union-attr]
    assert kept == [(1, context), (1, LAYERS), (2,)]
    assert recorder.buffers.allocated_bytes <= host_bytes(context, LAYERS) + PAGE
    calls = model.calls
    monkeypatch.setattr(finish, "sum_shares", None)
    assert decode_wire(recorder.collect(nonce)).to_report().scores.shape == (context,)
    assert model.calls == calls == 1 and recorder.accumulator_bytes == 0


def test_a_result_under_way_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    arrived = [False]
    monkeypatch.setattr(HostBuffers, "_mark", lambda self: lambda: arrived[0])
    model: Any = Model(torch.rand(LAYERS, 30))
    recorder = Recorder(model, 60.0)
    nonce = finished(recorder, model, 30)
    for _ in range(2):
        assert decode_wire(recorder.collect(nonce)).status == "pending"
    arrived[0] = True
    assert decode_wire(recorder.collect(nonce)).status == "completed"
    with pytest.raises(TraceError, match="no result"):
        decode_wire(recorder.collect(nonce))


def test_buffers_are_allocated_once() -> None:
    model: Any = Model(torch.rand(LAYERS, 100))
    recorder = Recorder(model, 60.0)
    recorder.buffers.reserve(2, host_bytes(100, LAYERS))
    assert recorder.buffers.allocated_bytes == 2 * PAGE
    for _ in range(3):
        nonces = [finished(recorder, model, 100, name) for name in "ab"]
        recorder.collect(nonces[0])
        recorder.discard(nonces[1])
        assert recorder.buffers.allocated_bytes == 2 * PAGE
    expired = finished(recorder, model, 100)
    recorder._results[expired].expires = 0.0
    recorder.expire()
    assert len(recorder.buffers._free) == 2


def test_results_that_nobody_picks_up_make_room() -> None:
    model: Any = Model(torch.rand(LAYERS, 20_000))
    recorder = Recorder(model, 60.0)
    recorder.buffers = HostBuffers(CPU, recorder._evict, 5 * PAGE)
    first, second, third = (finished(recorder, model, 20_000, name) for name in "abc")
    assert recorder.buffers.allocated_bytes == 4 * PAGE
    with pytest.raises(TraceError, match="needed its room") as caught:
        decode_wire(recorder.collect(first)).to_report()
    assert caught.value.code == "result_missing"
    for nonce in (second, third):
        assert decode_wire(recorder.collect(nonce)).to_report().scores.shape == (20_000,)


def test_small_free_buffers_make_room_for_a_large_one() -> None:
    buffers = HostBuffers(CPU, lambda: False, 4 * PAGE)
    buffers.reserve(9, 1)
    assert buffers.allocated_bytes == 4 * PAGE
    copied = buffers.copy([torch.arange(3 * PAGE, dtype=torch.uint8)])
    assert len(copied.buffer) == 3 * PAGE and buffers.allocated_bytes == 4 * PAGE
    with pytest.raises(TraceError, match="has no room on the host") as caught:
        buffers.copy([torch.zeros(2 * PAGE, dtype=torch.uint8)])
    assert caught.value.code == "overloaded"


def test_a_result_that_is_too_large_for_the_host_fails_alone() -> None:
    model: Any = Model(torch.rand(LAYERS, 30_000))
    recorder = Recorder(model, 60.0)
    recorder.buffers = HostBuffers(CPU, recorder._evict, 3 * PAGE)
    with pytest.raises(TraceError) as caught:
        decode_wire(recorder.collect(finished(recorder, model, 30_000, layers=True))).to_report()
    assert caught.value.code == "overloaded"
    assert (
        decode_wire(recorder.collect(finished(recorder, model, 30_000))).to_report().scores.sum()
        > 0
    )


def test_copies_of_rows_that_lie_apart() -> None:
    buffers = HostBuffers(CPU, lambda: False)
    source = torch.rand(3, 2, 5)
    odd, apart = torch.rand(3, dtype=torch.float64), source[:, 1]
    copied = buffers.copy([odd, apart])
    assert torch.equal(copied.tensors[0], odd) and torch.equal(copied.tensors[1], apart)
    assert copied.tensors[1].is_contiguous()


def test_a_rank_that_cannot_give_its_totals_is_waited_for_by_nobody() -> None:
    """It takes part all the same, with NaN."""
    seen = []
    exchange = TotalsExchange(lambda mine: seen.append(mine.clone()) or mine * 2, 2, 4, CPU)
    sums = exchange.add_up([torch.tensor([1.0, 2.0]), None, torch.zeros(7)])
    assert seen[0].shape == (6,) and seen[0].dtype == torch.float32
    assert sums[0].tolist() == [2, 4]
    assert sums[1].isnan().all() and sums[2].isnan().all()


class LateClock(HostClock):
    """A device that has passed some marks only; asking for the time before that is an error."""

    reached = 0.0

    def passed(self, mark: float) -> bool:
        return mark <= self.reached

    def seconds(self, start: float, stop: float) -> float:
        assert stop <= self.reached
        return stop - start


def test_time_of_recording_is_added_up_step_by_step() -> None:
    """Steps that the device has passed are one number by the time of the pick-up."""
    clock, spent, shared = LateClock(), TimeSpent(), TimeSpent()
    for step in range(4):
        spent.fold()
        pieces = Pieces(clock)
        spent.include(pieces)
        shared.include(pieces)
        for layer in range(3):
            pieces.add(float(10 * step + layer), 10 * step + layer + 0.5)
        clock.reached = 10.0 * step  # One step behind.
    assert len(spent._steps) == 2
    clock.reached = 100.0
    assert spent.seconds() == shared.seconds() == spent.seconds() == 4 * 3 * 0.5
