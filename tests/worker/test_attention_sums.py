"""Sums of attention of traces that are recorded together, as on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreter import interpreted
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.kernels import (
    AttentionForm,
    AttentionInputs,
    KeptQueries,
    LayerKeys,
    PagedRows,
    RowSegment,
    SumsTouchedError,
    add_kept_column_sums,
    inverse_rms,
    paged_column_sums,
    triton_column_sums,
)
from vllm_flashtrace.trace.budget import ModelShape
from vllm_flashtrace.trace.wire import TraceSpec
from vllm_flashtrace.worker import finish
from vllm_flashtrace.worker.clock import HostClock
from vllm_flashtrace.worker.recorded_trace import Trace
from vllm_flashtrace.worker.step import StepRecorder
from vllm_flashtrace.worker.step_rows import BatchRow, StepRows

LAYERS, HEADS, GROUPS, DIM, HIDDEN, BLOCK = 2, 2, 1, 16, 8, 16
CPU = torch.device("cpu")
EPSILON = 1e-6
FORM = AttentionForm(scale=0.3, sliding_window=20)


class Model:
    """A model on a GPU as far as column sums go; its keys are random.

    Triton's kernels are interpreted, which takes seconds, or those of torch take their place.
    """

    batched, device, clock, measures_mass = True, CPU, HostClock(), False
    shape = ModelShape(LAYERS, HEADS, GROUPS, HIDDEN)

    def __init__(self, normed: bool, kept: bool, triton: bool = False) -> None:
        self.normed = self.scaled = normed
        self.gate_width, self._kept, self._triton = 0, kept, triton
        generator = torch.Generator().manual_seed(5)
        self.cache = torch.randn(LAYERS, 8, GROUPS, BLOCK, DIM, generator=generator)
        self.fingerprint: Any = self
        self.fails = False
        self.head_weights = torch.rand(LAYERS, HEADS, generator=generator)

    def take(self) -> Tensor:
        return torch.tensor(7)

    def heads_of(self, layer: int, query: Tensor) -> Tensor:
        return query

    def plan_rows(self, segments: Sequence[RowSegment]) -> PagedRows:
        return PagedRows.build(segments, HEADS, GROUPS, CPU)

    def keep_queries(self, rows: PagedRows) -> KeptQueries | None:
        memory = torch.empty(1 << 18, dtype=torch.uint8)
        found = KeptQueries.within(memory, rows, LAYERS, DIM, torch.float32)
        return found if self._kept else None

    def add_column_sums(
        self,
        layer: int,
        query: Tensor,
        group: StepRows,
        rows: PagedRows,
        scales: Tensor | None,
        lse: Tensor | None = None,
    ) -> None:
        if self.fails:
            raise RuntimeError("injected")
        inputs = AttentionInputs(query, self.cache[layer], rows, FORM, scales)
        if not self._triton:
            paged_column_sums(inputs, layer)
            return
        with interpreted():
            triton_column_sums.triton_column_sums(inputs, layer)

    def add_kept_column_sums(self, group: StepRows) -> None:
        assert group.kept is not None
        layers = [LayerKeys(layer, self.cache[layer], FORM) for layer in group.kept.layers]
        if not self._triton:
            add_kept_column_sums(group.kept, layers)
            return
        with interpreted():
            triton_column_sums.triton_kept_column_sums(group.kept, layers)

    def row_scales(self, layer: int, rows: PagedRows, output: Tensor, out: Tensor) -> None:
        inverse_rms(rows, output, EPSILON, out)

    def gains(self) -> Tensor:
        return torch.ones(LAYERS, HIDDEN)

    def replace_by_proximities(self, traces: Any, tables: Any, adapter: None) -> None:
        for trace in traces:
            trace.sums.column_sums.fill_(torch.nan)


class Run:
    """Two traces of 40 tokens, prefilled side by side in two steps; one asks for its attention.

    Scores of those in `heads` are by weights of heads.
    """

    def __init__(self, model: Model, heads: Sequence[int] = ()) -> None:
        self.model: Any = model
        generator = torch.Generator().manual_seed(6)
        # Of a step's tokens the first half is of the first trace.
        self.query = torch.randn(LAYERS, 2, 40, HEADS, DIM, generator=generator)
        self.output = torch.randn(LAYERS, 2, 40, HIDDEN, generator=generator)
        self.targets = [
            TargetWeights.from_mapping({i: 1.0 + i % 3 for i in [*range(9, 14), *range(22, 36)]}),
            TargetWeights.from_spans([(12, 38)]),
        ]
        specs = [
            TraceSpec.create(
                target, 40, exact_fraction=1.0, attention=number == 0, heads=number in heads
            )
            for number, target in enumerate(self.targets)
        ]
        self.traces = {str(number): Trace(spec, self.model) for number, spec in enumerate(specs)}
        self.tables = [torch.arange(first, first + 3, dtype=torch.int32) for first in (1, 4)]
        self.failed: dict[str, BaseException] = {}

    def step(self, start: int, stop: int) -> StepRecorder:
        count = stop - start
        rows = [
            BatchRow(str(number), number * count, start, stop, [table])
            for number, table in enumerate(self.tables)
        ]
        step = StepRecorder(rows, self.traces, self.model, self.failed.__setitem__)
        for layer in range(LAYERS):
            query, output = (
                part[layer, :, start:stop].flatten(0, 1) for part in (self.query, self.output)
            )
            if self.model.normed:
                step.record_residual(output)
            step.record_attention(layer, query)
            if self.model.normed:
                step.record_block(output)
            else:
                step.record_update(output, output)
        step.flush()
        step.check_complete()
        return step

    def expected(self, number: int, scaled: bool) -> Tensor:
        """By definition, float64 ``[L, H, 40]``."""
        blocks = self.model.cache[:, self.tables[number].long()].double()
        keys = blocks.transpose(1, 2).flatten(2, 3)[:, :, :40]
        keys = keys.repeat_interleave(HEADS // GROUPS, dim=1)
        logits = torch.einsum("lnhd,lhkd->lhnk", self.query[:, number].double(), keys)
        distance = torch.arange(40)[:, None] - torch.arange(40)
        hidden = (distance < 0) | (distance >= 20)
        alpha = (logits * FORM.scale).masked_fill(hidden, -torch.inf).softmax(-1)
        target = self.targets[number].normalised()
        weights = torch.zeros(LAYERS, 40, dtype=torch.float64)
        weights[:, target.positions] = target.weights.double()
        if scaled:
            weights /= (self.output[:, number].double().square().mean(-1) + EPSILON).sqrt()
        return torch.einsum("ln,lhnk->lhk", weights, alpha)


@pytest.mark.parametrize(
    ("normed", "kept", "triton"),
    [(False, True, False), (True, False, False), (True, True, True)],
    ids=["plain", "normed, layer by layer", "normed, interpreted"],
)
def test_sums_are_of_attention_itself(normed: bool, kept: bool, triton: bool) -> None:
    """Also where the method's own column sums have factors; the other trace has no more memory."""
    run = Run(Model(normed, kept, triton))
    run.step(0, 21)
    step = run.step(21, 40)
    for number, trace in enumerate(run.traces.values()):
        own = trace.sums.column_sums
        wanted = run.expected(number, normed)[..., : trace.context]
        assert torch.allclose(own.double(), wanted, rtol=1e-4, atol=1e-6)
    finish.measure(step.segments, run.model, run.failed.__setitem__)
    assert not run.failed
    asked, other = run.traces.values()
    assert other.attention is None and other.nbytes < asked.nbytes
    assert asked.attention is not None and asked.attention.dtype == torch.float16
    wanted = run.expected(0, False)[..., : asked.context]
    assert torch.allclose(asked.attention.double(), wanted, rtol=1e-3, atol=1e-6)
    assert torch.allclose(wanted.sum(-1), torch.ones(LAYERS, HEADS, dtype=torch.float64))


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("heads", [(0,), (1,), (0, 1)])
def test_scores_by_weights_of_heads_beside_others(heads: tuple[int, ...], normed: bool) -> None:
    """Their sums never have factors; those of traces beside them do, where there are any."""
    run = Run(Model(normed, kept=True), heads)
    run.step(0, 21)
    step = run.step(21, 40)
    assert len(step.groups) == (1 if len(heads) == 2 else 2)
    for number, trace in enumerate(run.traces.values()):
        wanted = run.expected(number, normed and number not in heads)[..., : trace.context]
        own = trace.sums.column_sums.double()
        assert torch.allclose(own, wanted, rtol=1e-4, atol=1e-6)
        assert trace.unscaled is None or number not in heads
    measured = finish.measure(step.segments, run.model, run.failed.__setitem__)
    assert not run.failed
    for number in heads:
        found, trace = measured[f"{number}"], run.traces[f"{number}"]
        sums = run.expected(number, False)[..., : trace.context]
        wanted = torch.einsum("lh,lhn->ln", run.model.head_weights.double(), sums)
        assert torch.allclose(found.tokens.double(), wanted, rtol=1e-4, atol=1e-6)
        assert torch.allclose(found.totals, wanted.sum(1), rtol=1e-4)
        assert not found.residual.any() and found.changes is None
        if trace.attention is not None:
            assert torch.allclose(trace.attention.double(), sums, rtol=1e-3, atol=1e-6)


def test_a_fault_in_them_fails_the_trace_that_asked() -> None:
    """The other goes on alone, and no row of it is counted twice."""
    run = Run(Model(normed=True, kept=True))
    run.model.fails = True
    run.step(0, 40)
    assert [str(error) for error in run.failed.values()] == ["injected"]
    assert list(run.failed) == ["0"]
    own = run.traces["1"].sums.column_sums.double()
    wanted = run.expected(1, True)[..., : run.traces["1"].context]
    assert torch.allclose(own, wanted, rtol=1e-4, atol=1e-6)


def test_a_fault_behind_them_fails_all_that_were_recorded_with_them() -> None:
    """They have been added by then, so the call must not be repeated."""
    run = Run(Model(normed=True, kept=True))

    def broken(self: KeptQueries, layer: int, query: Tensor) -> bool:
        raise RuntimeError("injected")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KeptQueries, "keep", broken)
        run.step(0, 40)
    assert sorted(run.failed) == ["0", "1"]
    assert not any(isinstance(error, SumsTouchedError) for error in run.failed.values())


def test_a_preempted_trace_starts_again_from_nothing() -> None:
    run = Run(Model(normed=True, kept=False))
    run.step(0, 21)
    step = run.step(0, 40)
    finish.measure(step.segments, run.model, run.failed.__setitem__)
    asked = run.traces["0"]
    assert asked.restarts == 1 and asked.attention is not None
    wanted = run.expected(0, False)[..., : asked.context]
    assert torch.allclose(asked.attention.double(), wanted, rtol=1e-3, atol=1e-6)
