"""What recording asks of a GPU and of the host, counted over the host's real code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from tests.gpu.standin import FlashKernel
from tests.gpu.test_fp8_cache import layers
from tests.gpu.v2_engine import apply_patches, traced, v2_engine
from tests.tiny_models import make_tiny_model
from vllm_flashtrace.kernels import (
    PagedRows,
    paged_attention,
    triton_column_sums,
    triton_lse,
    triton_operands,
    triton_row_sums,
    triton_rows,
)
from vllm_flashtrace.worker import gpu_model, runner
from vllm_flashtrace.worker.step import StepRecorder

# What only describes memory that is there.
VIEWS = {
    "alias", "as_strided", "detach", "expand", "permute", "resolve_conj", "resolve_neg", "select",
    "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unflatten",
    "unsqueeze", "view", "view_as", "_reshape_alias", "_unsafe_view",
}  # fmt: skip
# What would make the host wait for the device.
WAITS = {"_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select"}
TABLES = 1 << 16
"""Bytes of the tables that a step copies to the device; no more is allocated."""


class Counted(TorchDispatchMode):
    """Counts launches: ours, and every operation of torch that is more than a view."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Counter[str]] = []
        self.allocated = 0

    def watch(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, with its launches in an entry of `calls`."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(Counter())
            with self:
                return call(*args, **kwargs)

        return watched

    def launch(self, kernel: Any, *_: Any, **__: Any) -> None:
        """Stands in for `triton_operands.launch`."""
        self.calls[-1][kernel.__name__] += 1

    def copy(self, tables: Any, device: Any) -> Any:
        """Stands in for `triton_rows.to_device`, which on the CPU copies nothing."""
        self.calls[-1]["copy to the device"] += 1
        return to_device(tables, device)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in WAITS, name
        result = func(*args, **(kwargs or {}))
        if name.startswith("empty") or name.startswith("new_"):
            self.allocated += result.nbytes
        elif name == "to" and result.data_ptr() == args[0].data_ptr():
            pass  # NumPy asks for memory of the host, which it is.
        elif name not in VIEWS:
            self.calls[-1][name] += 1
        return result


to_device = triton_rows.to_device


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Counts what the layers and the end of a step launch, as they would on a GPU."""
    counted = Counted()
    monkeypatch.setattr(paged_attention, "by_triton", lambda tensor: True)
    monkeypatch.setattr(PagedRows, "places", property(lambda rows: rows.on_device.rows))
    for module in (triton_lse, triton_column_sums, triton_row_sums):
        monkeypatch.setattr(module, "launch", counted.launch)
    for module in (triton_rows, triton_operands):
        monkeypatch.setattr(module, "to_device", counted.copy)
    for name in ("record_attention", "record_update", "flush"):
        monkeypatch.setattr(StepRecorder, name, counted.watch(getattr(StepRecorder, name)))
    return counted


def run(
    folder: Path,
    patch: pytest.MonkeyPatch,
    traces: int,
    rows: int,
    kinds: int = 1,
    told: bool = False,
) -> None:
    """A step in which so many traces have so many target rows each.

    Args:
        folder: The model.
        patch: Undoes what it takes.
        traces: How many.
        rows: Target rows of each.
        kinds: Kinds of layers.
        told: Whether FlashAttention tells the log-sum-exp.
    """
    backend = "FLASH_ATTN" if told else "TRITON_ATTN"
    with v2_engine(folder, patch, backend, max_num_batched_tokens=2048) as engine:
        apply_patches(patch)
        if told:
            FlashKernel(layers(engine), patch)
        for layer in layers(engine)[1:kinds]:
            layer.impl.sliding_window = (62, 0)
        new = {f"{n}": traced(rows + 7, (5, rows + 5), seed=n).new for n in range(traces)}
        engine.step({name: rows + 7 for name in new}, new=new)


@pytest.mark.parametrize(("traces", "rows"), [(1, 1), (1, 700), (6, 100)])
@pytest.mark.parametrize("kinds", [1, 2])
def test_few_launches_per_layer_and_step(
    tiny_llama: Path,
    counted: Counted,
    traces: int,
    rows: int,
    kinds: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Up to 1,024 rows: two per layer, and a number at the end that grows with kinds alone."""
    run(tiny_llama, monkeypatch, traces, rows, kinds)
    *layer_calls, end = counted.calls
    assert len(layer_calls) == 2 * 4
    for calls in layer_calls:
        calls.pop("copy to the device", None)  # Once, in the first.
    assert layer_calls == [{"index_select": 1}, {"_row_sums_kernel": 1}] * 4
    launches = end.total() - end.pop("copy to the device")
    assert launches <= 5 * kinds, end  # Each pass, their parts joined or added, memory cleared.
    assert end["_lse_kernel"] == end["_column_sums_kernel"] == kinds
    assert counted.allocated <= TABLES


def test_more_rows_are_added_layer_by_layer(
    tiny_llama: Path, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so are those of all steps where there is no memory to keep them."""
    monkeypatch.setattr(gpu_model, "KEPT_ROWS", 48)
    run(tiny_llama, monkeypatch, 1, 49)
    *layer_calls, end = counted.calls
    assert not end and len(layer_calls) == 2 * 4
    for attention in layer_calls[::2]:
        assert attention["_lse_kernel"] == attention["_column_sums_kernel"] == 1
        assert attention.total() - attention["copy to the device"] <= 5


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "at once"])
def test_a_log_sum_exp_that_is_told_saves_a_pass(
    kept: bool, tiny_llama: Path, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is kept that is a launch more per layer, and fewer at the end."""
    monkeypatch.setattr(gpu_model, "WORTH_KEEPING_LSE", 0)
    if not kept:
        monkeypatch.setattr(gpu_model, "KEPT_ROWS", 48)
    run(tiny_llama, monkeypatch, 1, 700, told=True)
    *layer_calls, end = counted.calls
    assert len(layer_calls) == 2 * 4
    for calls in [*layer_calls, end]:
        calls.pop("copy to the device", None)
    passes = {"_offsets_kernel", "_column_sums_kernel"}
    if kept:
        assert layer_calls == [{"index_select": 2}, {"_row_sums_kernel": 1}] * 4
        assert passes <= end.keys() <= passes | {"_add_parts_kernel"} and end.total() <= 3
        assert counted.allocated <= TABLES
    else:
        assert not end
        for calls in layer_calls[::2]:
            assert passes <= calls.keys() <= passes | {"_add_parts_kernel"} and calls.total() <= 3


def test_latents_are_read_layer_by_layer(
    tmp_path: Path, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Per layer and trace a gather, a product and a copy more; nothing waits, nothing is left."""
    monkeypatch.setattr(runner, "check_architecture", lambda _: None)
    folder = make_tiny_model("deepseek_v3", tmp_path / "deepseek_v3")
    arguments = {"block_size": 16, "max_num_batched_tokens": 2048}
    with v2_engine(folder, monkeypatch, "TRITON_MLA", **arguments) as engine:
        apply_patches(monkeypatch)
        new = {f"{n}": traced(107, (5, 105), seed=n).new for n in range(3)}
        engine.step({name: 107 for name in new}, new=new)
    *layer_calls, end = counted.calls
    assert not end and len(layer_calls) == 2 * 4
    for attention in layer_calls[::2]:
        attention.pop("copy to the device", None)
        attention.pop("arange", None)  # The room's block table, once.
        for name in ("index_select", "bmm", "copy_", "_lse_kernel", "_column_sums_kernel"):
            assert attention.pop(name) == 3
        assert attention.total() <= 3 * 3  # As above: parts joined or added, memory cleared.
