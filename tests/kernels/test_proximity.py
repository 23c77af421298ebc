"""Both forms of the proximity pass against the definition in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.kernels.layers import FORMS, Form, Layer, make_layer, relative_error, trace_of
from tests.kernels.paged import DEVICE, paged_cache
from vllm_flashtrace.core.proximity import l1_proximity
from vllm_flashtrace.kernels import replace_by_proximities, sum_shares, triton_proximity
from vllm_flashtrace.kernels.paged_proximity import torch_proximities
from vllm_flashtrace.kernels.triton_proximity import triton_proximities, triton_sum_shares
from vllm_flashtrace.kernels.triton_screen import (
    LayerKind,
    Tables,
    nearest_coordinates,
    pair_bounds,
    screen_pairs,
)

F32, B16, F16 = torch.float32, torch.bfloat16, torch.float16
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

EACH_FORM = pytest.mark.parametrize("form", FORMS)

# Together: every type, head size, ratio, block size and layout, and most pairs of them.
LAYERS = [
    dict(values=F32, weight=F32, dim=64, shared=1, block_size=16, layout="HND", tokens=1),
    dict(values=F32, weight=F32, dim=80, shared=3, block_size=48, layout="NHD", tokens=131),
    dict(values=F32, weight=F32, dim=256, shared=4, block_size=32, layout="HDN", tokens=70),
    dict(values=B16, weight=B16, dim=128, shared=7, block_size=16, layout="NHD", tokens=120),
    dict(values=B16, weight=B16, dim=96, shared=1, block_size=128, layout="HND", tokens=300),
    dict(values=B16, weight=B16, dim=256, shared=3, block_size=48, layout="HND", tokens=33),
    dict(values=F16, weight=F16, dim=64, shared=4, block_size=32, layout="NHD", tokens=129),
    dict(values=F16, weight=F16, dim=80, shared=7, block_size=128, layout="HDN", tokens=128),
    dict(values=E4M3, weight=B16, dim=128, shared=4, block_size=16, layout="NHD", tokens=150),
    dict(values=E4M3, weight=F16, dim=96, shared=3, block_size=48, layout="HND", tokens=97),
    dict(values=E4M3, weight=F32, dim=64, shared=7, block_size=32, layout="HDN", tokens=16),
    dict(values=E5M2, weight=B16, dim=80, shared=1, block_size=32, layout="HND", tokens=65),
    dict(values=E5M2, weight=F16, dim=256, shared=1, block_size=16, layout="NHD", tokens=17),
    dict(values=E5M2, weight=F32, dim=128, shared=3, block_size=128, layout="HND", tokens=140),
    dict(values=B16, weight=F32, dim=64, shared=3, block_size=128, layout="NHD", tokens=260),
    dict(values=F32, weight=B16, dim=96, shared=4, block_size=16, layout="HDN", tokens=47),
    # As values that are made of latents.
    dict(values=B16, weight=B16, dim=128, shared=1, block_size=64, layout="HBND", tokens=150),
    dict(values=F32, weight=F32, dim=13, shared=1, block_size=64, layout="HBND", tokens=70),
]


def _layer(case: int, size: float) -> Layer:
    spec = dict(LAYERS[case])
    spec["value_scale"] = 0.37 if spec["values"] in (E4M3, E5M2) else 1.0
    spec["hidden"] = (61, 100, 307, 201)[case % 4]
    return make_layer(**spec, groups=1 + case % 2, size=size, seed=case)


def _name(spec: dict) -> str:
    return "-".join(str(value).removeprefix("torch.") for value in spec.values())


# Either many coordinates are pushed past zero or few, for each type of values both.
SIZES = {1: (0.1, 3.0), 3: (0.1, 3.0), 6: (0.1, 3.0), 9: (0.1, 3.0), 13: (0.1, 3.0)}
CASES = [
    pytest.param(case, size, id=f"{_name(spec)}-{size}")
    for case, spec in enumerate(LAYERS)
    for size in SIZES.get(case, [(0.1, 3.0)[case % 2]])
]


@pytest.mark.parametrize(("case", "size"), CASES)
def test_both_forms_are_the_definition(case: int, size: float) -> None:
    # Narrow types are widened, never rounded to, so one limit holds for all.
    layer = _layer(case, size)
    exact = layer.pairs().sum(0)
    for form in FORMS:
        ours = layer.proximities(form)
        assert ours.shape == exact.shape and ours.dtype == torch.float32
        assert relative_error(ours, exact) <= 1e-5, form.__name__


def test_layers_here_take_every_way_through_the_kernels() -> None:
    # Else the comparisons above would prove less than they seem to.
    shares = []
    for size in (0.1, 3.0):
        layer = _layer(3, size)
        trace = trace_of([layer])
        tables = Tables.copy(LayerKind.of(layer.layer()), [layer.layer()], [trace])
        nearest = nearest_coordinates(tables, 0, 1)
        bounds = torch.empty_like(layer.column_sums)
        pair_bounds(tables, 0, 0, 0, nearest, bounds)
        assert torch.equal(trace.sums.column_sums[0], layer.column_sums)
        screen_pairs(tables, 0, 1, nearest)
        over = layer.contributions() * torch.where(layer.stream < 0, -1.0, 1.0).double()
        over = (over > layer.stream.abs()).sum(-1).cpu()
        further = (trace.sums.column_sums[0] < 0).cpu()
        aligned = bounds.cpu() > 0
        assert (over[aligned & ~further] <= 8).all()  # nothing is missed
        shares.append([float((over[aligned] > most).float().mean()) for most in (0, 8, 16)])
    assert 0.2 < shares[0][2] < shares[0][1] < 0.9  # many coordinates for a good part of the pairs
    assert shares[1][1] < 0.1 < shares[0][1]  # few


def _requests() -> list[list[Layer]]:
    """Requests of several lengths over the same three layers, which are of two kinds."""
    layers = [
        make_layer(values=B16, weight=weight, shared=2, tokens=112, size=size, value_scale=scale)
        for weight, size, scale in ((B16, 0.1, 1.0), (F32, 0.5, 1.0), (B16, 3.0, 0.5))
    ]
    requests = []
    for length, block in ((70, 0), (33, 2), (48, 4)):
        own = slice(16 * block, 16 * block + length)
        requests.append(
            [
                replace(
                    layer,
                    column_sums=layer.column_sums[:, own],
                    block_table=layer.block_table[block:],
                    stream=layer.stream.roll(block),
                    values=layer.values[own],
                )
                for layer in layers
            ]
        )
    return requests


@pytest.mark.parametrize("form", FORMS)
def test_all_layers_and_traces_at_once(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    """As each trace and layer alone, to the bit, and in chunks of any size; totals are float64."""
    requests, fractions = _requests(), (1.0, 0.6, 0.0)
    layers = [layer.layer(index) for index, layer in enumerate(requests[0])]
    traces = [trace_of(*each) for each in zip(requests, fractions, strict=True)]
    monkeypatch.setattr(triton_proximity, "SCRATCH_BYTES", 1)
    form(layers, traces)
    monkeypatch.undo()
    for request, trace in zip(requests, traces, strict=True):
        (column_sums, residual, stream), whole = trace.sums, trace.exact_fraction == 1
        for index, layer in enumerate(request):
            tokens = column_sums[index, 0]
            assert torch.equal(tokens, layer.proximities(form, trace.exact_fraction))
            assert not whole or relative_error(tokens, layer.pairs().sum(0)) <= 1e-5
            of_residual = l1_proximity(residual[index].double(), stream[index].double())
            assert trace.residual[index] == pytest.approx(float(of_residual), rel=1e-5, abs=1e-5)
            assert trace.totals[index] == pytest.approx(float(tokens.double().sum()), rel=1e-12)


@EACH_FORM
def test_coordinates_without_a_distance(form: Form) -> None:
    # Fewer coordinates than are screened for every pair, zero columns and zeros of the stream.
    layer = make_layer(hidden=5, tokens=20, shared=2, size=0.1)
    layer.weight[2] = 0
    layer.stream[2:4] = 0
    assert relative_error(layer.proximities(form), layer.pairs().sum(0)) <= 1e-5


@EACH_FORM
@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("size", [0.1, 0.5, 3.0])
def test_reach_leaves_no_coordinate_out(form: Form, dim: int, size: float) -> None:
    # In so few dimensions a contribution comes as far as its length allows, or nearly.
    layer = make_layer(dim=dim, hidden=30, tokens=200, groups=2, shared=2, size=size)
    assert relative_error(layer.proximities(form), layer.pairs().sum(0)) <= 1e-5


@EACH_FORM
def test_transposed_weight_and_sums_in_wider_rows(form: Form) -> None:
    layer = make_layer(weight=B16, values=B16, tokens=50, shared=2)
    plain = layer.proximities(form)
    moved = replace(layer, weight=layer.weight.T.contiguous().T)
    torch.testing.assert_close(moved.proximities(form), plain)
    trace, wide = trace_of([layer]), torch.full((1, 2, 150), -7.0, device=DEVICE)
    wide[..., 50:100] = layer.column_sums
    form([layer.layer()], [replace(trace, sums=trace.sums._replace(column_sums=wide[..., 50:100]))])
    assert torch.equal(wide[0, 0, 50:100], plain)
    assert (wide[..., :50] == -7).all() and (wide[..., 100:] == -7).all()


@EACH_FORM
@pytest.mark.parametrize("dtype", [F32, B16, E4M3])
def test_same_bits_wherever_the_blocks_lie(form: Form, dtype: torch.dtype) -> None:
    layer = make_layer(values=dtype, weight=B16, groups=2, tokens=50, size=0.1)
    results = []
    for layout, seed in [("HND", 0), ("HND", 0), ("NHD", 1), ("HDN", 2)]:
        cache, table = paged_cache(layer.values.to(dtype), 16, layout=layout, seed=seed)
        moved = replace(layer, value_cache=cache, block_table=table)
        results.append(moved.proximities(form, 0.9))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.skipif(DEVICE != "cpu", reason="the memory would be touched")
@EACH_FORM
def test_blocks_past_two_to_the_31_elements(form: Form) -> None:
    layer = make_layer(values=E4M3, weight=B16, tokens=30, size=0.1)
    blocks = 2**21 + 8  # of 1024 bytes; untouched pages take no memory
    cache = torch.empty(blocks, 1, 16, 64, dtype=torch.uint8).view(E4M3)
    table = torch.tensor([blocks - 1, blocks - 5], dtype=torch.int32)
    for far, near in zip(table.tolist(), layer.block_table.tolist(), strict=False):
        cache.view(torch.uint8)[far] = layer.value_cache.view(torch.uint8)[near]
    moved = replace(layer, value_cache=cache, block_table=table)
    assert torch.equal(moved.proximities(form), layer.proximities(form))


# --- exact_fraction -----------------------------------------------------------------------------


@EACH_FORM
@pytest.mark.parametrize(("dtype", "size"), [(F32, 0.1), (F16, 1.0)])
def test_smaller_fractions_lie_between_proximity_and_bound(
    form: Form, dtype: torch.dtype, size: float
) -> None:
    layer = make_layer(values=dtype, weight=dtype, groups=2, shared=2, tokens=60, size=size)
    exact, bound = layer.pairs().sum(0), layer.bounds().sum(0)
    slack = 1e-5 * layer.contributions().abs().sum((0, 2)) + 1e-9
    before, sums = bound, []
    for fraction in (0.0, 0.5, 0.9, 1.0):
        ours = layer.proximities(form, fraction).double()
        assert (ours >= exact - slack).all() and (ours <= before + slack).all()
        before = ours
        sums.append(float(ours.sum()))
    # Either fraction makes some pairs exact, and leaves some.
    steps = [larger - smaller for larger, smaller in pairwise(sums[:3])]
    assert min(steps) > 3 * float(slack.sum())


@EACH_FORM
@pytest.mark.parametrize("power", [-90, 60])
def test_fractions_do_not_depend_on_the_scale_of_the_weights(form: Form, power: int) -> None:
    layer = make_layer(values=B16, weight=B16, shared=2, tokens=50, size=0.1)
    scaled = replace(
        layer, column_sums=layer.column_sums * 2.0**power, stream=layer.stream * 2.0**power
    )
    plain = layer.proximities(form, 0.5)
    ours = scaled.proximities(form, 0.5) * 2.0**-power
    assert relative_error(ours, plain.double()) < 1e-6


# --- windows of the second pass -----------------------------------------------------------------


def test_many_pairs_in_many_windows() -> None:
    """More than a window's tokens; most reach further in one head, few in the other."""
    layer = make_layer(dim=1, hidden=12, tokens=4300, shared=2, size=0.1)
    layer.column_sums.add_(40)
    layer.column_sums[1, 700:] = 0
    further = layer.contributions().abs().cpu() > layer.stream.abs().cpu()
    most, few = (further.sum(-1) > 8).sum(1)
    assert most > 2000 and 0 < few < 500
    ours = layer.proximities(triton_proximities)
    assert relative_error(ours, layer.pairs().sum(0)) <= 1e-5


# --- what the public function does --------------------------------------------------------------


def test_tensors_on_the_cpu_take_the_torch_form() -> None:
    layer = make_layer(values=B16, weight=B16, tokens=40)
    on_cpu = {
        name: value.cpu() if isinstance(value, Tensor) else value
        for name, value in vars(layer).items()
    }
    layer = Layer(**on_cpu)
    assert torch.equal(
        layer.proximities(replace_by_proximities), layer.proximities(torch_proximities)
    )


def test_nothing_to_do() -> None:
    layer = make_layer(tokens=3)
    replace_by_proximities([], [trace_of([layer])])
    replace_by_proximities([layer.layer()], [])


# --- shares of all layers -----------------------------------------------------------------------


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("form", [sum_shares, triton_sum_shares])
def test_shares_are_summed_over_layers(form: Callable[..., None], keep: bool) -> None:
    """Against float64; a layer without proximity has no shares, tokens behind the last none."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(5, 3, 300, generator=generator)
    drawn[2] = 0
    own = drawn.to(DEVICE)
    denominators = own[:, 0].double().sum(1) * 1.5
    expected = own[:, 0].double() / denominators.where(denominators > 0, 1)[:, None]
    scores = torch.full((310,), torch.nan, device=DEVICE)
    form(own[:, 0], denominators, scores, keep=keep)
    assert torch.allclose(scores[:300].double(), expected.sum(0), rtol=1e-6, atol=0)
    assert (scores[300:] == 0).all() and torch.equal(own[:, 1:].cpu(), drawn[:, 1:])
    if keep:
        assert torch.allclose(own[:, 0].double(), expected, rtol=1e-6, atol=0)
    else:
        assert torch.equal(own[:, 0].cpu(), drawn[:, 0])
