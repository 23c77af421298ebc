"""Ranks run every step in the same way, also when a trace has failed on one of them.

A rank that replays a CUDA graph pads its batch; one that does not has collectives of another size,
and the engine hangs. The ranks here are runners of their own that see the same scheduler's output,
or, with data parallelism, each its own.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker import dp_utils
from vllm.v1.worker.gpu import dp_utils as dp_utils_v2
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from tests.faults import break_function, mend_function
from tests.gpu.standin import CPU
from tests.gpu.test_model_runner_v1 import v1_runner
from tests.gpu.test_v2_faults import PHASES
from tests.gpu.v2_engine import (
    StepMaker,
    Traced,
    V2Engine,
    apply_patches,
    traced,
    untraced,
    v2_engine,
)
from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.patches import model_runner_v1, model_runner_v2
from vllm_flashtrace.trace.budget import AccumulatorBudget
from vllm_flashtrace.worker import runner as worker_runner
from vllm_flashtrace.worker.rank_agreement import TargetSteps, TotalsExchange
from vllm_flashtrace.worker.runner import RunnerCapture, capture_of

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
TRACE = traced(120, (30, 110))
# In the first step that has target rows the trace fails on one rank; all later ones have some too.
STEPS: list[dict[str, Any]] = [
    {"scheduled": {"other": 7}, "new": {"other": untraced(90, 1)}},
    {"scheduled": {"trace": 41, "other": 3}, "new": {"trace": TRACE.new}},
    {"scheduled": {"trace": 41}},
    {"scheduled": {"trace": 13, "other": 9}},
    {"scheduled": {"trace": 20, "other": 1}},
    {"scheduled": {"trace": 5, "other": 11}},  # behind the target
    {"scheduled": {"other": 11}, "finished": ["trace"]},
]
LAST = STEPS[4]  # It holds the last target row.
WITH_TARGETS = [False, True, True, True, True, False, False]


def run(engine: V2Engine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[CUDAGraphMode, int]]:
    """Mode and padded tokens of each step; checks what it exchanges with other ranks."""
    engine.use_graphs(CUDAGraphMode.PIECEWISE, SIZES, monkeypatch)
    sizes: list[int] = []
    exchanged: list[int] = []

    def all_reduce(totals: torch.Tensor) -> torch.Tensor:
        exchanged.append(totals.numel())
        return totals

    layers = len(engine.model.model.layers)
    exchange = TotalsExchange(all_reduce, layers, 8, CPU)
    monkeypatch.setattr(worker_runner, "_totals_exchange", lambda _: exchange)
    if (capture := worker_runner.existing_capture(engine.runner)) is not None:
        capture._exchange = exchange
    hook = engine.model.register_forward_pre_hook(
        lambda _, __, inputs: sizes.append(len(inputs["positions"])), with_kwargs=True
    )
    for arguments in STEPS:
        before = len(exchanged)
        engine.step(**arguments)
        finishes = arguments["scheduled"] == LAST["scheduled"]
        assert exchanged[before:] == ([layers] if finishes else [])
    hook.remove()
    return list(zip(engine.runner.seen, sizes, strict=True))


def rank(loaded: V2Engine) -> V2Engine:
    return V2Engine(loaded.model, loaded.config, loaded.layout)


@pytest.mark.parametrize("phase", PHASES)
def test_v2_after_a_fault(phase: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with v2_engine(tiny_llama, monkeypatch) as loaded:
        apply_patches(monkeypatch)
        healthy = run(rank(loaded), monkeypatch)
        broken = rank(loaded)
        break_function(None, *PHASES[phase])
        try:
            assert run(broken, monkeypatch) == healthy
        finally:
            mend_function(None, *PHASES[phase])
    assert [mode == CUDAGraphMode.NONE for mode, _ in healthy] == WITH_TARGETS


@pytest.mark.parametrize("limit", [0, 1 << 40])
def test_v2_with_budgets_of_their_own(
    limit: int, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank with less free memory refuses a trace that another one records."""
    with v2_engine(tiny_llama, monkeypatch) as loaded:
        apply_patches(monkeypatch)
        healthy = run(rank(loaded), monkeypatch)
        poor = rank(loaded)
        capture_of(poor.runner).recorder.budget = AccumulatorBudget(limit, 1, 1)
        assert run(poor, monkeypatch) == healthy
        if limit:
            assert poor.report(TRACE).scores.sum() > 0
            return
        with pytest.raises(TraceError, match="max_accumulator_mib"):
            poor.report(TRACE)


FAULTS = ("healthy", "registration", "refused", "failed in the first chunk")


@pytest.mark.parametrize("fault", FAULTS)
def test_v1(fault: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own dispatcher, with the capture of a rank on which the trace has failed."""
    with v2_engine(tiny_llama, monkeypatch) as loaded:
        for name in ("execute_model", "_determine_batch_execution_and_padding", "_model_forward"):
            monkeypatch.setattr(GPUModelRunner, name, getattr(GPUModelRunner, name))
        model_runner_v1.check()
        model_runner_v1.apply()
        runner = v1_runner(loaded, CUDAGraphMode.PIECEWISE, monkeypatch)
        setattr(runner, worker_runner._ATTRIBUTE, broken_capture(rank(loaded), fault, monkeypatch))
        found = [dispatch(runner, arguments, fault) for arguments in outputs(STEPS)]
    assert found == WITH_TARGETS


def broken_capture(engine: V2Engine, fault: str, monkeypatch: pytest.MonkeyPatch) -> RunnerCapture:
    if fault == "refused":
        monkeypatch.setattr(
            worker_runner, "cache_groups", lambda *_: (_ for _ in ()).throw(ValueError("injected"))
        )
    capture = capture_of(engine.runner)
    assert (capture.refusal is not None) == (fault == "refused")
    if fault == "registration":
        capture.recorder.budget = AccumulatorBudget(0, 1, 1)
    return capture


def outputs(steps: Sequence[dict[str, Any]]) -> list[Any]:
    maker = StepMaker(16)
    return [maker.step(**arguments) for arguments in steps]


def dispatch(runner: Any, scheduler_output: Any, fault: str) -> bool:
    """Whether the step leaves CUDA graphs."""
    capture = worker_runner.existing_capture(runner)
    assert capture is not None
    capture.observe(scheduler_output)
    counts = np.array(list(scheduler_output.num_scheduled_tokens.values()), dtype=np.int32)
    mode, described = runner._determine_batch_execution_and_padding(
        int(counts.sum()), len(counts), counts, int(counts.max())
    )[:2]
    if capture.records_step and fault == "failed in the first chunk":
        capture.recorder.fail("trace", RuntimeError("injected"))
    if mode == CUDAGraphMode.NONE:
        assert described.num_tokens == counts.sum()
    return bool(mode == CUDAGraphMode.NONE)


class Exchange:
    """``torch.distributed`` for data-parallel ranks that are threads: the sum of all tensors."""

    def __init__(self, ranks: int) -> None:
        self._tensors: list[torch.Tensor] = []
        self._barrier = threading.Barrier(ranks, timeout=60)

    def all_reduce(self, tensor: torch.Tensor, group: Any) -> None:
        self._tensors.append(tensor.clone())
        self._barrier.wait()
        tensor.copy_(torch.stack(self._tensors).sum(0))
        if self._barrier.wait() == 0:
            self._tensors.clear()
        self._barrier.wait()


PEERS = [(1, 1), (9, 2), (40, 3)]
"""Tokens and requests of what the other rank computes meanwhile; the first is a dummy batch."""


@pytest.fixture
def ranks_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """What data-parallel ranks exchange about a step, in this process."""
    exchange, group = Exchange(2), SimpleNamespace(device=CPU, device_group=None, cpu_group=None)
    for module in (dp_utils, dp_utils_v2):
        monkeypatch.setattr(module, "dist", exchange)
        monkeypatch.setattr(module, "get_dp_group", lambda: group)


def in_step(first: Callable[[], Any], second: Callable[[], Any]) -> tuple[Any, Any]:
    with ThreadPoolExecutor(2) as pool:
        mine, theirs = pool.submit(first), pool.submit(second)
        return mine.result(), theirs.result()


@pytest.mark.usefixtures("ranks_exchange")
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("traces", [False, True])
def test_v1_of_data_parallel_ranks(
    traces: bool, peer: tuple[int, int], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step with target rows leaves graphs before ranks agree, so no rank pads or replays."""
    with v2_engine(tiny_llama, monkeypatch) as loaded:
        for name in ("execute_model", "_determine_batch_execution_and_padding", "_model_forward"):
            monkeypatch.setattr(GPUModelRunner, name, getattr(GPUModelRunner, name))
        model_runner_v1.apply()
        tracing, other = (v1_rank(loaded, rank, monkeypatch) for rank in range(2))
        capture = SimpleNamespace(records_step=traces)
        setattr(tracing, worker_runner._ATTRIBUTE, capture)
        mine, theirs = in_step(
            lambda: v1_choice(tracing, 13, 2, force_eager=False), lambda: v1_choice(other, *peer)
        )
    assert mine[0] == theirs[0]  # The mode.
    assert torch.equal(mine[3], theirs[3])  # How many tokens each rank computes.
    assert [mine[1].num_tokens, theirs[1].num_tokens] == mine[3].tolist()
    if traces:
        assert mine[0] == CUDAGraphMode.NONE and mine[1].num_tokens == 13
    elif peer[0] < 16:
        assert mine[0] == CUDAGraphMode.PIECEWISE and len(set(mine[3].tolist())) == 1


def v1_rank(loaded: V2Engine, rank: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    runner = v1_runner(loaded, CUDAGraphMode.PIECEWISE, monkeypatch)
    parallel = copy.copy(loaded.config.parallel_config)
    parallel.__dict__.update(data_parallel_size=2, data_parallel_rank=rank)
    runner.vllm_config = copy.copy(loaded.config)
    runner.vllm_config.__dict__["parallel_config"] = runner.parallel_config = parallel
    return runner


def v1_choice(runner: Any, tokens: int, requests: int, **more: Any) -> Any:
    counts = np.full(requests, tokens // requests, dtype=np.int32)
    counts[0] += tokens - counts.sum()
    return runner._determine_batch_execution_and_padding(
        tokens, requests, counts, int(counts.max()), **more
    )


@pytest.mark.usefixtures("ranks_exchange")
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("traces", [False, True])
def test_v2_of_data_parallel_ranks(
    traces: bool, peer: tuple[int, int], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with v2_engine(tiny_llama, monkeypatch) as loaded:
        manager = loaded.use_graphs(CUDAGraphMode.PIECEWISE, SIZES, monkeypatch)
        stock = dp_utils_v2.dispatch_cg_and_sync_dp
        step = SimpleNamespace(capture=SimpleNamespace(records_step=traces))
        monkeypatch.setattr(model_runner_v2, "_running", step)
        patched = model_runner_v2.dispatch_wrapper(stock)

        def choice(dispatch: Any, rank: int, tokens: int, requests: int) -> Any:
            return dispatch(manager, requests, tokens, None, 2, rank, need_eager=False)

        mine, theirs = in_step(lambda: choice(patched, 0, 13, 2), lambda: choice(stock, 1, *peer))
    assert mine[0].cg_mode == theirs[0].cg_mode
    assert torch.equal(mine[1].num_tokens_across_dp, theirs[1].num_tokens_across_dp)
    found = [mine[0].num_tokens, theirs[0].num_tokens]
    assert found == mine[1].num_tokens_across_dp.tolist()
    if traces:
        assert mine[0].cg_mode == CUDAGraphMode.NONE and found == [13, peer[0]]
    else:
        assert mine[0].cg_mode == CUDAGraphMode.PIECEWISE and len(set(found)) == 1


def test_targets_are_told_from_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Preempted requests start again; a forged spec is an ordinary request on every rank."""
    steps = TargetSteps()
    trace: Traced = traced(60, (40, 60))
    maker = StepMaker(16)
    forged = (trace.token_ids, bytes(len(trace.new[1])))
    assert not steps.includes(maker.step({"forged": 60}, new={"forged": forged}))
    assert not steps.includes(maker.step({"t": 40}, new={"t": trace.new}))
    assert steps.includes(maker.step({"t": 1}))
    again = maker.step({"t": 24}, new={"t": trace.new}, hits={"t": 16}, preempted=["t"])
    assert not steps.includes(again)
    assert steps.includes(maker.step({"t": 1}))
    assert not steps.includes(maker.step({"t": 1}, finished=["t"]))
    assert torch.equal(trace.weights.positions, torch.arange(40, 60))
