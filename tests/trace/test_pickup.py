"""Picking up a trace whose heads are spread over several workers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.base.records import TraceReport
from vllm_flashtrace.trace.budget import AccumulatorBudget
from vllm_flashtrace.trace.pickup import decode_status, pick_up, pick_up_now
from vllm_flashtrace.trace.wire import ModelPart, WireReport, stages, tensor_of
from vllm_flashtrace.worker.recorder import FinishedTrace, TraceFacts, TraceSums
from vllm_flashtrace.worker.traced_model import HostClock

LAYERS, CONTEXT, LENGTH = 3, 7, 9


class Rank:
    """A worker that holds the proximities of its own heads in its own layers."""

    def __init__(
        self,
        tokens: torch.Tensor,
        residual: torch.Tensor,
        ranks: int,
        first_layer: int = 0,
        layers: bool = True,
        model_layers: int = LAYERS,
    ) -> None:
        part = ModelPart(first_layer, len(tokens), model_layers, ranks)
        facts = TraceFacts(LENGTH, layers, 4, 5, 0, HostClock(), 0.0, [(0.0, 0.5)], part)
        sums = TraceSums(tokens, residual)
        self.finished: FinishedTrace | None = FinishedTrace(facts, sums, lambda: None, 1.0, 1.25)
        self.ranks = ranks

    def call(self, method: str, nonce: str, denominators: bytes = b"") -> bytes:
        assert nonce == "n"
        if method == "flashtrace_discard":
            self.finished = None
            return b""
        assert method == "flashtrace_collect"
        if self.finished is None:
            return WireReport(status="missing").encode()
        finished = self.finished
        if self.ranks > 1 and not denominators:
            return finished.totals().encode()
        self.finished = None
        sums = tensor_of(denominators, torch.float64) if denominators else None
        return finished.report(sums).encode()


def drive(ranks: Sequence[Rank], replace: dict[int, Any] | None = None) -> TraceReport:
    """Runs a pick-up; ``replace`` gives other answers of a rank to the first call."""
    others = [replace or {}]

    def call(method: str, args: tuple[Any, ...]) -> list[Any]:
        replies: list[Any] = [rank.call(method, *args) for rank in ranks]
        for rank, reply in (others.pop() if others else {}).items():
            replies[rank] = reply
        return replies

    return pick_up_now("n", call)


def proximities(heads: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.rand(heads, LAYERS, CONTEXT, generator=generator),
        torch.rand(LAYERS, generator=generator),
    )


@given(ranks=st.integers(2, 8), seed=st.integers(0, 2**16))
def test_ranks_add_up_to_one(ranks: int, seed: int) -> None:
    heads, residual = proximities(ranks, seed)
    several = [Rank(part, residual, ranks) for part in heads]
    one = Rank(heads.double().sum(0), residual, 1)
    ours, expected = drive(several), drive([one])
    assert torch.allclose(ours.scores, expected.scores, rtol=1e-6, atol=0)
    assert ours.layer_scores is not None and expected.layer_scores is not None
    assert torch.allclose(ours.layer_scores, expected.layer_scores, rtol=1e-6, atol=0)
    assert ours.scores.shape == (LENGTH,) and not ours.scores[CONTEXT:].any()
    assert (ours.recomputed_tokens, ours.cached_tokens) == (4, 5)
    assert ours.seconds == {"prefill": 0.5, "recording": 0.5, "proximity": 0.25}
    assert all(rank.finished is None for rank in several)


def test_scores_are_shares_of_the_layer() -> None:
    tokens = torch.tensor([[1.0, 3.0], [0.0, 0.0], [2.0, 2.0]])
    facts = TraceFacts(2, True, 0, 0, 0, HostClock(), 0.0, [], ModelPart(0, 3, 3))
    finished = FinishedTrace(facts, TraceSums(tokens, torch.tensor([4.0, 0.0, 0.0])), list, 0, 0)
    report = finished.report()
    assert tensor_of(report.scores, torch.float32).tolist() == [0.125 + 0.5, 0.375 + 0.5]
    assert tensor_of(report.layer_scores, torch.float32).tolist()[2:4] == [0, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["tokens", "residual"])
@pytest.mark.parametrize("call", ["report", "totals"])
def test_numbers_that_are_not_finite_are_refused(bad: float, where: str, call: str) -> None:
    sums = TraceSums(torch.ones(2, 3), torch.ones(2))
    getattr(sums, where)[1] = bad
    facts = TraceFacts(3, False, 0, 0, 0, HostClock(), 0.0, [], ModelPart(4, 2, 6))
    finished = FinishedTrace(facts, sums, lambda: None, 0.0, 0.0)
    with pytest.raises(TraceError, match="layer 5 is not finite"):
        getattr(finished, call)()


def failed(code: str) -> bytes:
    return WireReport(status="failed", code=code, message="a reason").encode()


@pytest.mark.parametrize(
    ("answers", "code"),
    [
        ({1: failed("recording_failed")}, "recording_failed"),
        ({0: WireReport(status="missing").encode(), 2: failed("overloaded")}, "overloaded"),
        ({0: WireReport(status="missing").encode()}, "result_missing"),
        ({2: None}, "result_missing"),
        ({0: WireReport(status="completed").encode()}, "result_missing"),
        ({0: WireReport(status="partial", totals=b"\0" * 8).encode()}, "result_missing"),
    ],
)
def test_a_rank_without_a_result(answers: dict[int, Any], code: str) -> None:
    heads, residual = proximities(3, 1)
    ranks = [Rank(part, residual, 3) for part in heads]
    with pytest.raises(TraceError) as caught:
        drive(ranks, answers)
    assert caught.value.code == code
    assert all(rank.finished is None for rank in ranks), "results stayed behind"


@given(
    ranks=st.integers(1, 3),
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    order=st.randoms(),
    layers=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_stages_add_up_to_one(
    ranks: int, sizes: list[int], order: Any, layers: bool, seed: int
) -> None:
    """Whatever order the workers answer in, with and without ranks that share the heads."""
    total = sum(sizes)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.rand(ranks, total, CONTEXT, generator=generator)
    residual = torch.rand(total, generator=generator)
    workers, first = [], 0
    for size in sizes:
        own = slice(first, first + size)
        for part in tokens[:, own]:
            workers.append(Rank(part, residual[own], ranks, first, layers, total))
        first += size
    order.shuffle(workers)
    one = Rank(tokens.double().sum(0), residual, 1, 0, layers, total)
    ours, expected = drive(workers), drive([one])
    assert torch.allclose(ours.scores, expected.scores, rtol=1e-6, atol=0)
    if layers:
        assert ours.layer_scores is not None and expected.layer_scores is not None
        assert ours.layer_scores.shape == (total, LENGTH)
        assert torch.allclose(ours.layer_scores, expected.layer_scores, rtol=1e-6, atol=0)
    else:
        assert ours.layer_scores is None
    assert all(worker.finished is None for worker in workers)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("ranges", "reason"),
    [
        ([(0, 2)], "2 layers of a model of 4"),
        ([(2, 2)], "layer 0 is missing"),
        ([(0, 1), (2, 2)], "layer 1 is missing"),
        ([(0, 3), (2, 2)], "layer 2 is there twice"),
        ([(0, 2), (0, 2), (2, 2)], "layer 0 is there in"),
        ([(0, 2), (2, 3)], "5 layers of a model of 4"),
    ],
)
def test_stages_that_do_not_make_one_model(
    ranges: list[tuple[int, int]], reason: str, ranks: int
) -> None:
    workers = [
        Rank(torch.rand(size, CONTEXT), torch.rand(size), ranks, first, model_layers=4)
        for first, size in ranges
        for _ in range(ranks)
    ]
    with pytest.raises(TraceError, match=reason) as caught:
        drive(workers)
    assert caught.value.code == "result_missing"
    assert len(workers) == 1 or all(worker.finished is None for worker in workers)


def test_workers_that_disagree_about_the_model() -> None:
    with pytest.raises(TraceError, match="in 2 of 1 parts"):
        stages([ModelPart(0, 2, 2, 1), ModelPart(0, 2, 2, 2)])
    with pytest.raises(TraceError, match="a model of 4, 5"):
        stages([ModelPart(0, 2, 4), ModelPart(2, 2, 5)])
    with pytest.raises(TraceError, match="3 numbers for 4 layers"):
        ModelPart(0, 2, 4).own(torch.zeros(3))


def test_scores_of_different_traces_are_not_added() -> None:
    def answer(first: int, length: int) -> bytes:
        part = ModelPart(first, 1, 2)
        return WireReport(status="completed", scores=b"\0" * 4 * length, part=part).encode()

    ranks = [Rank(torch.rand(1, CONTEXT), torch.rand(1), 1, i, model_layers=2) for i in (0, 1)]
    with pytest.raises(TraceError, match="do not belong together"):
        drive(ranks, {0: answer(0, 5), 1: answer(1, 6)})


def test_no_worker_at_all() -> None:
    with pytest.raises(TraceError) as caught:
        drive([])
    assert caught.value.code == "result_missing"


def test_one_status_of_several_workers() -> None:
    def status(**values: Any) -> bytes:
        return msgspec.msgpack.encode(values)

    merged = decode_status(
        [
            status(refusal=None, recording=1, **AccumulatorBudget(90, 9, 18).to_status()),
            status(refusal="why", recording=3, **AccumulatorBudget(70, 5, 1).to_status()),
            status(refusal=None, recording=2),
        ]
    )
    assert merged.pop("refusal") == "why" and merged.pop("recording") == 3
    assert AccumulatorBudget.from_status(merged) == AccumulatorBudget(70, 7, 14)


async def test_workers_that_answer_later() -> None:
    heads, residual = proximities(2, 5)
    ranks = [Rank(part, residual, 2) for part in heads]

    async def call(method: str, args: tuple[Any, ...]) -> list[Any]:
        await asyncio.sleep(0)
        return [rank.call(method, *args) for rank in ranks]

    ours = await pick_up("n", call)
    expected = drive([Rank(part, residual, 2) for part in heads])
    assert torch.equal(ours.scores, expected.scores)
