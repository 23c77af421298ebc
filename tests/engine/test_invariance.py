"""The same trace gives the same scores however the engine happens to schedule it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine.conftest import text_tokens
from tests.engine.harness import Engine, TraceJob, relative_l1, run_hops
from vllm_flashtrace.core.hops import FurtherHops, TracedTarget
from vllm_flashtrace.core.weights import TargetWeights

LIMIT = 5e-4


def agrees(name: str, ours: torch.Tensor, alone: torch.Tensor) -> bool:
    """Prints the relative L1 distance (see it with ``pytest -s``) and holds it to the limit."""
    error = relative_l1(ours, alone)
    print(f"{name}: relative L1 {error:.2e}")
    return error <= LIMIT


# Two separate spans and uneven weights, spread over several chunks and blocks.
TARGET = TargetWeights.from_mapping(
    {**{i: 1.0 + (i % 5) for i in range(210, 330)}, **{i: 2.0 for i in range(470, 600)}}
)


@pytest.fixture(scope="module")
def tokens(tiny: Engine) -> list[int]:
    return text_tokens(tiny, 600)


@pytest.fixture(scope="module")
def alone(tiny: Engine, tokens: list[int]) -> torch.Tensor:
    return tiny.trace(TraceJob(tokens, TARGET)).scores


def test_repeated(tiny: Engine, tokens: list[int], alone: torch.Tensor) -> None:
    report = tiny.trace(TraceJob(tokens, TARGET))
    assert report.cached_tokens == 128  # one whole block lies before the first target
    assert report.recomputed_tokens == 600 - 128
    assert relative_l1(report.scores, alone) <= LIMIT


def test_among_other_traces_and_decoding(
    tiny: Engine, tokens: list[int], alone: torch.Tensor
) -> None:
    others = [
        TraceJob(
            text_tokens(tiny, 150 + 40 * i, f"Other {i}. "),
            TargetWeights.from_spans([(100 + 10 * i, 140 + 30 * i)]),
        )
        for i in range(7)
    ]
    decoding = [text_tokens(tiny, 30 + 10 * i, f"Decoding {i}. ") for i in range(8)]
    jobs = [*others[:4], TraceJob(tokens, TARGET), *others[4:]]
    reports = tiny.trace_many(jobs, decoding=decoding)
    assert agrees("among 7 traces and 8 decoding requests", reports[4].scores, alone)
    for job, report in zip(jobs, reports, strict=True):
        assert relative_l1(report.scores, tiny.trace(job).scores) <= LIMIT


def test_in_four_chunks_without_prefix_cache(
    crowded: Engine, tokens: list[int], alone: torch.Tensor
) -> None:
    report = crowded.trace(TraceJob(tokens, TARGET))
    assert report.recomputed_tokens == 600  # 160 + 160 + 160 + 120
    assert report.restarts == 0
    assert agrees("in 4 chunks, no prefix cache", report.scores, alone)


def test_after_a_preemption(tiny: Engine, crowded: Engine) -> None:
    # Sixteen usable blocks of 128: the trace needs eight, eight decoding requests hold one each
    # and soon need a second one, which they take from the trace because it came last.
    job = TraceJob(text_tokens(tiny, 1000), TargetWeights.from_spans([(210, 330), (800, 1000)]))
    decoding = [text_tokens(crowded, 118, f"Decoding {i}. ") for i in range(8)]
    (report,) = crowded.trace_many([job], decoding, new_tokens=30)
    assert report.restarts >= 1
    assert agrees("after a preemption", report.scores, tiny.trace(job).scores)


def test_further_hops_need_no_prefill_of_their_own(
    tiny: Engine, crowded: Engine, tokens: list[int]
) -> None:
    """Hop by hop; from one prefill; and from one in chunks that are not of adjacent rows."""
    arguments = (tokens, 200, (560, 590), (300, 420), 3)
    one_by_one = run_hops(tiny, *arguments)
    for engine in (tiny, crowded):
        at_once = run_hops(engine, *arguments, at_once=True)
        assert len(at_once.per_hop_scores) == len(one_by_one.per_hop_scores) == 4
        for ours, alone in zip(at_once.per_hop_scores, one_by_one.per_hop_scores, strict=True):
            assert relative_l1(ours, alone) <= 1e-4
        assert at_once.remaining_mass == pytest.approx(one_by_one.remaining_mass, rel=1e-4)
        assert engine.status()["accumulator_bytes"] == 0


def test_rows_for_further_hops_are_counted(tiny: Engine, tokens: list[int]) -> None:
    further = FurtherHops(torch.arange(300, 420), 2)
    target = TargetWeights.from_spans([(560, 590)])
    report = tiny.trace(TraceJob(tokens, target, further=further))
    assert len(report.later_scores) == 2
    assert report.cached_tokens == 256  # Of 300, in whole blocks.
    assert report.recomputed_tokens == 600 - 256
    status = tiny.status()
    shape = (4, 600, 4)  # Layers, tokens, heads.
    assert status["accumulator_bytes_per_token"] == shape[0] * shape[2] * 4
    assert status["accumulator_bytes_per_row"] > 0


def test_further_hops_after_a_preemption(tiny: Engine, crowded: Engine) -> None:
    tokens = text_tokens(tiny, 1000)
    further = FurtherHops(torch.arange(300, 700), 2)
    job = TraceJob(tokens, TargetWeights.from_spans([(900, 1000)]), further=further)
    decoding = [text_tokens(crowded, 118, f"Decoding {i}. ") for i in range(8)]
    (report,) = crowded.trace_many([job], decoding, new_tokens=30)
    assert report.restarts >= 1
    expected = tiny.trace(job)
    assert agrees("after a preemption", report.scores, expected.scores)
    for ours, alone in zip(report.later_scores, expected.later_scores, strict=True):
        assert relative_l1(ours, alone) <= LIMIT


def test_targets_together_are_what_each_is_alone(
    tiny: Engine, crowded: Engine, tokens: list[int]
) -> None:
    """Some with hops behind them; the last is weighed, and they share rows."""
    followed = FurtherHops(torch.arange(300, 360), 2)
    targets = [
        TracedTarget(TargetWeights.from_spans([(400, 420)]), followed),
        TracedTarget(TargetWeights.from_spans([(590, 600), (410, 412)])),
        TracedTarget(TargetWeights.from_mapping({580: 0.5, 591: 2.0}), followed),
    ]
    alone = [
        tiny.trace(TraceJob(tokens, each.weights, further=each.further)).targets[0]
        for each in targets
    ]
    first, *others = targets
    job = TraceJob(tokens, first.weights, further=first.further, others=others)
    # All at once, one by one, and as two and one.
    for engine, spare in ((tiny, None), (crowded, None), (tiny, 0), (tiny, 50_000)):
        if spare is not None:
            engine.on_worker(give_spare_bytes, spare)
        report = engine.trace(job)
        assert report.recomputed_tokens == 600 - (256 if engine is tiny else 0)
        for ours, expected in zip(report.targets, alone, strict=True):
            assert len(ours) == len(expected)
            for hop, one in zip(ours, expected, strict=True):
                assert relative_l1(hop, one) <= 1e-5
        assert engine.status()["accumulator_bytes"] == 0
    tiny.on_worker(give_spare_bytes, None)


def give_spare_bytes(_: Any, spare: int | None) -> None:
    """Lets the targets' sums take so much, or as much as they may take again."""
    from vllm_flashtrace.worker.recorder import Recorder

    kind: Any = Recorder
    kind.stock_spare = getattr(kind, "stock_spare", kind._spare_bytes)
    kind._spare_bytes = kind.stock_spare if spare is None else lambda self: spare


def test_weights_scale_does_not_matter(
    tiny: Engine, tokens: list[int], alone: torch.Tensor
) -> None:
    scaled = TargetWeights(TARGET.positions, TARGET.weights * 1000)
    report = tiny.trace(TraceJob(tokens, scaled))
    assert relative_l1(report.scores, alone) <= 1e-5


def test_pruning_stays_close_and_keeps_the_top(smollm2: Engine, trace_tokens: list[int]) -> None:
    exact = smollm2.trace(TraceJob(trace_tokens, TARGET)).scores
    pruned = smollm2.trace(TraceJob(trace_tokens, TARGET, exact_fraction=0.9)).scores
    assert relative_l1(pruned, exact) <= 2e-3
    assert set(pruned.topk(10).indices.tolist()) == set(exact.topk(10).indices.tolist())


def test_layers_add_up(tiny: Engine, tokens: list[int], alone: torch.Tensor) -> None:
    report = tiny.trace(TraceJob(tokens, TARGET, layers=True))
    assert report.layer_scores is not None
    assert report.layer_scores.shape == (4, 600)
    torch.testing.assert_close(report.layer_scores.sum(0), report.scores)
