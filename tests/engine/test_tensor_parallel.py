"""Two tensor-parallel ranks give what one gives, and a rank that fails fails its trace alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.rank_faults import Load, Outcome, lost, run_load, run_with_faults
from tests.engine.harness import (
    Engine,
    TraceJob,
    oracle_head_scores,
    random_heads,
    relative_l1,
    tiny_folder,
)
from tests.engine.test_scores import reference
from tests.engine.worker_faults import (
    FAULTS,
    check_failing_rank,
    check_lost_result,
    check_nothing_left,
    core_each,
)
from tests.measured import Measured
from tests.oracle import oracle_scores
from tests.tiny_models import FAMILY_NAMES, Family, make_tiny_model
from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.base.records import ScoredText, TraceReport
from vllm_flashtrace.core.hops import FurtherHops
from vllm_flashtrace.core.weights import TargetWeights

LIMIT = 1e-5
TOKENS = torch.randint(5, 500, (300,), generator=torch.Generator().manual_seed(1)).tolist()
JOBS = [
    TraceJob(TOKENS, TargetWeights.from_mapping({i: 1.0 + i % 3 for i in range(250, 300)})),
    TraceJob(TOKENS, TargetWeights.from_spans([(10, 20), (150, 280)]), layers=True, attention=True),
    TraceJob(TOKENS, TargetWeights.from_spans([(200, 300)]), layers=True, heads=True),
]

folder = tiny_folder("qwen3")


def start(folder: Path, ranks: int, patch: pytest.MonkeyPatch) -> Engine:
    core_each(patch, ranks)
    return Engine(
        folder,
        f"tensor parallel, {ranks} ranks",
        in_process=ranks == 1,
        max_model_len=1024,
        tensor_parallel_size=ranks,
        **random_heads(folder)[1],
    )


def one_rank(folder: Path, patch: pytest.MonkeyPatch) -> list[TraceReport]:
    engine = start(folder, 1, patch)
    try:
        return engine.trace_many(JOBS)
    finally:
        engine.close()


def compare(several: list[TraceReport], one: list[TraceReport]) -> None:
    for ours, expected in zip(several, one, strict=True):
        error = relative_l1(ours.scores, expected.scores)
        print(f"two ranks against one: relative L1 {error:.1e}")
        assert error <= LIMIT
        assert ours.recomputed_tokens == expected.recomputed_tokens
        assert ours.cached_tokens == expected.cached_tokens
    for ours, expected in zip(several[1:], one[1:], strict=True):
        mine, theirs = ours.layer_scores, expected.layer_scores
        assert mine is not None and theirs is not None
        assert mine.shape == theirs.shape
        for mine_of_layer, theirs_of_layer in zip(mine, theirs, strict=True):
            assert relative_l1(mine_of_layer, theirs_of_layer) <= LIMIT
    heads, expected = several[1].attention, one[1].attention
    assert heads is not None and expected is not None
    assert torch.allclose(heads.float(), expected.float(), rtol=2e-3, atol=1e-7)


def oracle_error(folder: Path, report: TraceReport) -> float:
    """Of the first trace."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = JOBS[0].weights
    expected = oracle_scores(model, TOKENS, weights.positions, weights.weights)
    return relative_l1(report.scores, expected)


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        engine = start(folder, 2, patch)
        yield engine
        engine.close()


def test_heads_shared_by_two_ranks(
    two_ranks: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    several = two_ranks.trace_many(JOBS)
    measured("families", FAMILY_NAMES["qwen3"], ranks=oracle_error(folder, several[0]))
    compare(several, one_rank(folder, monkeypatch))
    check_nothing_left(two_ranks)


def test_weights_of_heads_are_shared_out(two_ranks: Engine, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    job = JOBS[2]
    report = two_ranks.trace(job)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = oracle_head_scores(model, TOKENS, job.weights, random_heads(folder)[0])
    error = relative_l1(report.scores, expected.sum(0))
    print(f"relative L1 {error:.1e}")
    assert error <= LIMIT
    assert report.layer_scores is not None
    # No layer is put in units of its own.
    assert relative_l1(report.layer_scores.flatten(), expected.flatten()) <= LIMIT


def test_tokens_scored_by_two_ranks(two_ranks: Engine, folder: Path) -> None:
    text = ScoredText(TOKENS, [1, *range(100, 300)])
    [report] = two_ranks.score_many([text])
    assert (report.log_probs - reference(folder, text)).abs().max() <= 1e-4


def test_further_hops_need_the_scores_of_all_ranks(two_ranks: Engine) -> None:
    assert two_ranks.status()["accumulator_bytes_per_row"] == 0
    further = FurtherHops(torch.arange(10, 20), 1)
    with pytest.raises(TraceError, match="each hop by itself"):
        two_ranks.trace(dataclasses.replace(JOBS[0], further=further))
    check_nothing_left(two_ranks)


@pytest.mark.parametrize("family", ["glm4"])
def test_a_key_value_head_on_both_ranks(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    """With more ranks than key/value heads each rank holds a copy; the heads count once.

    The norm behind the block is of what the ranks add up.
    """
    folder = make_tiny_model(family, tmp_path / family, num_kv_heads=1)
    engine = start(folder, 2, monkeypatch)
    try:
        several = engine.trace_many(JOBS)
    finally:
        engine.close()
    measured("families", FAMILY_NAMES[family], ranks=oracle_error(folder, several[0]))
    compare(several, one_rank(folder, monkeypatch))


@pytest.mark.parametrize(("phase", "rank"), FAULTS)
def test_a_rank_that_fails(two_ranks: Engine, phase: str, rank: int) -> None:
    check_failing_rank(two_ranks, rank, phase, JOBS[0], TOKENS)


@pytest.fixture(scope="module")
def load() -> Load:
    return Load.make(completions=12, traces=8)


@pytest.fixture(scope="module")
def without_faults(two_ranks: Engine, load: Load) -> Outcome:
    return run_load(two_ranks, load)


@pytest.mark.parametrize(
    ("phase", "rank"), [("attention", 1), pytest.param("scores", 0, marks=pytest.mark.long)]
)
def test_what_runs_beside_a_rank_that_fails(
    two_ranks: Engine, load: Load, without_faults: Outcome, phase: str, rank: int
) -> None:
    """A small part of ``python -m benchmarks.rank_faults``."""
    row = run_with_faults(two_ranks, load, without_faults, phase, rank)
    assert not lost(row), row


def test_a_rank_that_lost_its_result(two_ranks: Engine) -> None:
    check_lost_result(two_ranks, 1, JOBS[0])


def test_results_nobody_fetches_expire(two_ranks: Engine) -> None:
    """Ranks keep their parts until they are asked; a worker alone sends its result at once."""

    def set_ttl(worker: Any, seconds: float) -> None:
        from vllm_flashtrace.worker.runner import capture_of

        capture_of(worker.model_runner).recorder._ttl = seconds

    two_ranks.on_worker(set_ttl, 0.0)
    try:
        _, nonce = two_ranks.submit(JOBS[0])
        two_ranks.run()
        with pytest.raises(TraceError) as caught:
            two_ranks.collect(nonce)
    finally:
        two_ranks.on_worker(set_ttl, 60.0)
    assert caught.value.code == "result_missing"
    check_nothing_left(two_ranks)
