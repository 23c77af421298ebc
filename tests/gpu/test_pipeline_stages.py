"""Two pipeline stages of the V2 runner: each records its own layers, and their sum is exact."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed import parallel_state

from tests.engine.harness import relative_l1
from tests.gpu.standin import CPU
from tests.gpu.v2_engine import LIMIT, Traced, V2Engine, apply_patches, traced, untraced, v2_engine
from tests.tiny_models import Family, make_tiny_model
from vllm_flashtrace.base.records import TraceReport
from vllm_flashtrace.trace.pickup import pick_up_now
from vllm_flashtrace.trace.wire import ModelPart


@contextlib.contextmanager
def on_stage(stage: int) -> Iterator[None]:
    """As in the process of one of two stages."""
    group = SimpleNamespace(
        rank_in_group=stage, world_size=2, is_first_rank=stage == 0, is_last_rank=stage == 1
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel_state, "_PP", group)
        yield


class Stages:
    """Both stages of one model."""

    def __init__(self, engines: list[V2Engine]) -> None:
        self.engines = engines
        for stage, engine in enumerate(engines):
            runner = engine.runner
            runner.is_first_pp_rank, runner.is_last_pp_rank = stage == 0, stage == 1
            runner.update_pp_decode_requests = lambda: None  # Nothing is sampled here.
            runner.pp_handler = SimpleNamespace(relay_aux_hidden_states=lambda _, output: output)
            runner.intermediate_tensors = engine.model.make_empty_intermediate_tensors(
                512, torch.float32, CPU
            )

    def step(self, scheduled: dict[str, int], **arguments: Any) -> None:
        output, between = self.engines[0].steps.step(scheduled, **arguments), None
        for stage, engine in enumerate(self.engines):
            with on_stage(stage):
                between = engine.runner.execute_model(output, between)
            engine.runner.execute_model_state = None
        assert between is None

    def report(self, trace: Traced) -> TraceReport:
        def call(method: str, args: tuple[Any, ...]) -> list[bytes]:
            assert method == "flashtrace_collect"
            return [engine.capture.recorder.collect(*args) for engine in self.engines]

        return pick_up_now(trace.spec.nonce, call)


@pytest.fixture(params=["llama", "qwen3_moe"])
def stages(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Stages, Any]]:
    from transformers import AutoModelForCausalLM

    family: Family = request.param
    folder = make_tiny_model(family, tmp_path / family)
    with contextlib.ExitStack() as stack:
        engines = []
        for stage in range(2):
            with on_stage(stage):
                made = v2_engine(folder, monkeypatch, pipeline_parallel_size=2)
                engines.append(stack.enter_context(made))
        apply_patches(monkeypatch)
        yield Stages(engines), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_stages_add_up_to_the_oracle(stages: tuple[Stages, Any]) -> None:
    both, model = stages
    trace = traced(100, (58, 64), (90, 100))
    both.step({"trace": 60, "other": 9}, new={"trace": trace.new, "other": untraced(40, 3)})
    both.step({"other": 10, "trace": 40})
    report = both.report(trace)
    assert relative_l1(report.scores, trace.oracle(model)) < LIMIT
    assert report.recomputed_tokens == 100
    parts = [engine.capture._model.part for engine in both.engines]  # type: ignore[union-attr]
    assert parts == [ModelPart(0, 2, 4, 1), ModelPart(2, 2, 4, 1)]
