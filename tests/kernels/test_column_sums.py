"""Log-sum-exps and column sums, in torch and in Triton, against their definition in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.kernels.attention import LAYERS, Case, Shape, definition, make_case, relative_error
from vllm_flashtrace.kernels import (
    AttentionForm,
    AttentionInputs,
    KeptQueries,
    LayerKeys,
    PagedRows,
    SumsTouchedError,
    add_kept_column_sums,
    paged_attention,
    paged_column_sums,
    paged_lse,
    triton_operands,
    triton_rows,
)
from vllm_flashtrace.kernels import triton_column_sums as column_kernels
from vllm_flashtrace.kernels import triton_lse as lse_kernels

BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LAYER = 1
# Rows one after another, rows with gaps, a single row; a short trace and a longer one.
SEVERAL = ([*range(15, 32)], [3, 4, 9, *range(24, 44)], [5])
# The interpreter's time goes with the number of heads.
FEW_HEADS = Shape(shared=2)
TWO_HEADS = Shape(shared=1)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that small cases fill several of."""
    for module, tile in (
        (lse_kernels, lse_kernels.Tile(32, 16, 4, 2)),
        (column_kernels, column_kernels.Tile(16, 16, 4, 2)),
    ):
        monkeypatch.setattr(module, "_TILES", dict.fromkeys(module._TILES, tile))


@pytest.fixture(params=["uncut", "cut"])
def cutting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Work is cut only where there are too few programs for a GPU, here never and always."""
    monkeypatch.setattr(triton_rows, "_ENOUGH_PROGRAMS", 1 if request.param == "uncut" else 4096)
    return str(request.param)


def form_of(heads: int, **features: float) -> AttentionForm:
    generator = torch.Generator().manual_seed(7)
    for name in ("alibi_slopes", "sinks"):
        if name in features:
            features[name] = features[name] * torch.rand(heads, generator=generator)  # type: ignore[assignment]
    return AttentionForm(**{"scale": 0.15, **features})  # type: ignore[arg-type]


def triton_forms(case: Case, form: AttentionForm, layer: int = LAYER) -> Tensor:
    inputs = case.inputs(form)
    lse = lse_kernels.triton_lse(inputs)
    column_kernels.triton_column_sums(inputs, layer)
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
    "chunks": {"chunk_size": 13},
    "chunks of one": {"chunk_size": 1},
    "chunks beyond": {"chunk_size": 10_000},
    "cap": {"soft_cap": 1.5},
    "alibi": {"alibi_slopes": 0.3},
    "sinks": {"sinks": 4.0},
    "window, cap and sinks": {"sliding_window": 20, "soft_cap": 2.0, "sinks": -2.0},
    "window, cap and alibi": {"sliding_window": 30, "soft_cap": 2.0, "alibi_slopes": 0.1},
    "chunks, cap and sinks": {"chunk_size": 16, "soft_cap": 2.0, "sinks": -2.0},
}


def check_form(name: str, compute) -> None:
    # Three heads do not fill a tile: some of its queries are none, but have a slope or a sink.
    shape = Shape(shared=3) if name in ("alibi", "sinks") else FEW_HEADS
    check(make_case(shape, SEVERAL), form_of(shape.heads, **FORMS[name]), compute)


@pytest.mark.parametrize("name", FORMS)
def test_attention_forms_in_torch(name: str) -> None:
    check_form(name, torch_forms)


# Cutting meets what decides which keys are seen, and the sink, which is in one part alone.
CUT = ["plain", "window", "window of one", "chunks", "sinks", "window, cap and sinks"]


@pytest.mark.parametrize(
    ("cutting", "name"),
    [*(("uncut", name) for name in FORMS), *(("cut", name) for name in CUT)],
    indirect=["cutting"],
)
def test_attention_forms(name: str, cutting) -> None:
    check_form(name, triton_forms)


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
    Shape(groups=3, shared=1, dim=192, block_size=64, dtype=BFLOAT16, heads_first=True),
    Shape(groups=5, shared=1, dim=21, block_size=64, dtype=torch.float32, heads_first=True),
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


def told(case: Case, form: AttentionForm) -> Tensor:
    """The log-sum-exp of the rows as an engine tells it, ``[H, tokens]``; that of others is NaN."""
    lses, _ = definition(case, form)
    lse = torch.full((case.rows.num_heads, len(case.query)), torch.nan)
    lse[:, torch.cat([segment.rows for segment in case.rows.segments])] = lses.t().float()
    return lse


def measured(case: Case) -> Case:
    """The case with memory for the masses of its segments."""
    rows = case.rows
    masses = [torch.zeros(LAYERS, rows.num_heads, 3) for _ in rows.segments]
    segments = [replace(s, mass=mass) for s, mass in zip(rows.segments, masses, strict=True)]
    return replace(
        case, rows=PagedRows.build(segments, rows.num_heads, rows.num_kv_heads, rows.device)
    )


def side_by_side(case: Case) -> Case:
    """The case with the rows of all segments one after another, from an odd place on."""
    places = torch.cat([segment.rows for segment in case.rows.segments])
    query = torch.cat([torch.full_like(case.query[:3], torch.nan), case.query[places]])
    segments, first = [], 3
    for segment in case.rows.segments:
        segments.append(replace(segment, rows=first + torch.arange(len(segment.rows))))
        first += len(segment.rows)
    rows = case.rows
    built = PagedRows.build(segments, rows.num_heads, rows.num_kv_heads, rows.device)
    return replace(case, query=query, rows=built)


def check_masses(case: Case, limit: float = 1e-5) -> None:
    for segment in case.rows.segments:
        assert segment.mass is not None
        weights = segment.weights.sum()
        sums = segment.sums.column_sums[LAYER].sum(dim=-1)
        assert ((segment.mass[LAYER, :, 0] - sums).abs() <= limit * weights).all()
        assert ((segment.mass[LAYER, :, 1] - weights).abs() <= 1e-5 * weights).all()
        assert ((segment.mass[LAYER, :, 2] - sums).abs() <= 1e-5 * weights).all()
        assert not segment.mass[[i for i in range(LAYERS) if i != LAYER]].any(), "other layers"


TOLD = ["plain", "window", "chunks", "sinks", "window, cap and sinks"]


@pytest.mark.parametrize("name", TOLD)
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
def test_sums_with_a_log_sum_exp_that_is_told(name: str, dtype: torch.dtype, cutting) -> None:
    """Of rows with gaps and of rows side by side; nothing of other tokens is used."""
    shape = Shape(shared=2, dtype=dtype)
    form, limit = form_of(shape.heads, **FORMS[name]), 1e-5 if dtype == torch.float32 else 1e-3
    for case in (make_case(shape, SEVERAL), side_by_side(make_case(shape, SEVERAL))):
        lse, (_, expected) = told(case, form), definition(case, form)
        for compute in (paged_column_sums, column_kernels.triton_column_sums):
            own = measured(case)
            for sums in own.sums:
                sums.zero_()
            compute(replace(own.inputs(form), lse=lse), LAYER)
            for sums, of_segment in zip(own.sums, expected, strict=True):
                assert relative_error(sums[LAYER, :, : of_segment.shape[1]], of_segment) <= limit
            check_masses(own, limit)


@pytest.mark.parametrize("name", ["plain", "window, cap and sinks"])
def test_masses_beside_a_log_sum_exp_of_our_own(name: str, cutting) -> None:
    case, form = make_case(FEW_HEADS, SEVERAL), form_of(FEW_HEADS.heads, **FORMS[name])
    for compute in (paged_column_sums, column_kernels.triton_column_sums):
        own = measured(case)
        for sums in own.sums:
            sums.zero_()
        compute(own.inputs(form), LAYER)
        check_masses(own)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda lse: lse.roll(1, dims=1),
        lambda lse: lse.roll(1, dims=0),
        lambda lse: lse / math.log(2),
        lambda lse: lse * 1.01,
        lambda lse: lse + 2e-3,
    ],
    ids=["of the row before", "of another head", "to base 2", "1 % too large", "a little off"],
)
def test_masses_tell_what_is_wrong(wrong) -> None:
    case, form = side_by_side(make_case(TWO_HEADS, SEVERAL)), form_of(TWO_HEADS.heads, sinks=1.0)
    lse = told(case, form)
    lse = torch.where(lse.isnan(), 3.0, lse)
    for compute in (paged_column_sums, column_kernels.triton_column_sums):
        own = measured(case)
        for sums in own.sums:
            sums.zero_()
        compute(replace(own.inputs(form), lse=wrong(lse)), LAYER)
        with pytest.raises(AssertionError):
            check_masses(own, 1e-3)


@pytest.mark.parametrize(
    "lse",
    [torch.zeros(5, 99), torch.zeros(6, 9), torch.zeros(6, 99).double(), torch.zeros(99, 6).t()],
    ids=["heads", "tokens", "type", "strides"],
)
def test_a_log_sum_exp_that_does_not_fit_is_refused(lse: Tensor) -> None:
    case = make_case(Shape(dim=64), SEVERAL)
    with pytest.raises(ValueError, match="log-sum-exp"):
        replace(case.inputs(form_of(6)), lse=lse)


def test_attention_to_one_token(cutting) -> None:
    """Logits of a hundred, of both signs."""
    for compute in (torch_forms, triton_forms):
        check(make_case(FEW_HEADS, SEVERAL, spread=30.0), form_of(FEW_HEADS.heads), compute)


def test_tiles_of_the_size_a_gpu_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    shape = Shape(groups=1, dtype=BFLOAT16)
    check(make_case(shape, [[*range(90, 240)]]), form_of(shape.heads))


def test_a_target_may_come_in_pieces(cutting) -> None:
    shape = FEW_HEADS
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
    shape = Shape(shared=2, dtype=BFLOAT16)
    case, form = make_case(shape, SEVERAL), form_of(shape.heads)
    lse = triton_forms(case, form)
    assert torch.equal(triton_forms(case, form, 2), lse)
    # The longest segment decides the tiles of all, so it is the one that can be alone.
    alone = case.one(1)
    triton_forms(alone, form)
    for sums in case.sums:
        assert torch.equal(sums[LAYER], sums[2])
    assert torch.equal(alone.sums[0][LAYER], case.sums[1][LAYER])


class Step:
    """Target rows over layers of two kinds, the last with a window and another scale."""

    def __init__(self, shape: Shape, rows: int = 64) -> None:
        case = make_case(shape, SEVERAL)
        own = case.rows
        self.rows = PagedRows.build(own.segments, shape.heads, shape.groups, own.device, rows)
        self.cases = [
            Case(
                (case.query.float() * (1 + layer)).to(case.query.dtype),
                (case.cache.float() / (1 + layer)).to(case.cache.dtype),
                self.rows,
            )
            for layer in range(LAYERS)
        ]
        plain, window = form_of(shape.heads), form_of(shape.heads, sliding_window=13, scale=0.2)
        self.forms = [plain] * (LAYERS - 1) + [window]

    def at_once(self) -> list[Tensor]:
        for layer, (case, form) in enumerate(zip(self.cases, self.forms, strict=True)):
            paged_column_sums(case.inputs(form), layer)
        return self.taken()

    def kept(self, room: int = 1 << 20, lse: Sequence[Tensor] | None = None) -> KeptQueries:
        shape = self.cases[0].query.shape[1:]
        queries = 48 * shape.numel() * LAYERS * self.cases[0].query.itemsize  # 16 rows at a time
        queries += 48 * shape[0] * LAYERS * 4
        memory = torch.full((queries + max(room, queries),), 255, dtype=torch.uint8)
        dtype = self.cases[0].query.dtype
        sizes = LAYERS, shape[1], dtype
        kept = KeptQueries.within(memory, self.rows, *sizes, with_lse=lse is not None)
        assert kept is not None
        kept.room = kept.room[: room // 4]
        for layer, case in enumerate(self.cases):
            assert kept.keep(layer, case.query, None if lse is None else lse[layer])
            assert not kept.keep(layer, case.query.double())
        assert kept.layers == [*range(LAYERS)]
        return kept

    def keys(self) -> list[LayerKeys]:
        pairs = zip(self.cases, self.forms, strict=True)
        return [LayerKeys(i, case.cache, form) for i, (case, form) in enumerate(pairs)]

    def taken(self) -> list[Tensor]:
        sums = [segment.sums.column_sums for segment in self.rows.segments]
        copies = [one.clone() for one in sums]
        for one in sums:
            one.zero_()
        return copies


def test_queries_that_are_kept_give_the_same_bits(cutting, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those that are added at once, in torch and in Triton, and wherever memory is short."""
    step = Step(Shape(shared=1, dtype=E4M3, query_dtype=E4M3))
    expected = step.at_once()
    kept = step.kept()
    add_kept_column_sums(kept, step.keys())
    assert not kept.layers
    assert all(map(torch.equal, step.taken(), expected))
    monkeypatch.setattr(paged_attention, "by_triton", lambda tensor: True)
    ours = step.at_once()
    for one, other in zip(ours, expected, strict=True):
        assert relative_error(one, other.double()) <= 1e-3
    # All layers at once, one after another, none; what is cut needs more than one.
    for room in (1 << 20, 3_000, 0) if cutting == "cut" else (1 << 20,):
        add_kept_column_sums(step.kept(room), step.keys())
        assert all(map(torch.equal, step.taken(), ours)), room


def test_log_sum_exps_that_are_kept_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those that are told of a layer, in torch and in Triton, and of one trace alone."""
    step = Step(TWO_HEADS)
    lses = [told(case, form) for case, form in zip(step.cases, step.forms, strict=True)]

    def at_once() -> list[Tensor]:
        for layer, (case, form) in enumerate(zip(step.cases, step.forms, strict=True)):
            paged_column_sums(replace(case.inputs(form), lse=lses[layer]), layer)
        return step.taken()

    expected = at_once()
    add_kept_column_sums(step.kept(lse=lses), step.keys())
    assert all(map(torch.equal, step.taken(), expected))
    monkeypatch.setattr(paged_attention, "by_triton", lambda tensor: True)
    ours = at_once()
    for one, other in zip(ours, expected, strict=True):
        assert relative_error(one, other.double()) <= 1e-5
    kept = step.kept(lse=lses)
    heads, groups = step.rows.num_heads, step.rows.num_kv_heads
    alone = PagedRows.build([step.rows.segments[1]], heads, groups, step.rows.device, 64)
    own = kept.of_segment(1, alone)
    add_kept_column_sums(kept, step.keys())
    assert all(map(torch.equal, step.taken(), ours))
    add_kept_column_sums(own, step.keys())
    sums = step.taken()
    assert torch.equal(sums[1], ours[1]) and not sums[0].any() and not sums[2].any()


def test_log_sum_exps_are_kept_of_all_layers_or_of_none() -> None:
    step = Step(Shape(dim=64))
    lse, query = torch.zeros(6, len(step.cases[0].query)), step.cases[0].query
    memory = torch.empty(1 << 20, dtype=torch.uint8)

    def kept() -> KeptQueries:
        found = KeptQueries.within(memory, step.rows, LAYERS, 64, query.dtype, with_lse=True)
        assert found is not None
        return found

    some = kept()
    assert some.keep(0, query, lse) and not some.keep(1, query)
    assert some.layers == [0] and some.lse is not None
    none = kept()
    assert none.keep(0, query) and none.lse is None and none.keep(1, query, lse)
    assert none.layers == [0, 1] and none.lse is None


def test_kept_queries_of_one_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are added without the others', from the same memory."""
    monkeypatch.setattr(paged_attention, "by_triton", lambda tensor: True)
    step = Step(TWO_HEADS)
    kept = step.kept()
    add_kept_column_sums(kept, step.keys())
    expected = step.taken()
    kept = step.kept()
    segment = step.rows.segments[1]
    heads, groups = step.rows.num_heads, step.rows.num_kv_heads
    own = kept.of_segment(1, PagedRows.build([segment], heads, groups, step.rows.device, 64))
    assert own.layers == kept.layers
    assert own.queries.untyped_storage().data_ptr() == kept.queries.untyped_storage().data_ptr()
    add_kept_column_sums(own, step.keys())
    assert kept.layers and not own.layers
    sums = step.taken()
    assert torch.equal(sums[1], expected[1]) and not sums[0].any() and not sums[2].any()


def test_layers_may_have_factors_on_the_weights_of_rows(
    cutting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others in each layer, in torch and in Triton, at once and kept."""
    step = Step(TWO_HEADS)
    generator = torch.Generator().manual_seed(5)
    count = len(step.rows)
    scales = torch.rand(LAYERS, -(-count // 4) * 4, generator=generator)[:, :count] * 1e3 + 1e-3
    expected = []
    for case, form, own in zip(step.cases, step.forms, scales, strict=True):
        segments = [
            replace(segment, weights=segment.weights.double() * step.rows.of_segment(own, index))
            for index, segment in enumerate(step.rows.segments)
        ]
        expected.append(definition(replace(case, rows=replace(step.rows, segments=segments)), form))

    def check(sums: list[Tensor]) -> None:
        for layer, (_, of_layer) in enumerate(expected):
            for ours, theirs in zip(sums, of_layer, strict=True):
                assert relative_error(ours[layer, :, : theirs.shape[1]], theirs) <= 1e-5

    def at_once(compute) -> None:
        for layer, (case, form) in enumerate(zip(step.cases, step.forms, strict=True)):
            compute(replace(case.inputs(form), scales=scales[layer]), layer)

    at_once(paged_column_sums)
    check(step.taken())
    kept = step.kept()
    kept.scales = scales
    add_kept_column_sums(kept, step.keys())
    check(step.taken())
    at_once(column_kernels.triton_column_sums)
    by_layer = step.taken()
    check(by_layer)
    monkeypatch.setattr(paged_attention, "by_triton", lambda tensor: True)
    for room in (1 << 20, 3_000) if cutting == "cut" else (1 << 20,):
        kept = step.kept(room)
        kept.scales = scales
        add_kept_column_sums(kept, step.keys())
        assert all(map(torch.equal, step.taken(), by_layer)), room


def test_too_many_rows_are_not_kept() -> None:
    rows = make_case(Shape(dim=64), SEVERAL).rows
    size = 48 * KeptQueries.row_bytes(LAYERS, rows.num_heads, 64, BFLOAT16)
    for nbytes, fits in ((size, True), (size - 1, False), (0, False)):
        memory = torch.empty(nbytes, dtype=torch.uint8)
        kept = KeptQueries.within(memory, rows, LAYERS, 64, BFLOAT16)
        assert (kept is not None) == fits


@pytest.mark.parametrize(("which", "expected"), [(1, RuntimeError), (2, SumsTouchedError)])
def test_a_launch_that_fails_behind_another_has_touched_the_sums(
    which: int, expected: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing was added yet, the call may be repeated."""
    monkeypatch.setattr(paged_attention, "by_triton", lambda tensor: True)
    step, kept = Step(Shape(dim=64)), Step(Shape(dim=64)).kept()
    launched: list[str] = []

    def launch(kernel, *_: object, **__: object) -> None:
        launched.append(kernel.__name__)
        if launched.count("_lse_kernel") == which:
            raise RuntimeError("injected")

    for module in (lse_kernels, column_kernels):
        monkeypatch.setattr(module, "launch", launch)
    with pytest.raises(expected, match="injected"):
        add_kept_column_sums(kept, step.keys())
    assert kept.layers == [*range(LAYERS)]


def test_numbers_of_layers_are_copied_once() -> None:
    step = Step(Shape(dim=64))
    inputs = step.cases[0].inputs(step.forms[0])
    tables = [triton_operands.LayerBatch.of_one(inputs, layer).table for layer in (1, 1, 2)]
    assert tables[0] is tables[1] and tables[2][0, 0] == 2
    assert tables[0][0, 1] == step.cases[0].cache.data_ptr()


@pytest.mark.parametrize("compute", [torch_forms, triton_forms])
def test_what_is_not_a_number_stays_visible(compute, cutting) -> None:
    """A broken query or key must make the sums NaN, for the trace to fail and not to lie."""
    shape = TWO_HEADS
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
        ({"scale": 1.0, "chunk_size": 0}, "chunk_size"),
        ({"scale": 1.0, "sliding_window": 4, "chunk_size": 8}, "not both"),
        ({"scale": 1.0, "soft_cap": -1.0}, "soft_cap"),
        ({"scale": 1.0, "soft_cap": float("inf")}, "soft_cap"),
    ],
)
def test_forms_out_of_range_are_refused(numbers, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionForm(**numbers)
