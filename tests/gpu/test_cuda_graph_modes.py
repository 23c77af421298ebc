"""Which steps leave CUDA graphs: those that compute target rows, and no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

from tests.gpu.v2_engine import V2Engine, apply_patches, assert_exact, traced, untraced, v2_engine
from vllm_flashtrace.worker.observer import current
from vllm_flashtrace.worker.runner import RunnerCapture

SIZES = (1, 2, 4, 8, 16, 24, 32)
TRACE = traced(60, (30, 45))
BREAKABLE = "breakable"
MODES = ["PIECEWISE", BREAKABLE, "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"]

# (arguments of a step, whether it computes target rows)
STEPS: list[tuple[dict[str, Any], bool]] = [
    ({"scheduled": {"other": 5}, "new": {"other": untraced(40, 1)}}, False),
    ({"scheduled": {"trace": 20, "other": 3}, "new": {"trace": TRACE.new}}, False),
    ({"scheduled": {"trace": 9}}, False),
    ({"scheduled": {"trace": 1, "other": 1}}, False),  # position 29, the last before the target
    ({"scheduled": {"trace": 1, "other": 1}}, True),
    ({"scheduled": {"other": 1}}, False),
    ({"scheduled": {"trace": 14, "other": 1}}, True),
    ({"scheduled": {"trace": 5, "other": 1}}, False),  # behind the target
    ({"scheduled": {"other": 4}, "finished": ["trace"]}, False),
]


@pytest.fixture(params=MODES)
def engine(
    request: pytest.FixtureRequest, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], V2Engine]]:
    """Makes engines after "capture" in one mode; what would be replayed computes nothing."""
    breakable = request.param == BREAKABLE
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", str(int(breakable)))
    mode = CUDAGraphMode["PIECEWISE" if breakable else request.param]
    with v2_engine(tiny_llama, monkeypatch) as loaded:

        def fresh() -> V2Engine:
            engine = V2Engine(loaded.model, loaded.config, loaded.layout)
            prepare(engine, mode, monkeypatch)
            assert engine.runner.cudagraph_manager.use_breakable_cg == breakable
            return engine

        yield fresh


def prepare(engine: V2Engine, mode: CUDAGraphMode, monkeypatch: pytest.MonkeyPatch) -> None:
    manager, runner = engine.use_graphs(mode, SIZES, monkeypatch), engine.runner

    def replay(described: BatchExecutionDescriptor) -> torch.Tensor:
        assert current() is None
        runner.seen.append(described.cg_mode)
        return torch.zeros(described.num_tokens, engine.config.model_config.get_hidden_size())

    def breakable(**inputs: Any) -> torch.Tensor:
        assert current() is None
        hidden: torch.Tensor = engine.model(**inputs)
        return hidden

    manager.run_fullgraph = replay
    manager.breakable_cg_runner = breakable


def modes(engine: V2Engine) -> list[CUDAGraphMode]:
    for arguments, _ in STEPS:
        engine.step(**arguments)
    return list(engine.runner.seen)


def test_only_steps_with_target_rows_leave_graphs(
    engine: Callable[[], V2Engine], float64_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = modes(engine())
    apply_patches(monkeypatch)
    patched = engine()
    found = modes(patched)
    expected = [
        CUDAGraphMode.NONE if targets else mode
        for mode, (_, targets) in zip(stock, STEPS, strict=True)
    ]
    assert found == expected
    assert stock != expected
    assert not any(patched.runner.skipped_compiled)
    if CUDAGraphMode.FULL not in found:  # else steps that fill the cache were not computed
        assert_exact(patched, TRACE, float64_llama)


def test_untraced_work_keeps_its_graphs(
    engine: Callable[[], V2Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(engine: V2Engine) -> tuple[list[CUDAGraphMode], list[torch.Tensor]]:
        hidden = [engine.step({"a": 8}, new={"a": untraced(30, 1)})]
        hidden += [engine.step({"a": 1}), engine.step({"a": 2, "b": 9}, new={"b": untraced(9, 2)})]
        return list(engine.runner.seen), hidden

    stock, expected = run(engine())
    apply_patches(monkeypatch)
    found, hidden = run(engine())
    assert found == stock
    assert all(torch.equal(a, b) for a, b in zip(hidden, expected, strict=True))


def dummy_run(engine: V2Engine, tokens: int) -> CUDAGraphMode:
    """A run as ``_dummy_run`` makes it, here without attention metadata."""
    output = SchedulerOutput.make_empty()
    output.num_scheduled_tokens = {f"_dummy_req_{i}": 1 for i in range(tokens)}
    output.total_num_scheduled_tokens = tokens
    engine.runner.execute_model(output, None, True, True)
    engine.runner.execute_model_state = None
    return engine.runner.seen[-1]


@pytest.mark.parametrize("engine", ["PIECEWISE", BREAKABLE], indirect=True)
def test_dummy_runs_are_not_touched(
    engine: Callable[[], V2Engine], float64_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = dummy_run(engine(), 7)
    apply_patches(monkeypatch)
    patched = engine()
    patched.step({"trace": 40}, new={"trace": TRACE.new})
    active = patched.capture.recorder.active_requests
    with monkeypatch.context() as patch:
        patch.delattr(RunnerCapture, "observe")  # whoever showed it a dummy run would fail
        assert dummy_run(patched, 7) == stock == CUDAGraphMode.PIECEWISE
    assert patched.capture.recorder.active_requests == active == {"trace"}
    patched.step({"trace": 20})
    assert_exact(patched, TRACE, float64_llama)
