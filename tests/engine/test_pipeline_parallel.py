"""Two pipeline stages give what one process gives, and a stage that fails fails its trace alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.harness import Engine, TraceJob, random_heads, relative_l1, tiny_folder
from tests.engine.test_images import MESSAGES, Seen, last
from tests.engine.test_scores import reference
from tests.engine.test_start_proof import start_reports
from tests.engine.worker_faults import (
    FAULTS,
    check_failing_rank,
    check_lost_result,
    check_nothing_left,
    core_each,
)
from tests.measured import Measured
from tests.oracle import oracle_scores
from tests.tiny_models import make_tiny_model
from vllm_flashtrace.base.records import ScoredText, TraceReport
from vllm_flashtrace.core.weights import TargetWeights

LIMIT = 1e-5
ORACLE_LIMIT = 5e-4
TOKENS = torch.randint(5, 500, (300,), generator=torch.Generator().manual_seed(1)).tolist()
# The second prompt shares nothing with the first.
OTHER = torch.randint(5, 500, (260,), generator=torch.Generator().manual_seed(2)).tolist()
JOBS = [
    TraceJob(TOKENS, TargetWeights.from_mapping({i: 1.0 + i % 3 for i in range(250, 300)})),
    TraceJob(TOKENS, TargetWeights.from_spans([(10, 20), (150, 280)]), layers=True, attention=True),
    TraceJob(OTHER, TargetWeights.from_spans([(200, 260)]), layers=True),
    TraceJob(OTHER, TargetWeights.from_spans([(210, 260)]), layers=True, heads=True),
]
PROXIMITIES = [job for job in JOBS if not job.heads]
# In steps of 128 tokens both stages see every trace in several chunks.
CHUNKED = {"max_model_len": 1024, "max_num_batched_tokens": 128}

folder = tiny_folder("qwen3")


def start(folder: Path, stages: int, patch: pytest.MonkeyPatch, **options: Any) -> Engine:
    core_each(patch, stages)
    engine = Engine(
        folder,
        f"pipeline parallel, {stages} stages",
        in_process=stages == 1,
        pipeline_parallel_size=stages,
        **{**CHUNKED, **random_heads(folder)[1], **options},
    )
    engine.llm.collective_rpc(make_buffers)
    return engine


def make_buffers(worker: Any) -> None:
    """Makes what vLLM's CPU workers make only while they compile: a stage's input buffers."""
    runner = worker.model_runner
    if runner.intermediate_tensors is None:
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens,
            dtype=runner.model_config.dtype,
            device=runner.device,
        )


def compare(several: list[TraceReport], one: list[TraceReport]) -> float:
    """Returns the largest relative L1 distance."""
    errors = []
    for ours, expected in zip(several, one, strict=True):
        error = relative_l1(ours.scores, expected.scores)
        errors.append(error)
        assert error <= LIMIT
        assert torch.allclose(ours.scores.sum(), expected.scores.sum(), rtol=1e-5)
        assert (ours.attention is None) == (expected.attention is None)
        if ours.attention is not None and expected.attention is not None:
            assert torch.allclose(ours.attention, expected.attention, rtol=2e-3, atol=1e-7)
        if expected.layer_scores is None:
            assert ours.layer_scores is None
            continue
        assert ours.layer_scores is not None
        assert ours.layer_scores.shape == expected.layer_scores.shape
        for mine, theirs in zip(ours.layer_scores, expected.layer_scores, strict=True):
            assert relative_l1(mine, theirs) <= LIMIT
    return max(errors)


@pytest.fixture(scope="module")
def two_stages(folder: Path) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        engine = start(folder, 2, patch)
        yield engine
        engine.close()


def test_layers_of_two_stages(
    two_stages: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    several = two_stages.trace_many(JOBS)
    check_nothing_left(two_stages)
    engine = start(folder, 1, monkeypatch)
    try:
        error = compare(several, engine.trace_many(JOBS))
    finally:
        engine.close()
    measured("ways", "two pipeline stages, Qwen3", against="one process", scores=error)


def test_tokens_scored_by_two_stages(two_stages: Engine, folder: Path) -> None:
    text = ScoredText(TOKENS, [1, *range(100, 300)])
    [report] = two_stages.score_many([text])
    assert (report.log_probs - reference(folder, text)).abs().max() <= 1e-4


@pytest.mark.long
def test_compiled_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    """Compiled, which is how vLLM itself runs pipeline stages on CPUs, and of another family.

    vLLM makes a Qwen3-MoE's last norm on every stage, though only the last one runs it.
    """
    from transformers import AutoModelForCausalLM

    folder = make_tiny_model("qwen3_moe", tmp_path / "qwen3_moe")
    engine = start(folder, 2, monkeypatch, enforce_eager=False)
    try:
        reports = engine.trace_many(PROXIMITIES)
    finally:
        engine.close()
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    errors = []
    for job, report in zip(PROXIMITIES, reports, strict=True):
        weights = job.weights
        expected = oracle_scores(model, job.token_ids, weights.positions, weights.weights)
        errors.append(relative_l1(report.scores, expected))
        assert errors[-1] <= ORACLE_LIMIT
    row = "two pipeline stages, compiled, Qwen3-MoE"
    measured("ways", row, against="oracle", scores=max(errors))


@pytest.mark.parametrize("family", ["qwen3_vl", pytest.param("qwen2_5_vl", marks=pytest.mark.long)])
def test_images(
    family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    """Only the first stage sees them; with deepstack it adds to the stream of its first layers."""
    names = {"qwen3_vl": "Qwen3-VL", "qwen2_5_vl": "Qwen2.5-VL"}
    core_each(monkeypatch, 2)
    seen = Seen(tmp_path / family, family, in_process=False, pipeline_parallel_size=2)
    try:
        seen.engine.llm.collective_rpc(make_buffers)
        for report in start_reports(seen.engine):
            assert report["refusal"] is None and report["largest_error"] < LIMIT
        tokens, images = seen.answer(MESSAGES)
        target = last(tokens, 20)
        expected = seen.expected(tokens, target, MESSAGES)
        cached, errors = [], []
        for _ in range(2):  # Of the prefix cache, then computed again, in chunks.
            report = seen.engine.trace(TraceJob(tokens, target, images=images))
            error = relative_l1(report.scores, expected)
            assert error <= LIMIT
            errors.append(error)
            cached.append(report.cached_tokens)
            assert seen.engine.llm.reset_prefix_cache()
        assert cached[0] > images.in_prompt[-1].tokens[-1] and cached[1] == 0
        row = f"two pipeline stages, {names[family]} with two images"
        measured("ways", row, against="oracle", scores=max(errors))
    finally:
        seen.engine.close()


def test_traces_beside_decoding_requests(two_stages: Engine) -> None:
    alone = two_stages.trace_many(JOBS)
    beside = two_stages.trace_many(JOBS, [OTHER[:40], TOKENS[:60]])
    compare(beside, alone)


def test_what_each_stage_reports(two_stages: Engine) -> None:
    import msgspec

    replies = two_stages.llm.collective_rpc("flashtrace_status")
    workers = [msgspec.msgpack.decode(reply)["worker"] for reply in replies]
    assert [worker["rank"] for worker in workers] == [0, 1]
    assert {worker["pipeline_parallel_size"] for worker in workers} == {2}


@pytest.mark.parametrize(("phase", "stage"), FAULTS)
def test_a_stage_that_fails(two_stages: Engine, phase: str, stage: int) -> None:
    check_failing_rank(two_stages, stage, phase, JOBS[0], TOKENS)


def test_a_stage_that_lost_its_result(two_stages: Engine) -> None:
    check_lost_result(two_stages, 0, JOBS[0])
