"""How much of a GPU's memory accumulators may take beside vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_flashtrace.trace.budget import ModelShape
from vllm_flashtrace.trace.config import FlashTraceConfig
from vllm_flashtrace.worker import gpu_model
from vllm_flashtrace.worker.gpu_latents import LatentRoom
from vllm_flashtrace.worker.gpu_model import GPUTracedModel, device_memory_limit
from vllm_flashtrace.worker.host_buffers import HostBuffers
from vllm_flashtrace.worker.layers import HeadSizes
from vllm_flashtrace.worker.recorder import Recorder
from vllm_flashtrace.worker.runner import RunnerCapture, activation_bytes

GPU = torch.device("cuda", 0)
GIB = 1 << 30
PAGE = 1 << 16


def segment(free: int, pool: tuple[int, int] = (0, 0), device: int = 0) -> dict[str, Any]:
    return {
        "device": device,
        "segment_pool_id": pool,
        "total_size": free + 7,
        "allocated_size": 7,
    }


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the driver and PyTorch say."""
    said = SimpleNamespace(free=12 * GIB, segments=[])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (said.free, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: said.segments)
    return said


def test_activations_are_not_ours(memory: Any) -> None:
    """vLLM frees what it found to need for activations, so it looks free until a large step."""
    assert device_memory_limit(GPU) == 6 * GIB
    assert device_memory_limit(GPU, 8 * GIB) == 2 * GIB
    assert device_memory_limit(GPU, 20 * GIB) == 0


def test_it_does_not_matter_whether_a_step_has_run(memory: Any) -> None:
    """PyTorch then keeps the activations' memory; that of graphs or another GPU is no use."""
    before = device_memory_limit(GPU, 8 * GIB)
    memory.free -= 8 * GIB
    memory.segments = [segment(5 * GIB), segment(3 * GIB)]
    assert device_memory_limit(GPU, 8 * GIB) == before
    memory.segments = [segment(8 * GIB, (1, 1)), segment(8 * GIB, device=1)]
    assert device_memory_limit(GPU, 8 * GIB) == 0


def test_the_option_only_lowers_it(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    warned: list[str] = []
    monkeypatch.setattr(gpu_model.logger, "warning", lambda text, *args: warned.append(text % args))
    model = SimpleNamespace(device=GPU)
    limit: Any = GPUTracedModel.accumulator_limit_bytes
    assert limit(model, None, 8 * GIB) == 2 * GIB
    assert limit(model, 512, 8 * GIB) == GIB // 2 and not warned
    assert limit(model, 4096, 8 * GIB) == 2 * GIB
    assert warned == [
        "max_accumulator_mib is 4096, but cuda:0 has room for 2048 MiB of accumulators"
    ]


def test_what_kept_queries_take(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1,024 rows, of as many as fit 512 MiB and a quarter of the limit, or of none."""
    taken: list[int] = []
    monkeypatch.setattr(torch, "empty", lambda size, **_: taken.append(size) or size)
    layers, heads = 36, 32
    row = layers * heads * (128 * 2 * 9 // 8 + 4)
    model: Any = GPUTracedModel.__new__(GPUTracedModel)
    vars(model).update(
        device=GPU, _head_dim=128, _dtype=torch.bfloat16, _scratch=None, _kept_rows=0, layers=[],
        _room=None, shape=ModelShape(layers, heads, 8, 4096),
    )  # fmt: skip
    take: Any = GPUTracedModel.take_scratch
    for free, rows in ((12, 1024), (2, 256 // 16 * 16 * (GIB // 4) // (row * 256)), (0, 0)):
        memory.free = free * GIB
        take(model, 0)
        expected = min(1024, (min(512 << 20, free * GIB // 8)) // row // 16 * 16)
        assert model._kept_rows == expected and taken[-1] == expected * row
        assert rows >= expected
    model._scratch, model._kept_rows = None, 0

    def refuse(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch, "empty", refuse)
    take(model, 0)
    assert model._scratch is None and model._kept_rows == 0


def test_what_the_room_of_latent_attention_takes(
    memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All heads of the longest context, 256 MiB or a quarter of the limit, or one head."""
    taken: list[int] = []
    room: Any = LatentRoom(HeadSizes(128, 128, 192, 128), torch.bfloat16, torch.device("cpu"))
    monkeypatch.setattr(room, "take", taken.append)
    model: Any = GPUTracedModel.__new__(GPUTracedModel)
    vars(model).update(device=GPU, layers=[], _room=room, _scratch=None, _longest=163_840)
    one = 163_840 * 192 * 2
    for free, expected in ((12 * GIB, 256 << 20), (GIB, GIB // 8), (GIB // 16, one)):
        memory.free = free
        GPUTracedModel.take_scratch(model, 0)
        assert taken.pop() == expected
    memory.free, model._longest = 12 * GIB, 1024
    GPUTracedModel.take_scratch(model, 0)
    assert taken.pop() == 1024 * 192 * 2 * 128 and model._scratch is None

    def refuse(_: int) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(room, "take", refuse)
    GPUTracedModel.take_scratch(model, 0)


@pytest.mark.parametrize(("estimates", "expected"), [("1", 3), ("0", 5)])
def test_activations_by_vllms_word(
    estimates: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS", estimates)
    worker = SimpleNamespace(peak_activation_memory=5, cudagraph_memory_estimate=2)
    assert activation_bytes(worker) == expected
    assert activation_bytes(SimpleNamespace()) == 0


@pytest.mark.parametrize(("alone", "hops"), [(True, 9), (False, 1)])
def test_memory_of_results_is_taken_for_all_hops(alone: bool, hops: int) -> None:
    """A worker that is alone copies those of all hops at once, masses included."""
    layers, heads, longest, places = 36, 32, 1000, 3
    model: Any = SimpleNamespace(
        shape=ModelShape(layers, heads, 8, 64),
        device=torch.device("cuda"),
        measures_mass=True,
        scaled=False,
        take_scratch=lambda _: None,
        accumulator_limit_bytes=lambda *_: 1 << 30,
        row_bytes=lambda: 30,
    )
    capture = object.__new__(RunnerCapture)
    capture._model, capture.recorder = model, Recorder(model, 60.0)
    buffers = capture.recorder.buffers = HostBuffers(torch.device("cpu"), lambda: False)
    capture._config = FlashTraceConfig()
    capture._alone, capture._longest, capture._places = alone, longest, places
    capture.settle_budget()
    taken = buffers.allocated_bytes
    numbers = torch.zeros(hops, layers, dtype=torch.float64)
    masses = torch.zeros(hops, layers, heads, 3)
    result = [torch.zeros(hops, longest), numbers, masses, torch.zeros(2, dtype=torch.int64)]
    copies = [buffers.copy(result) for _ in range(places)]
    assert buffers.allocated_bytes == taken < places * (sum(t.nbytes for t in result) + PAGE)
    buffers.copy([copies[0].tensors[0]])
    assert buffers.allocated_bytes > taken


@pytest.mark.parametrize("alone", [True, False])
def test_the_budget_is_measured_when_first_asked_for(alone: bool) -> None:
    """Not when the capture is made, which may be before CUDA graphs are captured.

    What is kept of queries is allocated before, so it is not among what is free.
    """
    asked: list[tuple[int | None, int]] = []

    class Model:
        shape, device, normed = ModelShape(2, 2, 2, 8), torch.device("cpu"), False
        measures_mass = False
        scaled = False

        def take_scratch(self, activations: int) -> None:
            assert not asked and activations == 77

        def accumulator_limit_bytes(self, option: int | None, activations: int) -> int:
            asked.append((option, activations))
            return 1000

        def row_bytes(self) -> int:
            return 30

    model: Any = Model()
    capture = object.__new__(RunnerCapture)
    capture._model, capture.recorder = model, Recorder(model, 60.0)
    capture._config = SimpleNamespace(max_accumulator_mib=5)  # type: ignore[assignment]
    capture._alone = alone
    assert capture.recorder.budget is None
    capture.settle_budget(77)
    capture.settle_budget(99)
    budget = capture.recorder.budget
    assert budget is not None and asked == [(5, 77)]
    assert (budget.limit_bytes, budget.bytes_per_row) == (1000, 30 if alone else 0)
