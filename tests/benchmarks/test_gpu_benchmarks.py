"""The GPU benchmarks run here as far as anything can without a GPU: all but CUDA's clock."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu_checks, gpu_engine, gpu_kernels, gpu_shapes, gpu_tables
from benchmarks.gpu_cases import BLOCK_SIZES, HEAD_SIZES, RATIOS, Case, Part, full_grid
from benchmarks.gpu_correctness import run_checks
from benchmarks.gpu_engine_process import EngineFailedError, EngineSpec, running
from benchmarks.gpu_forms import Forms
from benchmarks.gpu_inputs import LAYER, make_inputs
from benchmarks.gpu_shapes import FAR_SHARE, Layer, ProximityInputs, Shape
from benchmarks.gpu_timing import Cost, Measured, Peak
from vllm_flashtrace import kernels
from vllm_flashtrace.kernels import AttentionForm, PagedRows

CPU = torch.device("cpu")
CASE = Case(
    query="float32",
    cache="float32",
    head_dim=16,
    hidden=48,
    parts=(Part(9, 40, gaps=True), Part(2, 21)),
)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Tensors here are tiny; more threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- the scripts ----------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", [gpu_kernels, gpu_engine])
def test_without_a_gpu_it_says_so(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([]) == 2
    assert capsys.readouterr().err.startswith("no CUDA device; --")


def test_dry_run_checks_and_times_every_kernel(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    arguments = ["--interpret", "--repeats", "1", "--jobs", "2", "--json", str(output)]
    assert gpu_kernels.main(arguments) == 0
    result = json.loads(output.read_text())
    checked = result["correctness"]
    assert (checked["cases"], checked["failed"], checked["not_run"]) == (3, 0, [])
    compared = {"lse", "column_sums", "column_sums_chunked", "row_sums", "proximity"}
    assert set(checked["errors"]) == {"float32", "narrower"}
    assert all(set(e) == {*compared, "proximity_0.9"} for e in checked["errors"].values())
    assert result["complete"]
    assert {row["operation"] for row in result["timings"]} == {
        "PyTorch attention",
        "paged_lse",
        "first pass",
        "second pass",
        "paged_column_sums",
        "paged_column_sums, first layer",
        "add_row_sums",
        "proximity, exact fraction 0.9",
        "proximity, exact fraction 1.0",
    }
    table = gpu_tables.gpu_kernels(result)
    assert "3 of 3 cases agree with float64" in table
    assert table.count("| tiny | 48 |") == 3  # Two numbers of rows, and the proximities.


def test_dry_run_looks_for_tiles_and_puts_them_back(tmp_path: Path) -> None:
    from vllm_flashtrace.kernels import triton_column_sums, triton_lse
    from vllm_flashtrace.kernels import triton_proximity as triton_overshoot

    modules = (triton_lse, triton_column_sums, triton_overshoot)
    before = [dict(module._TILES) for module in modules]
    output = tmp_path / "tiles.json"
    assert gpu_kernels.main(["--interpret", "--tune", "--repeats", "1", "--json", str(output)]) == 0
    tiles = json.loads(output.read_text())["tiles"]
    assert [row["kernel"] for row in tiles] == [m.__name__.rsplit(".", 1)[1] for m in modules]
    assert all(row["tried"] > 1 and not row["refused"] for row in tiles)
    assert [dict(module._TILES) for module in modules] == before


def test_time_that_is_up_leaves_cases_not_run() -> None:
    checked = run_checks([CASE], "cpu", 1, limit_seconds=0.0, on_done=lambda: None)
    assert checked["not_run"] == [CASE.name]
    assert checked["failed"] == 0


def test_no_timings_make_no_table() -> None:
    assert gpu_tables.gpu_kernels({"device": "any"}) == ""


# --- the comparison with float64 ------------------------------------------------------------------


def torch_forms(**replaced: Any) -> Forms:
    """The package's torch forms, some of them replaced."""
    forms = Forms(
        kernels.paged_lse,
        kernels.paged_column_sums,
        kernels.paged_lse,
        kernels.paged_column_sums,
        kernels.add_row_sums,
        kernels.proximity,
    )
    return forms._replace(**replaced)


def failures(monkeypatch: pytest.MonkeyPatch, case: Case = CASE, **replaced: Any) -> list[str]:
    monkeypatch.setattr(gpu_checks, "forms_on", lambda device: torch_forms(**replaced))
    return gpu_checks.check_case(case, "cpu").failures


@pytest.mark.parametrize("case", full_grid()[::7], ids=lambda case: case.name)
def test_right_kernels_pass(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    assert failures(monkeypatch, case) == []


def wrong_lse(*args: Any) -> Tensor:
    return kernels.paged_lse(*args) * (1 + 1e-4)


def wrong_layer(
    query: Tensor, keys: Tensor, rows: PagedRows, form: AttentionForm, layer: int
) -> None:
    kernels.paged_column_sums(query, keys, rows, form, layer)
    rows.segments[0].sums.column_sums[1 - layer, 0, 0] += 1


def overwritten(
    query: Tensor, keys: Tensor, rows: PagedRows, form: AttentionForm, layer: int
) -> None:
    for segment in rows.segments:
        segment.sums.column_sums[layer, :, : segment.columns] = 0
    kernels.paged_column_sums(query, keys, rows, form, layer)


def poisoned(residual: Tensor, rows: PagedRows, layer: int, to: str) -> None:
    kernels.add_row_sums(residual, rows, layer, to)  # type: ignore[arg-type]
    getattr(rows.segments[0].sums, to)[layer, 3] = torch.nan


_CALLS = itertools.count()


def unsteady(*args: Any, **kwargs: Any) -> Tensor:
    """Every second call is off by less than the limit."""
    return kernels.proximity(*args, **kwargs) * (1 + 2e-6 * (next(_CALLS) % 2))


def never_less_than_the_bound(*args: Any, **kwargs: Any) -> Tensor:
    return kernels.proximity(*args, **{**kwargs, "exact_fraction": 0.0}) * 1.01


@pytest.mark.parametrize(
    ("replaced", "expected"),
    [
        ({"lse": wrong_lse}, "lse: relative error"),
        ({"column_sums": wrong_layer}, "column_sums: wrote outside"),
        ({"column_sums": overwritten}, "column_sums_chunked: relative error"),
        ({"row_sums": poisoned}, "row_sums: relative error"),
        ({"proximity": unsteady}, "proximity: a second call gives other bits"),
        ({"proximity": never_less_than_the_bound}, "proximity_0.9: relative error"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_kernels_fail(replaced: Any, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = failures(monkeypatch, **replaced)
    assert any(line.startswith(expected) for line in found), found


def test_a_kernel_that_raises_is_a_failed_case(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_resources(*_: Any) -> Tensor:
        raise RuntimeError("out of resource: shared memory")

    [line] = failures(monkeypatch, lse=out_of_resources)
    assert line == "RuntimeError: out of resource: shared memory"


def test_the_grid_covers_every_feature() -> None:
    cases = full_grid()
    assert len({case.name for case in cases}) == len(cases)
    for dtype in ("bfloat16", "float16", "float32"):
        plain = [case for case in cases if case.query == case.cache == dtype]
        assert {case.head_dim for case in plain} == set(HEAD_SIZES)
    crossed = {(case.shared, case.block_size) for case in cases}
    assert crossed >= {(ratio, size) for ratio in RATIOS for size in BLOCK_SIZES}
    assert {case.layout for case in cases} == {"HND", "NHD"}
    assert {"float8_e4m3fn", "float8_e5m2"} <= {case.cache for case in cases}
    assert "float8_e4m3fn" in {case.query for case in cases}
    assert any(case.window and case.soft_cap and case.sinks and case.alibi for case in cases)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_what_no_trace_owns_is_not_a_number(layout: str) -> None:
    case = Case(cache="float8_e4m3fn", layout=layout, head_dim=16, parts=CASE.parts)
    inputs = make_inputs(case, CPU)
    held = sum(part.context for part in case.parts)
    for cache in (inputs.key_cache, inputs.value_cache):
        assert cache.shape[1:] == (case.groups, case.block_size, case.head_dim)
        numbers = ~cache.float().isnan()
        assert int(numbers.sum()) == held * case.groups * case.head_dim
        assert cache.shape[0] * case.block_size > held
    assert inputs.key_cache.stride(1) > inputs.key_cache.stride(2) or layout == "NHD"
    rows = torch.cat([trace.rows for trace in inputs.traces])
    assert inputs.residual.isfinite().all(dim=1).nonzero().flatten().tolist() == rows.tolist()
    assert inputs.accumulators()[1].column_sums[LAYER].count_nonzero() > 0


# --- floors and shapes ----------------------------------------------------------------------------


def test_costs_count_what_a_causal_mask_leaves() -> None:
    layer = Layer.draw(Shape("tiny", 4, 2, 16, 48), 50, 7, CPU)
    positions = layer.rows.segments[0].positions
    assert layer.pairs == int((positions + 1).sum())
    assert layer.attention_cost(2).flops == 2 * 4 * 2 * 16 * layer.pairs
    assert layer.whole_attention_cost().flops == layer.attention_cost(2).flops
    assert layer.whole_attention_cost().bytes == 2 * 16 * (2 * 7 * 4 + 2 * 50 * 2)


def test_the_floor_is_the_longer_of_products_and_memory() -> None:
    peak = Peak(flops=1e12, bytes=1e11, exponentials=1e10)
    bound = Measured(ms=10.0, host_ms=1.0).against(Cost(1e9, 4e8, 1e7), peak)
    assert bound["floor_ms"] == pytest.approx(4.0)
    assert bound["ratio_to_floor"] == pytest.approx(2.5)
    assert bound["exponentials_ms"] == pytest.approx(1.0)
    assert bound["tflops"] == pytest.approx(0.1)
    assert bound["gbs"] == pytest.approx(40.0)
    unknown = Measured(ms=10.0, host_ms=1.0).against(Cost(1e9, 4e8), None)
    assert unknown["floor_ms"] is unknown["ratio_to_floor"] is None


def test_the_stated_share_of_pairs_reaches_far() -> None:
    torch.manual_seed(0)
    layer = Layer.draw(Shape("tiny", 4, 2, 16, 256), 3000, 2, CPU)
    inputs = ProximityInputs.draw(layer)
    assert inputs.far_share == pytest.approx(FAR_SHARE, rel=0.02)
    reach = inputs.column_sums * (
        layer.values.float()
        .norm(dim=3)[layer.rows.segments[0].block_table.long()]
        .transpose(0, 1)
        .flatten(1)[:, :3000]
        .repeat_interleave(2, 0)
    )
    overshooting = (reach[:, :, None] > (inputs.stream.abs() / inputs.norms)[:, None]).sum(2)
    assert float((overshooting > 8).float().mean()) == inputs.far_share


def test_timed_rows_fit_their_context() -> None:
    assert max(gpu_shapes.ROWS) > min(gpu_shapes.CONTEXTS)  # So that some have to be left out.
    assert all(rows <= max(gpu_shapes.CONTEXTS) for rows in gpu_shapes.ROWS)


# --- engines --------------------------------------------------------------------------------------


def test_an_engine_that_is_late_is_ended(tmp_path: Path) -> None:
    before = set(multiprocessing.active_children())
    spec = EngineSpec(str(tmp_path), 512, plugin=True, runner=None, arguments={})
    with (
        pytest.raises(EngineFailedError, match="the time is up"),
        running(spec, time.monotonic() - 1),
    ):
        raise AssertionError("it cannot be ready")
    assert set(multiprocessing.active_children()) <= before
