"""Picking up a trace whose heads are spread over several workers."""

from __future__ import annotations

import asyncio
import dataclasses
import types
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.base.records import TraceReport
from vllm_flashtrace.trace.budget import AccumulatorBudget
from vllm_flashtrace.trace.pickup import (
    CARRIED_KEY,
    carried_answer,
    decode_status,
    pick_up,
    pick_up_now,
)
from vllm_flashtrace.trace.wire import ModelPart, TraceSpec, WireReport, secret_id, stages
from vllm_flashtrace.worker.clock import HostClock, TimeSpent
from vllm_flashtrace.worker.finish import Measured
from vllm_flashtrace.worker.rank_agreement import TotalsExchange
from vllm_flashtrace.worker.recorder import Recorder
from vllm_flashtrace.worker.reports import FinishedTrace

LAYERS, CONTEXT, LENGTH = 3, 7, 9
CPU = torch.device("cpu")


class StoppedClock(HostClock):
    """Shows the time at which the scores are made."""

    def mark(self) -> float:
        return 1.25


class Rank:
    """A worker that has measured the proximities of its own heads in its own layers."""

    def __init__(
        self,
        tokens: torch.Tensor,
        residual: torch.Tensor,
        ranks: int,
        first_layer: int = 0,
        layers: bool = True,
        model_layers: int = LAYERS,
        attention: torch.Tensor | None = None,
        first_head: int = 0,
    ) -> None:
        self.part = ModelPart(first_layer, len(tokens), model_layers, ranks)
        model: Any = types.SimpleNamespace(part=self.part, device=CPU, first_head=first_head)
        self.recorder = Recorder(model, 60.0)
        self.pending = 0
        trace: Any = types.SimpleNamespace(
            spec=TraceSpec("n", LENGTH, (), 1.0, layers),
            context=CONTEXT,
            clock=StoppedClock(),
            started=0.0,
            recording=TimeSpent(),
            recomputed_tokens=4,
            cached_tokens=5,
            restarts=0,
            weights_seen=torch.tensor([7, 0]),
            attention=attention,
            mass=None,
        )
        trace.recording._seconds = 0.5
        totals = tokens.sum(1, dtype=torch.float64)
        left = residual.double()
        measured = Measured(trace, tokens.float().clone(), totals, left, totals + left, 1.0)
        self.recorder._traces["r"], self.recorder._nonces["r"] = trace, "n"
        self.recorder._measured["r"] = measured

    def call(self, method: str, nonce: str) -> bytes:
        assert nonce == "n"
        if method == "flashtrace_discard":
            self.recorder.discard(nonce)
            return b""
        assert method == "flashtrace_collect"
        self.pending -= 1
        if self.pending >= 0:
            return WireReport(status="pending").encode()
        return self.recorder.collect(nonce)

    @property
    def empty(self) -> bool:
        """Whether it keeps nothing of the trace."""
        recorder = self.recorder
        return not (recorder._measured or recorder._results or recorder._traces)


def finish(ranks: Sequence[Rank]) -> None:
    """The step that finishes the trace: ranks of a stage exchange their totals."""
    for part in {rank.part for rank in ranks}:
        members = [rank for rank in ranks if rank.part == part]
        own = [rank.recorder.totals("r") for rank in members]
        none = torch.full((part.num_layers,), torch.nan)
        total = torch.stack([none if one is None else one.float() for one in own]).sum(0)
        for rank, totals in zip(members, own, strict=True):
            shared = None
            if part.ranks > 1:
                exchange = TotalsExchange(lambda _, total=total: total, part.num_layers, 4, CPU)
                shared = {"r": exchange.add_up([totals])[0]}
            rank.recorder.score_finished(shared)


def drive(
    ranks: Sequence[Rank], replace: dict[int, Any] | None = None, *, finished: bool = False
) -> TraceReport:
    """Finishes and picks up; ``replace`` gives other answers of a rank to the first call."""
    if not finished:
        finish(ranks)
    others = [replace or {}]

    def call(method: str, args: tuple[Any, ...]) -> list[Any]:
        replies: list[Any] = [rank.call(method, *args) for rank in ranks]
        for rank, reply in (others.pop() if others else {}).items():
            replies[rank] = reply
        return replies

    return pick_up_now("n", call)


def alone() -> Rank:
    """A worker that has all heads and layers."""
    tokens, residual = proximities(4, 1)
    return Rank(tokens.sum(0), residual, ranks=1)


def test_a_result_that_came_with_its_output_is_not_asked_for() -> None:
    expected = drive([alone()])
    rank = alone()
    finish([rank])
    outgoing = rank.recorder.hand_out(["another", "r"])
    assert outgoing is not None and rank.recorder.hand_out(["r"]) is None

    def asked(method: str, args: tuple[Any, ...]) -> list[Any]:
        raise AssertionError(f"{method} was called")

    output = types.SimpleNamespace(kv_transfer_params={CARRIED_KEY: outgoing.encode()["r"]})
    report = pick_up_now("n", asked, carried_answer(output))
    assert torch.equal(report.scores, expected.scores)
    assert outgoing.encode() == {}
    assert rank.recorder.waiting_results == 0 and rank.empty
    taken = rank.recorder.buffers.allocated_bytes - sum(
        free.nbytes for free in rank.recorder.buffers._free
    )
    assert taken == 0


def test_a_result_that_is_not_on_the_host_yet_is_picked_up_later() -> None:
    rank = alone()
    finish([rank])
    stored = rank.recorder._results["n"]
    result = stored.result
    assert isinstance(result, FinishedTrace)
    under_way = dataclasses.replace(result.copied, arrived=lambda: False)
    stored.result = dataclasses.replace(result, copied=under_way)
    outgoing = rank.recorder.hand_out(["r"])
    assert outgoing is not None and outgoing.encode() == {}
    assert rank.recorder.waiting_results == 1
    stored.result = result
    assert drive([rank], finished=True).scores.sum() > 0
    assert rank.empty


def test_the_reason_of_a_failure_leaves_with_the_output_too() -> None:
    rank = alone()
    rank.recorder.fail("r", ValueError("injected"))
    outgoing = rank.recorder.hand_out(["r"])
    assert outgoing is not None
    with pytest.raises(TraceError, match="injected"):
        pick_up_now("n", lambda *_: [], outgoing.encode()["r"])
    assert rank.empty


def proximities(heads: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.rand(heads, LAYERS, CONTEXT, generator=generator),
        torch.rand(LAYERS, generator=generator),
    )


@settings(deadline=None)
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
    assert all(rank.empty for rank in several)


def test_scores_are_shares_of_the_layer() -> None:
    tokens = torch.tensor([[1.0, 3.0], [0.0, 0.0], [2.0, 2.0]])
    tokens = torch.nn.functional.pad(tokens, (0, CONTEXT - 2))
    report = drive([Rank(tokens, torch.tensor([4.0, 0.0, 0.0]), 1)])
    assert report.scores[:2].tolist() == [0.125 + 0.5, 0.375 + 0.5]
    assert report.layer_scores is not None
    assert report.layer_scores[1].tolist() == [0] * LENGTH


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["tokens", "residual"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_numbers_that_are_not_finite_are_refused(bad: float, where: str, ranks: int) -> None:
    sums = {"tokens": torch.ones(2, CONTEXT), "residual": torch.ones(2)}
    broken = {name: tensor.clone() for name, tensor in sums.items()}
    broken[where][1] = bad
    first = Rank(*broken.values(), ranks, 4, False, 6)
    others = [Rank(*sums.values(), ranks, 4, False, 6) for _ in range(ranks - 1)]
    with pytest.raises(TraceError, match="a proximity of layer 5 is not finite") as caught:
        drive([*others, first, Rank(torch.ones(4, CONTEXT), torch.ones(4), 1, 0, False, 6)])
    assert caught.value.code == "recording_failed"


@pytest.mark.parametrize("failed", [0, 1, 2])
def test_a_rank_that_failed_fails_the_trace_on_all(failed: int) -> None:
    """It gives no totals; the others do not wait for it and have no scores that would be wrong."""
    heads, residual = proximities(3, 1)
    ranks = [Rank(part, residual, 3) for part in heads]
    ranks[failed].recorder.fail("r", TraceError("recording_failed", "a reason"))
    finish(ranks)
    for rank in ranks:
        if rank is not ranks[failed]:
            [stored] = rank.recorder._results.values()
            with pytest.raises(TraceError, match="another rank has no totals of layer 0"):
                stored.result.report()  # type: ignore[union-attr]
    with pytest.raises(TraceError, match="a reason") as caught:
        drive(ranks, finished=True)
    assert caught.value.code == "recording_failed"
    assert all(rank.empty for rank in ranks)


def test_a_trace_that_ends_in_another_step_than_was_scheduled() -> None:
    heads, residual = proximities(1, 0)
    rank = Rank(heads[0], residual, 2)
    rank.recorder.score_finished({})
    with pytest.raises(TraceError, match="another step") as caught:
        drive([rank], finished=True)
    assert caught.value.code == "recording_failed"


def test_results_under_way_are_asked_for_again() -> None:
    heads, residual = proximities(3, 1)
    ranks = [Rank(part, residual, 3) for part in heads]
    for rank, times in zip(ranks, (0, 2, 1), strict=True):
        rank.pending = times
    expected = drive([Rank(part, residual, 3) for part in heads])
    assert torch.equal(drive(ranks).scores, expected.scores)
    assert all(rank.empty for rank in ranks)


def test_no_result_stays_behind_a_failure() -> None:
    heads, residual = proximities(2, 1)
    ranks = [Rank(part, residual, 2) for part in heads]
    ranks[0].pending = 9
    ranks[1].recorder.fail("r", TraceError("recording_failed", "a reason"))
    with pytest.raises(TraceError, match="a reason"):
        drive(ranks)
    assert all(rank.empty for rank in ranks)


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
    ],
)
def test_a_rank_without_a_result(answers: dict[int, Any], code: str) -> None:
    heads, residual = proximities(3, 1)
    ranks = [Rank(part, residual, 3) for part in heads]
    with pytest.raises(TraceError) as caught:
        drive(ranks, answers)
    assert caught.value.code == code
    assert all(rank.empty for rank in ranks), "results stayed behind"


@settings(deadline=None)
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
    attention = torch.rand(total, 2 * ranks, CONTEXT, generator=generator).half()
    workers, first = [], 0
    for size in sizes:
        own = slice(first, first + size)
        for rank, part in enumerate(tokens[:, own]):
            sums = attention[own, 2 * rank : 2 * rank + 2].contiguous() if layers else None
            workers.append(Rank(part, residual[own], ranks, first, layers, total, sums, 2 * rank))
        first += size
    order.shuffle(workers)
    one = Rank(tokens.double().sum(0), residual, 1, 0, layers, total)
    ours, expected = drive(workers), drive([one])
    assert (ours.attention is not None) == layers
    assert ours.attention is None or torch.equal(ours.attention, attention)
    assert torch.allclose(ours.scores, expected.scores, rtol=1e-6, atol=0)
    if layers:
        assert ours.layer_scores is not None and expected.layer_scores is not None
        assert ours.layer_scores.shape == (total, LENGTH)
        assert torch.allclose(ours.layer_scores, expected.layer_scores, rtol=1e-6, atol=0)
    else:
        assert ours.layer_scores is None
    assert all(worker.empty for worker in workers)


@pytest.mark.parametrize(
    ("heads", "reason"),
    [
        ([(0, 2), (0, 2)], "head 2 of layer 0 is not there once"),
        ([(0, 2), (3, 2)], "head 2 of layer 0 is not there once"),
        ([(0, 2), (2, 0)], "head 2 of layer 0 is not there once"),
    ],
)
def test_heads_that_do_not_make_one_layer(heads: list[tuple[int, int]], reason: str) -> None:
    tokens, residual = proximities(2, 3)
    ranks = []
    for part, (first, count) in zip(tokens, heads, strict=True):
        sums = torch.zeros(LAYERS, count, CONTEXT).half() if count else None
        ranks.append(Rank(part, residual, 2, attention=sums, first_head=first))
    with pytest.raises(TraceError, match=reason) as caught:
        drive(ranks)
    assert caught.value.code == "result_missing"


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
    assert all(worker.empty for worker in workers)


def test_workers_that_disagree_about_the_model() -> None:
    with pytest.raises(TraceError, match="in 2 of 1 parts"):
        stages([ModelPart(0, 2, 2, 1), ModelPart(0, 2, 2, 2)])
    with pytest.raises(TraceError, match="a model of 4, 5"):
        stages([ModelPart(0, 2, 4), ModelPart(2, 2, 5)])


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


def test_a_worker_with_another_secret_refuses() -> None:
    own, other = (
        msgspec.msgpack.encode({"refusal": None, "secret": secret})
        for secret in (secret_id(), "0123456789abcdef")
    )
    assert decode_status([own, own])["refusal"] is None
    for replies in ([own, other], [other, own]):
        assert "FLASHTRACE_SECRET" in decode_status(replies)["refusal"]


async def test_workers_that_answer_later() -> None:
    heads, residual = proximities(2, 5)
    ranks = [Rank(part, residual, 2) for part in heads]
    finish(ranks)

    async def call(method: str, args: tuple[Any, ...]) -> list[Any]:
        await asyncio.sleep(0)
        return [rank.call(method, *args) for rank in ranks]

    ours = await pick_up("n", call)
    expected = drive([Rank(part, residual, 2) for part in heads])
    assert torch.equal(ours.scores, expected.scores)
