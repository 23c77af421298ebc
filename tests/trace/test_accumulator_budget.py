"""What traces may hold: the price list, the worker's last line, and batches of offline jobs."""

from __future__ import annotations

import dataclasses
import types
from types import SimpleNamespace
from typing import Any

import msgspec
import psutil
import pytest
import torch

from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.core.hops import FurtherHops, HopRecursion, TracedTarget
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.offline.jobs import TraceJob, run_jobs
from vllm_flashtrace.trace import hop
from vllm_flashtrace.trace.budget import AccumulatorBudget, ModelShape, part_of_memory
from vllm_flashtrace.trace.config import FlashTraceConfig
from vllm_flashtrace.trace.wire import (
    TraceSpec,
    WireReport,
    decode_wire,
    seal,
    tensor_bytes,
    unseal,
)
from vllm_flashtrace.worker.clock import HostClock
from vllm_flashtrace.worker.kept_rows import KeptRows
from vllm_flashtrace.worker.recorded_trace import Trace
from vllm_flashtrace.worker.recorder import Recorder

SHAPE = ModelShape(num_layers=3, num_heads=4, num_kv_heads=2, hidden_size=16)
BUDGET = AccumulatorBudget.of_model(10_000, SHAPE)
MODEL: Any = types.SimpleNamespace(
    shape=SHAPE, device=torch.device("cpu"), clock=HostClock(), measures_mass=False
)


def spec(context: int, attention: bool = False) -> TraceSpec:
    weights = TargetWeights.from_spans([(context - 2, context)])
    return TraceSpec.create(weights, context, exact_fraction=1.0, attention=attention)


@pytest.mark.parametrize("context", [2, 3, 100, 1001])
def test_the_price_is_what_a_trace_takes(context: int) -> None:
    trace = Trace(spec(context), MODEL)
    assert BUDGET.cost(context) == trace.nbytes
    for scaled in (False, True):
        model: Any = types.SimpleNamespace(**vars(MODEL), scaled=scaled)
        budget = AccumulatorBudget.of_model(10_000, SHAPE, scaled=scaled)
        asked = Trace(spec(context, attention=True), model)
        assert budget.cost(context, attention=True) == asked.nbytes > trace.nbytes


KEEPING = AccumulatorBudget.of_model(60_000, SHAPE, KeptRows.row_bytes(SHAPE, 8, torch.float32))


@pytest.mark.parametrize("rows", [1, 10])
def test_the_price_of_rows_is_what_they_take(rows: int) -> None:
    further = FurtherHops(torch.arange(20, 20 + rows), 2)
    target = TargetWeights.from_spans([(95, 97)])
    keeping = TraceSpec.create([TracedTarget(target, further)], 97, exact_fraction=1.0)
    model: Any = types.SimpleNamespace(
        **vars(MODEL), keep_rows=lambda p, _: KeptRows(p, SHAPE, 8, torch.float32, "cpu")
    )
    trace = Trace(keeping, model)
    assert keeping.kept_rows == rows + 2
    assert KEEPING.cost(97, rows + 2) == trace.nbytes


@pytest.mark.parametrize("width", [1, 8])
def test_the_price_of_gates_and_of_layers_that_are_not_traced(width: int) -> None:
    shape = dataclasses.replace(SHAPE, sums_per_head=width, other_layers=2)
    sizes = shape, 8, torch.float32
    budget = AccumulatorBudget.of_model(
        60_000, shape, KeptRows.row_bytes(*sizes, gate_width=width), scaled=True
    )
    model: Any = types.SimpleNamespace(
        **{**vars(MODEL), "shape": shape, "scaled": True},
        keep_rows=lambda p, _: KeptRows(p, *sizes, "cpu", gate_width=width),
    )
    assert budget.cost(100, attention=True) == Trace(spec(100, attention=True), model).nbytes
    target = TracedTarget(
        TargetWeights.from_spans([(95, 97)]), FurtherHops(torch.arange(20, 30), 2)
    )
    keeping = Trace(TraceSpec.create([target], 97, exact_fraction=1.0), model)
    assert budget.cost(97, 12) == keeping.nbytes


@pytest.mark.parametrize("width", [0, 1, 8])
def test_weights_of_heads_take_no_more_than_proximities(width: int) -> None:
    """No sums with factors, no stream of kept rows: it is the price of any other trace, or less."""
    shape = dataclasses.replace(SHAPE, sums_per_head=max(1, width))
    sizes = shape, 8, torch.float32
    row_bytes = KeptRows.row_bytes(*sizes, gate_width=width)
    budget = AccumulatorBudget.of_model(60_000, shape, row_bytes, scaled=width > 0)
    model: Any = types.SimpleNamespace(
        **{**vars(MODEL), "shape": shape, "scaled": width > 0},
        keep_rows=lambda p, alone: KeptRows(p, *sizes, "cpu", stream=not alone),
        head_weights=torch.ones(shape.num_layers, shape.num_heads),
    )
    weights = TargetWeights.from_spans([(95, 97)])
    further = TracedTarget(weights, FurtherHops(torch.arange(20, 30), 2))
    for target, attention in ((TracedTarget(weights), True), (further, False)):
        asked = TraceSpec.create([target], 97, exact_fraction=1.0, attention=attention, heads=True)
        trace = Trace(asked, model)
        cost = budget.cost(97, asked.kept_rows, attention=attention)
        assert trace.nbytes <= cost
        assert trace.unscaled is None
        assert trace.sums.column_sums.shape == (shape.num_layers, shape.num_heads, 97)
    model.head_weights = None
    with pytest.raises(TraceError, match="no weights of heads"):
        Trace(asked, model)


def test_a_trace_keeps_rows_where_others_have_room_beside_it() -> None:
    assert KEEPING.keeps(100, 10)
    assert not KEEPING.keeps(100, 1000)
    assert not BUDGET.keeps(100, 1)  # Its workers keep none.
    assert AccumulatorBudget.from_status(KEEPING.to_status()) == KEEPING
    half = dataclasses.replace(KEEPING, limit_bytes=30_000)
    assert AccumulatorBudget.tightest([half, KEEPING]) == half


def plan(hops: int, include: tuple[str, ...] = ()) -> Any:
    [one] = job(100, hops).plans
    one.request.include = include  # type: ignore[misc]
    return one


def test_rows_are_kept_for_two_hops_and_more() -> None:
    def kept_rows(one: Any, budget: AccumulatorBudget | None) -> int:
        [visit] = hop.visits([one], budget)
        return visit.kept_rows

    assert kept_rows(plan(2), KEEPING) == 4  # Two of reasoning, two of the target.
    assert kept_rows(plan(1), KEEPING) == 0
    assert kept_rows(plan(2, ("layers",)), KEEPING) == 0
    assert kept_rows(plan(2, ("attention",)), KEEPING) == 0
    assert kept_rows(plan(2), BUDGET) == kept_rows(plan(2), None) == 0
    assert kept_rows(plan(2), dataclasses.replace(KEEPING, limit_bytes=30_000)) == 0


def test_targets_are_visited_together_as_far_as_rows_have_room() -> None:
    plans = [plan(0) for _ in range(5)]
    assert [len(visit.plans) for visit in hop.visits(plans, KEEPING)] == [5]
    [visit] = hop.visits(plans, KEEPING)
    assert visit.kept_rows == 2  # The targets are the same.
    call = visit.next_call(FlashTraceConfig(), hop.EngineContext())
    assert call is not None and len(call.spec.targets) == 5
    assert [len(visit.plans) for visit in hop.visits(plans, BUDGET)] == [1] * 5
    apart = [*plans[:2], targeting(10), targeting(20)]
    room = KEEPING.cost(100, 4) * 4
    tight = dataclasses.replace(KEEPING, limit_bytes=room)
    assert [len(visit.plans) for visit in hop.visits(apart, tight)] == [3, 1]


def targeting(position: int) -> Any:
    """A plan whose target is two other tokens."""
    one = plan(0)
    target = TargetWeights.from_spans([(position, position + 2)])
    one.recursion = HopRecursion(target, 5, 100, torch.zeros(100, dtype=torch.bool), hops=0)
    return one


def test_a_worker_that_keeps_no_rows_refuses_further_hops() -> None:
    recorder = Recorder(MODEL, 60.0, BUDGET)
    further = FurtherHops(torch.arange(20, 30), 2)
    target = TargetWeights.from_spans([(95, 97)])
    keeping = TraceSpec.create([TracedTarget(target, further)], 97, exact_fraction=1.0)
    recorder.register("a", seal(keeping), 97)
    with pytest.raises(TraceError, match="each hop by itself"):
        decode_wire(recorder.collect(keeping.nonce)).to_report()


@pytest.mark.parametrize(
    "positions",
    [[], [3, 3], [4, 2], [-1, 2], [98]],
    ids=["none", "twice", "falling", "-1", "behind"],
)
def test_bad_further_hops_are_refused(positions: list[int]) -> None:
    further = FurtherHops(torch.tensor(positions, dtype=torch.int64), 2)
    target = TargetWeights.from_spans([(95, 97)])
    keeping = TraceSpec.create([TracedTarget(target, further)], 97, exact_fraction=1.0)
    with pytest.raises(ValueError, match="further hops do not fit"):
        unseal(seal(keeping)).traced_targets()


def test_status_carries_the_budget() -> None:
    assert AccumulatorBudget.from_status(BUDGET.to_status()) == BUDGET
    assert AccumulatorBudget.from_status({"refusal": None}) is None
    assert BUDGET.shared_by(3).limit_bytes == 3333
    assert BUDGET.shared_by(3).cost(50) == BUDGET.cost(50)


def test_the_default_limit_comes_from_the_machine() -> None:
    assert part_of_memory() == psutil.virtual_memory().total // 16


@pytest.mark.parametrize(
    "option",
    [
        {"max_accumulator_mib": 0},
        {"max_accumulator_mib": 1.5},
        {"trace_token_share": 0},
        {"trace_token_share": 1.01},
        {"max_waiting_seconds": 0},
    ],
)
def test_bad_options_are_named(option: dict[str, Any]) -> None:
    [name] = option
    with pytest.raises(ValueError, match=rf"additional_config\.flashtrace\.{name}"):
        FlashTraceConfig.from_additional_config({"flashtrace": option})


def test_good_options() -> None:
    options = {"max_accumulator_mib": None, "trace_token_share": 1, "max_waiting_seconds": 0.5}
    config = FlashTraceConfig.from_additional_config({"flashtrace": options})
    assert (config.max_accumulator_mib, config.trace_token_share) == (None, 1.0)


def test_a_worker_refuses_what_does_not_fit_beside_the_others() -> None:
    recorder = Recorder(MODEL, 60.0, BUDGET)
    half, more = spec(95), spec(96)
    for name, one in (("a", half), ("b", half), ("c", more)):
        recorder.register(name, seal(one), one.length)
    assert recorder.active_requests == {"a", "b"}
    assert recorder.accumulator_bytes <= BUDGET.limit_bytes
    with pytest.raises(
        TraceError, match=r"96 tokens needs 4992 bytes.*9888 bytes are tak"
    ) as caught:
        decode_wire(recorder.collect(more.nonce)).to_report()
    assert caught.value.code == "overloaded"
    recorder.drop(["a"])
    recorder.register("d", seal(spec(96)), 96)
    assert recorder.active_requests == {"b", "d"}


class FakeLLM:
    """Answers every trace with made-up scores and keeps the lengths of each batch."""

    llm_engine = SimpleNamespace(
        vllm_config=SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=8))
    )

    def __init__(self, budget: AccumulatorBudget | None, scores: Any = torch.ones) -> None:
        self.status = {"refusal": None, **(budget.to_status() if budget else {})}
        self.scores = scores
        self.batches: list[list[int]] = []
        self._specs: dict[str, TraceSpec] = {}

    def generate(
        self, prompts: list[Any], params: list[Any], use_tqdm: bool, lora_request: list[Any]
    ) -> list[Any]:
        self.batches.append([len(prompt["prompt_token_ids"]) for prompt in prompts])
        for each in params:
            one = unseal(each.extra_args["flashtrace"])
            self._specs[one.nonce] = one
        return [object()] * len(prompts)  # They carry no results.

    def collect_rpc(self, nonce: str) -> bytes:
        length = self._specs.pop(nonce).length
        return WireReport(status="completed", scores=tensor_bytes(self.scores(length))).encode()

    def collective_rpc(self, method: str, args: tuple[str, ...] = ()) -> list[bytes]:
        if method == "flashtrace_status":
            return [msgspec.msgpack.encode(self.status)]
        return [self.collect_rpc(*args)]


def job(length: int, hops: int = 0) -> TraceJob:
    """As much of a plan as running its hops needs."""
    mask = torch.zeros(length, dtype=torch.bool)
    mask[length - 4 : length - 2] = True
    recursion = HopRecursion(
        TargetWeights.from_spans([(length - 2, length)]), length - 4, length, mask, hops=hops
    )
    plan: Any = types.SimpleNamespace(
        token_ids=list(range(length)),
        recursion=recursion,
        request=types.SimpleNamespace(include=(), weighting="equal", heads=False),
    )
    return TraceJob(completion=None, trace_id="ft-1", plans=[plan])  # type: ignore[arg-type]


def test_offline_batches_fit_places_and_memory() -> None:
    llm = FakeLLM(BUDGET)
    jobs = [job(length) for length in (95, 95, 10, 10, 10, 300, 150)]
    run_jobs(jobs, llm, FlashTraceConfig(max_concurrent_traces=3))
    # 300 tokens never fit; everything else does, in order.
    assert llm.batches == [[95, 95], [10, 10, 10], [150]]
    assert [each.error.code if each.error else None for each in jobs] == [
        *[None] * 5,
        "overloaded",
        None,
    ]
    assert jobs[5].outcome()["status"] == "skipped"


def test_offline_without_a_budget_only_places_count() -> None:
    llm = FakeLLM(None)
    run_jobs([job(500, hops=1) for _ in range(3)], llm, FlashTraceConfig(max_concurrent_traces=2))
    assert llm.batches == [[500, 500], [500], [498, 498], [498]]


@pytest.mark.parametrize(
    "scores", [torch.zeros, lambda n: torch.ones(n + 1), lambda n: torch.full((n,), -1.0)]
)
def test_offline_scores_that_the_recursion_refuses(scores: Any) -> None:
    one = job(50)
    run_jobs([one], FakeLLM(None, scores), FlashTraceConfig())
    assert one.error is not None
    assert one.error.code == "bad_scores"


def test_the_tightest_of_several_workers_admits_only_what_all_can_hold() -> None:
    """Stages with more layers pay more per token, and memory may differ."""
    stages = [AccumulatorBudget(1000, 10, 50), AccumulatorBudget(700, 6, 91)]
    tightest = AccumulatorBudget.tightest(stages)
    assert tightest == AccumulatorBudget(700, 7, 91)
    for context in range(120):
        if tightest.cost(context) <= tightest.limit_bytes:
            assert all(one.cost(context) <= one.limit_bytes for one in stages)
    assert AccumulatorBudget.tightest([BUDGET, BUDGET]) == BUDGET
    assert AccumulatorBudget.tightest([AccumulatorBudget(0, 3, 4), BUDGET]).limit_bytes == 0


@pytest.mark.parametrize(("sequences", "places"), [(8, 8), (128, 32), (256, 64), (1024, 64)])
def test_places_follow_the_engines_sequences(sequences: int, places: int) -> None:
    engine = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=sequences))
    assert FlashTraceConfig().concurrent_traces(engine) == places
    assert FlashTraceConfig(max_concurrent_traces=3).concurrent_traces(engine) == 3
