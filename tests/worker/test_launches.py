"""What the end of traces queues on a GPU, counted over the real host code.

Accumulators, cache and weights are on PyTorch's meta device: what would wait for a result raises.
"""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.compiler import variants_only
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.kernels import (
    ProximityLayer,
    ProximityTrace,
    triton_proximity,
    triton_screen,
)
from vllm_flashtrace.kernels.triton_operands import launch
from vllm_flashtrace.kernels.triton_proximity import triton_proximities
from vllm_flashtrace.trace.budget import ModelShape
from vllm_flashtrace.trace.wire import TraceSpec
from vllm_flashtrace.worker import finish
from vllm_flashtrace.worker.clock import HostClock
from vllm_flashtrace.worker.recorded_trace import Trace

META = torch.device("meta")
BUDGET = 15
"""Launches per step for the proximities of all traces that end in it, copies included."""

MODELS = {
    "8B": (ModelShape(36, 32, 8, 4096), 128),
    "70B on 8 ranks": (ModelShape(80, 8, 1, 8192), 128),
    "32B": (ModelShape(64, 40, 8, 5120), 128),
    "float32": (ModelShape(30, 9, 3, 576), 64),
}


class Launches(TorchDispatchMode):
    """Counts PyTorch's kernels and copies on the device, and what they and `empty` allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (list, tuple)) else [result]
        made = [t for t in outputs if isinstance(t, Tensor) and t.device == META]
        views = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        name = func._schema.name.removeprefix("aten::")
        if (made or name.startswith("_foreach")) and not views:
            self.largest = max([self.largest, *(t.nbytes for t in made)])
            if "empty" not in name:
                self.names.append(name)
        return result


class Model:
    """A GPU model as far as the end of traces goes."""

    batched, normed, device, clock = True, False, META, HostClock()
    scaled, gate_width, measures_mass = False, 0, True

    def __init__(self, shape: ModelShape, dim: int, dtype: torch.dtype) -> None:
        self.shape = shape
        cache = torch.empty(99, shape.num_kv_heads, 16, 2 * dim, dtype=dtype, device=META)
        weight = torch.empty(shape.hidden_size, shape.num_heads * dim, dtype=dtype, device=META)
        self.layers = [
            ProximityLayer(index, cache[..., dim:], weight) for index in range(shape.num_layers)
        ]

    def replace_by_proximities(
        self, traces: list[ProximityTrace], tables: Any, adapter: None
    ) -> None:
        triton_proximities(self.layers, traces)


def segment_of(model: Model, tokens: int, number: int) -> Any:
    weights = TargetWeights.from_spans([(tokens - 2, tokens)])
    trace = Trace(TraceSpec.create(weights, tokens, exact_fraction=1.0), model)  # type: ignore[arg-type]
    trace.stream_lacks_residual = True
    table = torch.zeros(-(-tokens // 16), dtype=torch.int32, device=META)
    row = types.SimpleNamespace(req_id=str(number), block_tables=[table])
    rows = types.SimpleNamespace(sums=trace.sums, mass=trace.mass)
    return types.SimpleNamespace(trace=trace, batch_row=row, row_segment=rows)


@pytest.mark.parametrize("lengths", [[2048], [32_768], [770] * 8, [300 + n for n in range(64)]])
@pytest.mark.parametrize("name", MODELS)
def test_launches_of_proximities(
    name: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither layers nor traces add launches, and memory beside the accumulators is bounded."""
    shape, dim = MODELS[name]
    model = Model(shape, dim, torch.float32 if name == "float32" else torch.bfloat16)
    segments = [segment_of(model, *each) for each in zip(lengths, range(99), strict=False)]
    launched: list[str] = []

    def counted(kernel: Any, *args: Any, **constants: Any) -> None:
        launched.append(kernel.__name__)
        launch(kernel, *args, **constants)

    for module in (triton_proximity, triton_screen):
        monkeypatch.setattr(module, "launch", counted)
    failed: dict[str, BaseException] = {}
    with variants_only(), Launches() as launches:
        measured = finish.measure(segments, model, failed.__setitem__)  # type: ignore[arg-type]
    assert len(measured) == len(lengths) and not failed
    assert 0 < len(launched) + len(launches.names) <= BUDGET, (launched, launches.names)
    assert launches.largest <= triton_proximity.SCRATCH_BYTES
