"""Log-sum-exps and column sums, in torch and in Triton, against their definition in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.kernels.attention import LAYERS, Case, Shape, definition, make_case, relative_error
from vllm_flashtrace.kernels import (
    AttentionForm,
    AttentionInputs,
    PagedRows,
    paged_column_sums,
    paged_lse,
    triton_rows,
)
from vllm_flashtrace.kernels import triton_column_sums as column_kernels
from vllm_flashtrace.kernels import triton_lse as lse_kernels

BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LAYER = 1
# Rows one after another, rows with gaps, a single row; a short trace and a longer one.
SEVERAL = ([*range(20, 37)], [3, 4, 9, *range(40, 60)], [5])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that small cases fill several of."""
    for module, tile in (
        (lse_kernels, lse_kernels.Tile(32, 16, 4, 2)),
        (column_kernels, column_kernels.Tile(16, 16, 4, 2)),
    ):
        monkeypatch.setattr(module, "_TILES", dict.fromkeys(module._TILES, tile))


@pytest.fixture(params=["uncut", "cut"])
def cutting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work is cut only where there are too few programs for a GPU, here never and always."""
    monkeypatch.setattr(triton_rows, "_ENOUGH_PROGRAMS", 1 if request.param == "uncut" else 4096)
    yield


def form_of(heads: int, **features: float) -> AttentionForm:
    generator = torch.Generator().manual_seed(7)
    for name in ("alibi_slopes", "sinks"):
        if name in features:
            features[name] = features[name] * torch.rand(heads, generator=generator)  # type: ignore[assignment]
    return AttentionForm(**{"scale": 0.15, **features})  # type: ignore[arg-type]


def triton_forms(case: Case, form: AttentionForm, layer: int = LAYER) -> Tensor:
    inputs = case.inputs(form)
    lse = lse_kernels.triton_lse(inputs)
    column_kernels.triton_column_sums(inputs, layer, lse_kernels.row_offsets(inputs))
    return lse


def torch_forms(case: Case, form: AttentionForm, layer: int = LAYER) -> Tensor:
    lse = paged_lse(case.inputs(form))
    paged_column_sums(case.inputs(form), layer)
    return lse


def check(case: Case, form: AttentionForm, compute=triton_forms) -> None:
    limit = 1e-5 if {case.query.dtype, case.cache.dtype} == {torch.float32} else 1e-3
    lses, sums = definition(case, form)
    ours = compute(case, form)
    assert ours.shape == lses.shape and ours.dtype == torch.float32
    assert relative_error(ours, lses) <= limit
    for accumulated, expected in zip(case.sums, sums, strict=True):
        tokens = expected.shape[1]
        assert relative_error(accumulated[LAYER, :, :tokens], expected) <= limit
        assert not accumulated[LAYER, :, tokens:].any(), "columns behind the last key"
        assert not accumulated[[i for i in range(LAYERS) if i != LAYER]].any(), "other layers"


FORMS = {
    "plain": {},
    "window": {"sliding_window": 13},
    "window of one": {"sliding_window": 1},
    "window beyond": {"sliding_window": 10_000},
    "cap": {"soft_cap": 1.5},
    "alibi": {"alibi_slopes": 0.3},
    "sinks": {"sinks": 4.0},
    "window, cap and sinks": {"sliding_window": 20, "soft_cap": 2.0, "sinks": -2.0},
    "window, cap and alibi": {"sliding_window": 50, "soft_cap": 2.0, "alibi_slopes": 0.1},
}


@pytest.mark.parametrize("features", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("compute", [torch_forms, triton_forms])
def test_attention_forms(features, compute, cutting) -> None:
    shape = Shape(dim=64)
    check(make_case(shape, SEVERAL), form_of(shape.heads, **features), compute)


SHAPES = [
    Shape(groups=1, shared=1, dim=64, block_size=16, dtype=BFLOAT16),
    Shape(groups=1, shared=7, dim=80, block_size=32, dtype=BFLOAT16, tokens_first=True),
    Shape(groups=2, shared=4, dim=96, block_size=48, dtype=FLOAT16),
    Shape(groups=2, shared=5, dim=128, block_size=128, dtype=BFLOAT16, tokens_first=True),
    Shape(groups=1, shared=8, dim=192, block_size=16, dtype=FLOAT16, tokens_first=True),
    Shape(groups=1, shared=2, dim=256, block_size=64, dtype=BFLOAT16),
    Shape(groups=4, shared=1, dim=128, block_size=17, dtype=torch.float32, tokens_first=True),
    Shape(groups=1, shared=3, dim=256, block_size=16, dtype=torch.float32),
    Shape(groups=1, shared=17, dim=64, block_size=16, dtype=torch.float32),
    Shape(dim=64, dtype=E4M3, query_dtype=BFLOAT16),
    Shape(dim=128, dtype=E5M2, query_dtype=FLOAT16, tokens_first=True),
    Shape(dim=64, dtype=E4M3, query_dtype=E4M3),
    Shape(dim=64, dtype=E4M3, query_dtype=torch.float32),
    Shape(dim=64, dtype=FLOAT16, query_dtype=torch.float32),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("compute", [torch_forms, triton_forms])
def test_shapes_and_types(shape: Shape, compute) -> None:
    check(make_case(shape, SEVERAL), form_of(shape.heads), compute)


@pytest.mark.parametrize("compute", [torch_forms, triton_forms])
def test_attention_to_one_token(compute, cutting) -> None:
    """Logits of a hundred, of both signs."""
    shape = Shape(dim=64)
    check(make_case(shape, SEVERAL, spread=30.0), form_of(shape.heads), compute)


def test_tiles_of_the_size_a_gpu_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    shape = Shape(dim=64, dtype=BFLOAT16)
    check(make_case(shape, [[*range(90, 240)]]), form_of(shape.heads))


def test_a_target_may_come_in_pieces(cutting) -> None:
    shape = Shape(dim=64)
    case, form = make_case(shape, SEVERAL), form_of(shape.heads)
    triton_forms(case, form)
    whole = [sums.clone() for sums in case.sums]
    for piece in (slice(0, 5), slice(5, None)):
        segments = [
            replace(s, rows=s.rows[piece], positions=s.positions[piece], weights=s.weights[piece])
            for s in case.rows.segments
            if len(s.rows[piece])
        ]
        triton_forms(
            replace(case, rows=PagedRows.build(segments, shape.heads, 2, case.rows.device)), form, 2
        )
    for sums, expected in zip(case.sums, whole, strict=True):
        torch.testing.assert_close(sums[2], expected[LAYER], rtol=1e-5, atol=1e-6)


def test_the_same_bits_again_and_beside_other_traces(cutting) -> None:
    shape = Shape(dim=64, dtype=BFLOAT16)
    case, form = make_case(shape, SEVERAL), form_of(shape.heads)
    lse = triton_forms(case, form)
    assert torch.equal(triton_forms(case, form, 2), lse)
    # The longest segment decides the tiles of all, so it is the one that can be alone.
    alone = case.one(1)
    triton_forms(alone, form)
    for sums in case.sums:
        assert torch.equal(sums[LAYER], sums[2])
    assert torch.equal(alone.sums[0][LAYER], case.sums[1][LAYER])


@pytest.mark.parametrize("compute", [torch_forms, triton_forms])
def test_what_is_not_a_number_stays_visible(compute, cutting) -> None:
    """A broken query or key must make the sums NaN, for the trace to fail and not to lie."""
    shape = Shape(dim=64)
    form = form_of(shape.heads)
    case = make_case(shape, SEVERAL)
    case.query[case.rows.segments[1].rows[-1]] = torch.nan
    compute(case, form)
    assert case.sums[1][LAYER].isnan().any() and not case.sums[0][LAYER].isnan().any()
    case = make_case(shape, SEVERAL)
    segment = case.rows.segments[0]
    case.cache[segment.block_table[1], :, 2] = torch.nan
    compute(case, form)
    assert case.sums[0][LAYER].isnan().any() and not case.sums[1][LAYER].isnan().any()


def test_only_a_float32_view_may_be_overwritten() -> None:
    shape = Shape(dim=64, block_size=128)
    case, form = make_case(shape, [[*range(20, 37)]]), form_of(shape.heads)
    before = case.cache.clone()
    paged_column_sums(case.inputs(form), LAYER)
    assert torch.equal(case.cache.nan_to_num(7), before.nan_to_num(7))
    paged_column_sums(case.inputs(form), 2, overwrite_keys=True)
    assert not torch.equal(case.cache.nan_to_num(7), before.nan_to_num(7))
    assert torch.equal(case.sums[0][LAYER], case.sums[0][2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(99, 6, 32)}, "do not fit 6 heads"),
        ({"query": torch.zeros(99, 384)}, "of four dimensions"),
        ({"query": torch.zeros(99, 6, 64, dtype=torch.float64)}, "do not fit"),
        ({"key_cache": torch.zeros(20, 3, 16, 64)}, "do not fit 6 heads over 2"),
        ({"key_cache": torch.zeros(20, 2, 16, 64, dtype=torch.int8)}, "do not fit"),
        ({"key_cache": torch.zeros(20, 2, 2, 64)}, "does not hold"),
    ],
)
def test_misfits_are_refused(change, message: str) -> None:
    case, form = make_case(Shape(dim=64), SEVERAL), form_of(6)
    arguments = {"query": case.query, "key_cache": case.cache, **change}
    with pytest.raises(ValueError, match=message):
        AttentionInputs(**arguments, rows=case.rows, form=form)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"scale": 0.0}, "scale"),
        ({"scale": float("nan")}, "scale"),
        ({"scale": 1.0, "sliding_window": 0}, "sliding_window"),
        ({"scale": 1.0, "soft_cap": -1.0}, "soft_cap"),
        ({"scale": 1.0, "soft_cap": float("inf")}, "soft_cap"),
    ],
)
def test_forms_out_of_range_are_refused(numbers, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionForm(**numbers)
