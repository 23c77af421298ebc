"""Cost at scale, on paper and in simulation, without an engine."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import capacity, capacity_tables, gpu_timing
from benchmarks.capacity_constants import ASSUMED, DATA_SHEET, GPUS, Constants, from_data_sheet
from benchmarks.capacity_fit import from_committed_results, nonnegative_fit
from benchmarks.capacity_lengths import PRESETS, Lengths, read_lengths
from benchmarks.capacity_model import (
    Cost,
    Hop,
    Setting,
    completion_seconds,
    hops_of,
    trace_seconds,
    visible_pairs,
)
from benchmarks.capacity_shapes import SHAPES
from benchmarks.capacity_simulation import Cluster, Outcome, simulate
from vllm_flashtrace.trace.budget import AccumulatorBudget, ModelShape

pytestmark = pytest.mark.timeout(60)

BUDGET = 2048
PUBLISHED_PARAMETERS = {
    "SmolLM2-135M": 134.5e6,
    "Llama-3.1-8B": 8.03e9,
    "Qwen3-8B": 8.2e9,
    "Qwen3-32B": 32.8e9,
    "Llama-3.1-70B": 70.6e9,
    "Qwen2.5-72B": 72.7e9,
}

EIGHT = from_data_sheet(SHAPES["Llama-3.1-8B"], GPUS["H100"], 1, compute=0.4, memory=0.7)
lengths = st.builds(Lengths, st.integers(1, 5000), st.integers(0, 1000), st.integers(1, 500))
seconds = st.floats(1e-9, 1e-2)
constants = st.builds(
    Constants,
    name=st.just("any"),
    basis=st.just(ASSUMED),
    source=st.just("drawn"),
    gpus=st.integers(1, 8),
    block_size=st.sampled_from([16, 128]),
    kv_tokens=st.none() | st.integers(6500, 50_000),
    step_seconds=seconds,
    decode_step_seconds=seconds,
    token_seconds=seconds,
    pair_seconds=st.floats(0, 1e-6),
    decode_token_seconds=seconds,
    context_seconds=st.floats(0, 1e-6),
    recording_pair_seconds=st.floats(0, 1e-6),
    hop_seconds=seconds,
    hop_context_seconds=st.floats(0, 1e-5),
)


def poisson(rate: float, count: int) -> list[float]:
    source = random.Random(0)
    return list(accumulate(source.expovariate(rate) for _ in range(count)))


# On paper


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_the_published_number_of_parameters(name: str) -> None:
    assert SHAPES[name].parameters == pytest.approx(PUBLISHED_PARAMETERS[name], rel=0.005)


def test_memory_is_what_the_budget_counts() -> None:
    for row in capacity.memory_rows(8):
        shape = ModelShape(
            row["layers"], row["heads"] // row["ranks"], row["kv_heads"], row["hidden"]
        )
        budget = AccumulatorBudget.of_model(0, shape)
        for context, held in row["trace_bytes"].items():
            assert held == budget.cost(int(context))
        assert row["concurrent_bytes"] == 8 * budget.cost(131_072)
    # By hand: 80 layers, 64 / 4 heads and 2 * 8192 numbers a layer, in float32.
    seventy = next(r for r in capacity.memory_rows(1) if (r["model"], r["ranks"])[1] == 4)
    assert seventy["concurrent_bytes"] == 4 * (80 * 16 * 131_072 + 80 * 2 * 8192)


def test_best_rates_are_those_of_the_gpu_benchmarks() -> None:
    for name, device in (("H100", "NVIDIA H100 80GB HBM3"), ("H200", "NVIDIA H200")):
        peak, gpu = gpu_timing._PEAKS[device], GPUS[name]
        assert (peak.flops, peak.bytes) == (gpu.flops, gpu.bytes_per_second)


def test_hops_recompute_from_the_start_of_a_block() -> None:
    assert hops_of(Lengths(380, 200, 20), 128, 1) == [Hop(512, 580, 600), Hop(256, 380, 580)]
    assert hops_of(Lengths(100, 0, 20), 16, 3) == [Hop(96, 100, 120)]
    assert [hop.recomputed for hop in hops_of(Lengths(380, 200, 20), 128, 2)] == [88, 324, 324]


@given(st.integers(0, 200), st.integers(0, 200))
def test_pairs_are_counted_exactly(first: int, end: int) -> None:
    assert visible_pairs(first, end) == sum(i + 1 for i in range(first, end))


@given(constants, st.lists(lengths, min_size=1, max_size=5), st.floats(0, 1), st.floats(0, 1))
def test_cost_grows_with_the_traced_share(
    one: Constants, traffic: list[Lengths], share: float, other: float
) -> None:
    cost = Cost.of(one, traffic, Setting(64, BUDGET, 1, 2.0))
    low, high = sorted((share, other))
    assert cost.completion == cost.seconds(0) <= cost.seconds(low) <= cost.seconds(high)
    assert cost.seconds(1) == cost.completion + cost.trace
    assert cost.trace > 0


@given(constants, lengths, st.integers(1, 64))
def test_a_larger_batch_and_fewer_hops_cost_less(
    one: Constants, request: Lengths, batch: int
) -> None:
    alone = completion_seconds(one, request, batch=1, budget=BUDGET)
    assert completion_seconds(one, request, batch=batch, budget=BUDGET) <= alone
    costs = [trace_seconds(one, request, hops=hops, budget=BUDGET) for hops in range(3)]
    assert costs == sorted(costs)
    assert (costs[0] < costs[1]) == (request.reasoning > 0)


def test_dollars() -> None:
    cost = Cost(completion=1.8, trace=0.36, batch=1, gpus=4)
    setting = Setting(1, BUDGET, 1, dollars_per_gpu_hour=2.0)
    assert cost.dollars_per_million(cost.seconds(0), setting) == pytest.approx(4000)
    assert cost.dollars_per_million(cost.seconds(0.5), setting) == pytest.approx(4400)
    with pytest.raises(ValueError, match="share"):
        cost.seconds(1.1)


def test_the_data_sheet_is_a_lower_bound_and_says_what_it_is() -> None:
    best = from_data_sheet(SHAPES["Llama-3.1-8B"], GPUS["H100"], 1, compute=1, memory=1)
    assert (best.basis, EIGHT.basis) == (DATA_SHEET, ASSUMED)
    assert best.token_seconds == pytest.approx(0.4 * EIGHT.token_seconds)
    assert best.decode_step_seconds == pytest.approx(0.7 * EIGHT.decode_step_seconds)
    # 16.06 GB of weights at 3.35 TB/s.
    assert best.decode_step_seconds == pytest.approx(4.79e-3, rel=0.01)
    with pytest.raises(ValueError, match="does not fit"):
        from_data_sheet(SHAPES["Llama-3.1-70B"], GPUS["H100"], 1, compute=1, memory=1)


def test_constants_survive_json_and_refuse_what_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "constants.json"
    path.write_text(json.dumps(EIGHT.to_dict()))
    assert Constants.read(path) == EIGHT
    path.write_text(json.dumps({"constants": EIGHT.to_dict()}))
    assert Constants.read(path) == EIGHT
    with pytest.raises(ValueError, match="frob"):
        Constants.from_dict(EIGHT.to_dict() | {"frob": 1})
    with pytest.raises(ValueError, match="token_seconds"):
        replace(EIGHT, token_seconds=-1.0)
    with pytest.raises(ValueError, match="basis"):
        replace(EIGHT, basis="guessed")


def test_lengths_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "lengths.jsonl"
    path.write_text('{"prompt": 9, "reasoning": 2, "output": 3}\n\n{"prompt": 1, "output": 1}\n')
    assert read_lengths(path) == [Lengths(9, 2, 3), Lengths(1, 0, 1)]
    for bad in ("[1]", '{"prompt": 0, "output": 1}', "x", '{"prompt": 1}'):
        path.write_text(f'{{"prompt": 1, "output": 1}}\n{bad}\n')
        with pytest.raises(ValueError, match="line 2"):
            read_lengths(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="no lengths"):
        read_lengths(path)


@pytest.mark.parametrize("kind", PRESETS)
def test_presets_have_their_medians_and_fit(kind: str) -> None:
    drawn = PRESETS[kind].draw(2001, 0)
    assert drawn == PRESETS[kind].draw(2001, 0)
    assert max(one.context for one in drawn) <= 131_072
    middle = sorted(one.prompt for one in drawn)[1000]
    assert middle == pytest.approx(PRESETS[kind].prompt.median, rel=0.1)
    assert max(one.context for one in PRESETS[kind].draw(100, 0, 512)) <= 512


def test_a_fit_finds_what_made_the_values_and_is_never_negative() -> None:
    features = [[1, n, n * n] for n in (1, 3, 10, 40, 200)]
    found = nonnegative_fit(features, [0.5 + 0.02 * n * n for _, n, _ in features])
    assert found.coefficients == pytest.approx([0.5, 0, 0.02], abs=1e-6)
    assert found.worst < 1e-6
    falling = nonnegative_fit([[1, 1], [1, 2], [1, 3]], [3.0, 2.0, 1.0])
    assert min(falling.coefficients) >= 0
    with pytest.raises(ValueError, match="positive"):
        nonnegative_fit([[1.0]], [0.0])


def test_committed_results_give_the_seconds_they_hold() -> None:
    fitted, worst = from_committed_results(capacity.RESULTS)
    data = json.loads((capacity.RESULTS / "trace_latency.json").read_text())
    for row in data["rows"]:
        prompt = row["context"] - row["reasoning"] - row["output"]
        request = Lengths(prompt, row["reasoning"], row["output"])
        predicted = trace_seconds(fitted, request, hops=1, budget=BUDGET)
        assert predicted == pytest.approx(row["seconds"], rel=max(worst.values()))


# In simulation


def served(outcome: Outcome, count: int) -> None:
    """Each request was finished once, in order, and attributed exactly if it was to be."""
    assert len({id(job) for job in outcome.jobs}) == count
    for job in outcome.jobs:
        assert job.arrived < job.finished
        assert (job.attributed > job.finished) is job.traced
        assert job.prefilled == job.lengths.prompt
        assert job.generated == job.lengths.generated


@settings(deadline=None, max_examples=150)
@given(
    constants,
    st.lists(st.tuples(lengths, st.booleans()), min_size=1, max_size=8),
    st.builds(
        Cluster,
        replicas=st.integers(1, 3),
        max_num_seqs=st.integers(1, 8),
        max_num_batched_tokens=st.sampled_from([64, 2048]),
        max_concurrent_traces=st.integers(1, 3),
        trace_token_share=st.floats(0.1, 1),
        hops=st.integers(0, 2),
    ),
    st.integers(1, 6) | st.floats(0.01, 100),
)
def test_requests_are_conserved(
    one: Constants, requests: list[tuple[Lengths, bool]], cluster: Cluster, load: float
) -> None:
    if isinstance(load, int):
        outcome = simulate(one, cluster, requests, concurrency=load)
    else:
        outcome = simulate(one, cluster, requests, arrivals=poisson(load, len(requests)))
    served(outcome, len(requests))
    assert 0 <= outcome.utilisation <= 1 + 1e-9


@settings(deadline=None, max_examples=150)
@given(constants, lengths, st.sampled_from([64, 2048]), st.integers(0, 2))
def test_a_lone_request_takes_the_analytic_time(
    one: Constants, request: Lengths, budget: int, hops: int
) -> None:
    cluster = Cluster(max_num_seqs=4, max_num_batched_tokens=budget, hops=hops)
    outcome = simulate(one, cluster, [(request, True)], arrivals=[1.0])
    expected = completion_seconds(one, request, batch=1, budget=budget)
    assert outcome.completion_latencies() == [pytest.approx(expected, rel=1e-6)]
    lag = trace_seconds(one, request, hops=hops, budget=budget)
    assert outcome.trace_lags() == [pytest.approx(lag, rel=1e-6)]
    assert outcome.utilisation == pytest.approx(1)


def test_at_low_load_everyone_is_alone() -> None:
    requests = [(one, True) for one in PRESETS["chat"].draw(40, 0)]
    cluster = Cluster(replicas=2)
    outcome = simulate(EIGHT, cluster, requests, arrivals=[1000.0 * i for i in range(40)])
    expected = [completion_seconds(EIGHT, one, batch=1, budget=8192) for one, _ in requests]
    assert outcome.completion_latencies() == pytest.approx(expected)
    assert outcome.utilisation < 0.01


def test_saturated_throughput_is_near_the_analytic_one() -> None:
    requests = [(Lengths(500, 100, 100), i % 2 == 0) for i in range(400)]
    cost = Cost.of(EIGHT, [requests[0][0]], Setting(32, 8192, 1, 1.0))
    cluster = Cluster(max_num_seqs=64)
    outcome = simulate(EIGHT, cluster, requests, concurrency=32)
    # Prefills share steps with decoding here, which the formula leaves out.
    assert outcome.requests_per_second == pytest.approx(1 / cost.seconds(0.5), rel=0.15)
    assert outcome.utilisation == pytest.approx(1)


def test_decoding_in_one_go_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.capacity_replica import Replica

    requests = [(one, i % 3 == 0) for i, one in enumerate(PRESETS["chat"].draw(60, 1, 1000))]
    arrivals = poisson(20.0, 60)
    cluster = Cluster(replicas=2, max_num_seqs=8)
    together = simulate(EIGHT, cluster, requests, arrivals=arrivals)
    monkeypatch.setattr(Replica, "_steps_until", lambda *_: 1)
    singly = simulate(EIGHT, cluster, requests, arrivals=arrivals)
    latencies = singly.completion_latencies()
    assert together.completion_latencies() == pytest.approx(latencies, rel=1e-6)
    assert together.trace_lags() == pytest.approx(singly.trace_lags(), rel=1e-6)


def middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def test_limits_of_traces_show() -> None:
    drawn = PRESETS["chat"].draw(200, 2, 4000)
    arrivals = poisson(12.0, 200)

    def run(share: float, **limits: float) -> Outcome:
        cluster = replace(Cluster(max_num_seqs=64), **limits)
        requests = [(one, i < share * 200) for i, one in enumerate(drawn)]
        return simulate(EIGHT, cluster, requests, arrivals=arrivals)

    untraced, traced = run(0), run(1)
    assert not untraced.trace_lags()
    assert middle(traced.completion_latencies()) > middle(untraced.completion_latencies())
    small = run(1, trace_token_share=0.002)
    assert middle(small.trace_lags()) > 2 * middle(traced.trace_lags())
    one_at_once = run(1, trace_token_share=0.002, max_concurrent_traces=1)
    assert middle(one_at_once.trace_lags()) > middle(traced.trace_lags())


def test_bad_simulations_are_refused() -> None:
    request = [(Lengths(10, 0, 1), False)]
    with pytest.raises(ValueError, match="either"):
        simulate(EIGHT, Cluster(), request)
    with pytest.raises(ValueError, match="requests"):
        simulate(EIGHT, Cluster(), [], concurrency=1)
    with pytest.raises(ValueError, match="fit"):
        simulate(replace(EIGHT, kv_tokens=10), Cluster(), request, concurrency=1)
    with pytest.raises(ValueError, match="below 1"):
        Cluster(max_concurrent_traces=0)
    with pytest.raises(ValueError, match="no room"):
        Cluster(max_num_seqs=64, max_num_batched_tokens=64)


# Tables


def test_the_command_writes_what_the_tables_show(tmp_path: Path, capsys) -> None:
    observed, found = tmp_path / "mine.jsonl", tmp_path / "out.json"
    observed.write_text('{"prompt": 400, "reasoning": 50, "output": 20}\n' * 20)
    capacity.main(["--lengths", str(observed), "--json", str(found), "--dollars-per-gpu-hour", "3"])
    result = json.loads(found.read_text())
    assert {row["traffic"] for row in result["costs"]} == {"mine.jsonl"}
    assert [row["share"] for row in result["simulation"]] == [0, 0.01, 0.1, 0.25, 1]
    text = capacity_tables.capacity(result)
    assert "$3.00 per GPU hour" in text
    assert "No GPU was measured" in " ".join(text.split())
    assert "3.1 %" in capacity_tables.capacity_memory(result)
    measured = [row for row in result["costs"] if row["basis"] == "measured"]
    assert [("dollars" in row) for row in measured] == [False]
    assert "mine.jsonl" in capsys.readouterr().out


def test_the_check_says_how_wrong_it_is() -> None:
    row = {
        "share": 0.25,
        "requests_per_second": 2.0,
        "rounds": [1.5, 3.0],
        "other_cores": 0.126,
        "predicted_requests_per_second": 2.5,
        "error": 0.25,
        "scaled_error": -0.031,
        "completion_seconds": {"p50": 1.0, "p95": 12.5},
        "predicted_completion_seconds": {"p50": 1.0, "p95": 2.0},
        "lag_seconds": None,
        "predicted_lag_seconds": None,
    }
    names = ("replicas", "model", "clients_per_replica", "requests", "rounds")
    held = {"worker_bytes_per_token": 1080, "computed_bytes_per_token": 1080}
    text = capacity_tables.capacity_check(
        {"settings": dict.fromkeys(names, 2), "accumulators": held, "rows": [row]}
    )
    shown = ["25 %", "2.000", "1.50 / 3.00", "0.13", "2.500", "+25.0 %", "-3.1 %", "1.00 / 12.5"]
    assert f"| {' | '.join(shown)} | 1.00 / 2.00 |" in text
