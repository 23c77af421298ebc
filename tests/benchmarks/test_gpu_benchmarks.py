"""The GPU benchmarks run here as far as anything can without a GPU: all but CUDA's clock."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu_checks, gpu_engine, gpu_kernels, gpu_tune, tables
from benchmarks.gpu_cases import (
    BLOCK_SIZES,
    HEAD_SIZES,
    LAYER,
    RATIOS,
    Case,
    Part,
    full_grid,
    make_inputs,
)
from benchmarks.gpu_engine_process import EngineFailedError, EngineSpec, running
from benchmarks.gpu_timing import Forms
from vllm_flashtrace import kernels
from vllm_flashtrace.kernels import (
    AttentionInputs,
    triton_column_sums,
    triton_lse,
    triton_proximity,
)

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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", [gpu_kernels, gpu_engine])
def test_without_a_gpu_it_says_so(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([]) == 2
    assert capsys.readouterr().err.startswith("no CUDA device; --")


def test_dry_run_checks_and_times_every_kernel(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    arguments = ["--interpret", "--repeats", "1", "--jobs", "1", "--json", str(output)]
    assert gpu_kernels.main(arguments) == 0
    result = json.loads(output.read_text())
    checked = result["correctness"]
    assert (checked["cases"], checked["failed"], checked["not_run"]) == (3, 0, [])
    columns = {"column_sums", "column_sums_chunked", "column_sums_kept"}
    compared = {"lse", *columns, "row_sums", "proximity"}
    assert set(checked["errors"]) == {"float32", "narrower"}
    assert all(set(e) == {*compared, "proximity_0.9"} for e in checked["errors"].values())
    assert result["complete"]
    assert {row["operation"] for row in result["timings"]} == {
        "PyTorch attention",
        "paged_lse",
        "first pass",
        "second pass",
        "paged_column_sums",
        "paged_column_sums, log-sum-exp told",
        "paged_column_sums, first layer",
        "add_row_sums",
        "proximity, exact fraction 0.9",
        "proximity, exact fraction 1.0",
    }
    table = tables.gpu_kernels(result)
    assert "3 of 3 cases agree with float64" in table
    assert table.count("| tiny | 48 |") == 3  # Two numbers of rows, and the proximities.


@pytest.mark.parametrize("module", [triton_lse, triton_column_sums, triton_proximity])
def test_every_tile_has_neighbours(module: Any) -> None:
    """Whatever is not limited in it; each differs in one number."""
    for tile in module._TILES.values():
        neighbours = set(gpu_tune._neighbours(tile)) - {tile}
        assert len(neighbours) > len(tile)
        for other in neighbours:
            assert sum(one != two for one, two in zip(tile, other, strict=True)) == 1


def test_dry_run_looks_for_tiles_and_puts_them_back(tmp_path: Path) -> None:
    modules = (triton_lse, triton_column_sums, triton_proximity)
    before = [dict(module._TILES) for module in modules]
    output = tmp_path / "tiles.json"
    assert gpu_kernels.main(["--interpret", "--tune", "--repeats", "1", "--json", str(output)]) == 0
    tiles = json.loads(output.read_text())["tiles"]
    assert [row["kernel"] for row in tiles] == [m.__name__.rsplit(".", 1)[1] for m in modules]
    assert all(row["tried"] > 1 and not row["refused"] for row in tiles)
    assert [dict(module._TILES) for module in modules] == before


def torch_forms(**replaced: Any) -> Forms:
    """The package's torch forms, some of them replaced."""
    forms = Forms(
        kernels.paged_lse,
        kernels.paged_column_sums,
        kernels.add_kept_column_sums,
        kernels.paged_lse,
        kernels.paged_column_sums,
        kernels.add_row_sums,
        kernels.replace_by_proximities,
    )
    return forms._replace(**replaced)


def failures(monkeypatch: pytest.MonkeyPatch, case: Case = CASE, **replaced: Any) -> list[str]:
    monkeypatch.setattr(gpu_checks, "forms_on", lambda device: torch_forms(**replaced))
    return gpu_checks.check_case(case, "cpu").failures


@pytest.mark.parametrize("case", full_grid()[::16], ids=lambda case: case.name)
def test_right_kernels_pass(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    assert failures(monkeypatch, case) == []


def wrong_lse(*args: Any) -> Tensor:
    return kernels.paged_lse(*args) * (1 + 1e-4)


def wrong_layer(inputs: AttentionInputs, layer: int) -> None:
    kernels.paged_column_sums(inputs, layer)
    inputs.rows.segments[0].sums.column_sums[1 - layer, 0, 0] += 1


def overwritten(inputs: AttentionInputs, layer: int) -> None:
    for segment in inputs.rows.segments:
        segment.sums.column_sums[layer, :, : segment.columns] = 0
    kernels.paged_column_sums(inputs, layer)


@pytest.mark.parametrize(
    ("replaced", "expected"),
    [
        ({"lse": wrong_lse}, "lse: relative error"),
        ({"column_sums": wrong_layer}, "column_sums: wrote outside"),
        ({"column_sums": overwritten}, "column_sums_chunked: relative error"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_kernels_fail(replaced: Any, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = failures(monkeypatch, **replaced)
    assert any(line.startswith(expected) for line in found), found


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


def test_an_engine_that_is_late_is_ended(tmp_path: Path) -> None:
    before = set(multiprocessing.active_children())
    spec = EngineSpec(str(tmp_path), 512, plugin=True, runner=None, arguments={})
    with (
        pytest.raises(EngineFailedError, match="the time is up"),
        running(spec, time.monotonic() - 1),
    ):
        raise AssertionError("it cannot be ready")
    assert set(multiprocessing.active_children()) <= before
