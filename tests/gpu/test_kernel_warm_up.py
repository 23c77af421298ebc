"""A GPU worker compiles, before it serves, every kernel that its traces launch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.gpu_worker import Worker

from tests.gpu.standin import BACKENDS, CPU
from tests.gpu.test_fp8_cache import layers, quantize_queries
from tests.gpu.v2_engine import V2Engine, apply_patches, traced, untraced, v2_engine
from tests.kernels.compiler import Variants, variants_only
from tests.quantized_models import SCHEMES, make_quantized_model
from tests.tiny_models import make_tiny_model
from vllm_flashtrace.base.errors import UnsupportedModelError
from vllm_flashtrace.kernels import paged_attention, paged_proximity, sum_shares
from vllm_flashtrace.kernels.triton_column_sums import (
    triton_column_sums,
    triton_kept_column_sums,
)
from vllm_flashtrace.kernels.triton_proximity import triton_proximities, triton_sum_shares
from vllm_flashtrace.kernels.triton_row_sums import triton_inverse_rms, triton_row_sums
from vllm_flashtrace.patches import worker_start
from vllm_flashtrace.patches._check import PatchError
from vllm_flashtrace.worker import (
    finish,
    gpu_latents,
    gpu_model,
    row_groups,
    runner,
    traced_model,
    warm_up,
)
from vllm_flashtrace.worker.gpu_model import GPUTracedModel
from vllm_flashtrace.worker.runner import worker_report


@pytest.fixture(scope="module", autouse=True)
def _patched() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        apply_patches(patch)
        yield


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a worker of an engine, on a device that says it is a GPU."""
    monkeypatch.setattr(
        warm_up, "GPUTracedModel", lambda model, config, _: GPUTracedModel(model, config, CPU)
    )

    def make(engine: V2Engine) -> Any:
        runner = SimpleNamespace(
            device=torch.device("cuda"),
            vllm_config=engine.config,
            kv_cache_config=engine.cache.kv_cache_config,
            get_model=lambda: engine.model,
        )
        return SimpleNamespace(model_runner=runner)

    return make


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The warnings that are logged."""
    lines: list[str] = []
    monkeypatch.setattr(
        warm_up.logger, "warning", lambda message, *values: lines.append(message % values)
    )
    return lines


def launch_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch computes in the place of our kernels, their launches are made as well."""
    columns, proximity = paged_attention.torch_column_sums, paged_proximity.torch_proximities
    row_sums, kept_columns = row_groups.add_row_sums, gpu_model.add_kept_column_sums
    sizes = traced_model.inverse_rms

    def add_columns(inputs: Any, layer: int, **arguments: Any) -> None:
        triton_column_sums(inputs, layer)
        columns(inputs, layer, **arguments)

    def add_kept_columns(kept: Any, layers: Any) -> None:
        triton_kept_column_sums(kept, layers)
        kept_columns(kept, layers)

    def proximities(layers: Any, traces: Any) -> None:
        triton_proximities(layers, traces)
        proximity(layers, traces)

    def shares(proximities: Tensor, denominators: Tensor, scores: Tensor, keep: bool) -> None:
        triton_sum_shares(proximities, denominators, scores, keep=keep)
        sum_shares(proximities, denominators, scores, keep=keep)

    def add_rows(rows: Any, layer: int, **streams: Tensor) -> None:
        triton_row_sums(rows, layer, **streams)
        row_sums(rows, layer, **streams)

    def inverse_rms(*arguments: Any) -> None:
        triton_inverse_rms(*arguments)
        sizes(*arguments)

    monkeypatch.setattr(traced_model, "inverse_rms", inverse_rms)
    monkeypatch.setattr(paged_attention, "torch_column_sums", add_columns)
    monkeypatch.setattr(paged_proximity, "torch_proximities", proximities)
    monkeypatch.setattr(row_groups, "add_row_sums", add_rows)
    monkeypatch.setattr(finish, "sum_shares", shares)
    monkeypatch.setattr(gpu_model, "add_kept_column_sums", add_kept_columns)


def run_traces(engine: V2Engine) -> None:
    """One row, many rows in one step, several traces at once, chunks of any size."""
    one, two, long = (
        traced(90, (50, 75), (80, 84), seed=1),
        traced(40, (39, 40), seed=2),
        traced(700, (300, 700), seed=3),
    )
    engine.step({"other": 5}, new={"other": untraced(60, 1)})
    engine.step({"one": 61, "other": 7}, new={"one": one.new})
    engine.step({"other": 11, "one": 29, "two": 39}, new={"two": two.new})
    engine.step({"two": 1})
    engine.step({"long": 690}, new={"long": long.new})
    engine.step({"long": 10})
    for trace in (one, two, long):
        assert engine.report(trace).scores.isfinite().all()


def warmed_and_run(
    engine: V2Engine, worker: Any, monkeypatch: pytest.MonkeyPatch
) -> tuple[Variants, dict[str, Any]]:
    launch_too(monkeypatch)
    with variants_only() as found:
        warm_up.warm_up_kernels(worker)
        assert not found.launched
        run_traces(engine)
    return found, worker_report(worker)["kernels"]


@pytest.mark.parametrize("layout", ["LBNHC", "LBHNC", "BLHNC"])
@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_traces_launch_what_was_compiled(
    tiny_llama: Path, backend: str, layout: str, worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with v2_engine(tiny_llama, monkeypatch, backend, KVCacheLayout[layout]) as engine:
        found, report = warmed_and_run(engine, worker(engine), monkeypatch)
    assert len({name for name, _ in found.launched}) == 12
    assert not found.missing()
    assert report["compiled"] == len(found.warmed) and report["failures"] == []
    assert report["seconds"] >= 0


def test_normed_blocks(tmp_path: Path, worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_tiny_model("glm4", tmp_path / "glm4")
    with v2_engine(folder, monkeypatch, "TRITON_ATTN") as engine:
        monkeypatch.setattr(runner, "check_architecture", lambda _: None)
        found, _ = warmed_and_run(engine, worker(engine), monkeypatch)
    assert len({name for name, _ in found.launched}) == 13
    assert not found.missing()


def test_latent_attention(tmp_path: Path, worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of one, three or all heads are made at a time."""
    folder = make_tiny_model("deepseek_v3", tmp_path / "deepseek_v3")
    for module in (gpu_latents, gpu_model):
        monkeypatch.setattr(module, "ROOM_BYTES", 1)
    with v2_engine(folder, monkeypatch, "TRITON_MLA", block_size=16) as engine:
        monkeypatch.setattr(runner, "check_architecture", lambda _: None)
        found, report = warmed_and_run(engine, worker(engine), monkeypatch)
    assert len({name for name, _ in found.launched}) == 12
    assert not found.missing()
    assert report["compiled"] == len(found.warmed) and report["failures"] == []


def test_quantized_projections(
    tmp_path: Path, worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those in which kernels read what was made of a layer, its weight is packed or gone."""
    scheme = SCHEMES["compressed-tensors int8 W8A8 in some layers, static activations"]
    folder, _ = make_quantized_model(scheme, tmp_path, torch.float32)
    with v2_engine(folder, monkeypatch, "TRITON_ATTN") as engine:
        monkeypatch.setattr(runner, "check_architecture", lambda _: None)
        found, report = warmed_and_run(engine, worker(engine), monkeypatch)
    assert not found.missing()
    assert report["compiled"] == len(found.warmed) > 0 and report["failures"] == []


@pytest.mark.parametrize("quantized", [False, True])
def test_over_an_fp8_cache(
    tiny_llama: Path, quantized: bool, worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with v2_engine(tiny_llama, monkeypatch, "TRITON_ATTN", kv_cache_dtype="fp8") as engine:
        quantize_queries(engine, quantized)
        found, _ = warmed_and_run(engine, worker(engine), monkeypatch)
    assert len({name for name, _ in found.launched}) == 12 and not found.missing()


def test_layers_of_different_kinds(
    tiny_llama: Path, worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with v2_engine(tiny_llama, monkeypatch, "TRITON_ATTN") as engine:
        _, windowed, capped, _ = layers(engine)
        windowed.impl.sliding_window, capped.impl.logits_soft_cap = (63, 0), 30.0
        found, _ = warmed_and_run(engine, worker(engine), monkeypatch)
    assert not found.missing()
    # Sixteen-bit types have four tiles, float32 has two (32 and 64 queries) of each form.
    assert len([name for name, _ in found.warmed if name == "_lse_kernel"]) >= 6


def test_what_cannot_be_compiled_is_told_and_stops_nothing(
    tiny_llama: Path, worker: Any, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise MemoryError("no memory for a table")

    served = []
    start = worker_start.starting(lambda self: served.append(self) or "times")
    with v2_engine(tiny_llama, monkeypatch) as engine:
        made = worker(engine)
        monkeypatch.setattr(warm_up, "compile_kernels", broken)
        monkeypatch.setattr(worker_start, "prove", lambda worker: None)
        assert start(made) == "times" and served == [made]
    report = worker_report(made)["kernels"]
    assert report["compiled"] == 0 and report["failures"] == [
        "MemoryError('no memory for a table')"
    ]
    assert any("1 kernels could not be compiled before" in line for line in warnings)


def test_nothing_is_compiled_for_what_is_not_traced(
    tiny_llama: Path, worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise UnsupportedModelError("no")

    with v2_engine(tiny_llama, monkeypatch) as engine, variants_only() as found:
        on_cpu = worker(engine)
        on_cpu.model_runner.device = CPU
        warm_up.warm_up_kernels(on_cpu)
        monkeypatch.setattr(warm_up, "GPUTracedModel", refused)
        unsupported = worker(engine)
        warm_up.warm_up_kernels(unsupported)
    assert not found.warmed
    assert worker_report(on_cpu)["kernels"] is worker_report(unsupported)["kernels"] is None


def test_a_worker_is_readied_before_the_monitor_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The monitor starts within the method that is wrapped."""
    names = inspect.unwrap(Worker.compile_or_warm_up_model).__code__.co_names
    assert "_maybe_activate_jit_monitor" in names
    order: list[str] = []
    monkeypatch.setattr(worker_start, "_worker_class", lambda: Worker)
    for name in ("warm_up_kernels", "prove"):
        monkeypatch.setattr(worker_start, name, lambda worker, name=name: order.append(name))
    monkeypatch.setattr(
        Worker, "compile_or_warm_up_model", lambda self: order.append("stock, then the monitor")
    )
    worker_start.check()
    worker_start.apply()
    Worker.compile_or_warm_up_model(object())
    assert order == ["warm_up_kernels", "prove", "stock, then the monitor"]
    monkeypatch.delattr(Worker, "compile_or_warm_up_model")
    monkeypatch.setattr(Worker.__mro__[1], "compile_or_warm_up_model", lambda worker: None)
    with pytest.raises(PatchError, match="compile_or_warm_up_model"):
        worker_start.check()
