from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.core.single_layer import layer_scores, proximity_bounds
from vllm_flashtrace.core import LayerSums, l1_proximity, proximity, token_proximity

Layer = tuple[Tensor, Tensor, Tensor, Tensor]


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    """column_sums [H, N], values [N, G, d], out_proj [H, d, D], stream [D] with some zeros."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    groups, shared = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    heads, context, dim, hidden = groups * shared, draw(st.integers(1, 12)), 4, 16

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    column_sums = normal(heads, context).clamp(min=0) ** 2 * draw(st.sampled_from([0.01, 1.0, 30]))
    stream = normal(hidden) * 3
    stream[torch.rand(hidden, generator=generator) < draw(st.sampled_from([0, 0.3, 1]))] = 0
    return column_sums, normal(context, groups, dim), normal(heads, dim, hidden), stream


def contributions(layer: Layer) -> Tensor:
    """float64 [N, H, D]."""
    column_sums, values, out_proj, _ = layer
    repeated = values.double().repeat_interleave(len(out_proj) // values.shape[1], dim=1)
    return torch.einsum("hn,nhd,hdk->nhk", column_sums.double(), repeated, out_proj.double())


def pairs(layer: Layer) -> Tensor:
    """The definition for every (token, head) pair, float64 [N, H]."""
    x = layer[3].double()
    return (x.abs().sum() - (x - contributions(layer)).abs().sum(-1)).clamp(min=0)


@settings(deadline=None)
@given(layers())
def test_l1_proximity_is_the_definition(layer) -> None:
    ours = l1_proximity(contributions(layer), layer[3].double())
    torch.testing.assert_close(ours, pairs(layer), rtol=1e-9, atol=1e-9)


@settings(deadline=None)
@given(layers(), st.integers(0, 1000))
def test_a_column_sum_for_each_coordinate(layer: Layer, seed: int) -> None:
    column_sums, values, out_proj, stream = layer
    heads, dim, _ = out_proj.shape
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(heads, dim, len(values), generator=generator) * column_sums[:, None]
    repeated = values.double().repeat_interleave(heads // values.shape[1], dim=1)
    added = torch.einsum("hdn,nhd,hdk->nhk", own.double(), repeated, out_proj.double())
    x = stream.double()
    expected = (x.abs().sum() - (x - added).abs().sum(-1)).clamp(min=0).sum(1)
    norms = torch.linalg.vector_norm(out_proj, dim=1)
    ours = proximity.gated_token_proximity(
        own.flatten(0, 1), values, out_proj, stream, column_norms=norms
    )
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4)


def test_l1_proximity_keeps_a_contribution_far_below_the_stream() -> None:
    # ||x|| - ||x - z|| of the norms themselves is 0 or noise here.
    stream, tiny = torch.full((1024,), 1e4), torch.full((1024,), 1e-5)
    torch.testing.assert_close(l1_proximity(tiny, stream), torch.tensor(1024e-5))


@settings(deadline=None)
@given(layers())
def test_bounds_are_never_below_the_proximity(layer) -> None:
    bounds, exact = proximity_bounds(*layer).double(), pairs(layer)
    assert (bounds >= exact - 1e-4 * contributions(layer).abs().sum(-1)).all()


@settings(deadline=None)
@given(layers())
def test_exact_proximity_is_the_definition(layer) -> None:
    ours = token_proximity(*layer, exact_fraction=1.0).double()
    tolerance = 1e-5 * contributions(layer).abs().sum((1, 2))
    assert ((ours - pairs(layer).sum(1)).abs() <= tolerance + 1e-9).all()


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_reach_leaves_no_coordinate_out(scale: float) -> None:
    # Wide enough for every stage: tokens that reach no coordinate, a few, and most of them.
    generator = torch.Generator().manual_seed(0)
    column_sums = torch.rand(4, 60, generator=generator) ** 8 * scale
    values = torch.randn(60, 2, 8, generator=generator)
    out_proj = torch.randn(4, 8, 200, generator=generator)
    out_proj[1, :, 17] = 0
    stream = torch.randn(200, generator=generator) * torch.rand(200, generator=generator) ** 3
    stream[torch.rand(200, generator=generator) < 0.05] = 0
    layer = (column_sums, values, out_proj, stream)
    tolerance = 1e-6 * contributions(layer).abs().sum((1, 2))
    exact = pairs(layer).sum(1)
    for norms in (None, torch.linalg.vector_norm(out_proj, dim=1)):
        ours = token_proximity(*layer, column_norms=norms).double()
        assert ((ours - exact).abs() <= tolerance).all()
    bounds = proximity_bounds(*layer).sum(1)
    assert float((bounds - exact).abs().sum()) > 10 * float(tolerance.sum())


@settings(deadline=None)
@given(layers(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_fraction_never_moves_away_from_the_exact_result(layer, one, other) -> None:
    less, more = (token_proximity(*layer, exact_fraction=f) for f in sorted([one, other]))
    scale = float(contributions(layer).abs().sum()) + 1e-9
    exact = pairs(layer).sum(1)
    assert ((less - more).double() >= -1e-5 * scale).all()
    assert ((more.double() - exact) >= -1e-5 * scale).all()


@settings(deadline=None)
@given(layers())
def test_fraction_zero_lies_between_the_exact_result_and_the_bound(layer) -> None:
    ours, bound = token_proximity(*layer, exact_fraction=0.0), proximity_bounds(*layer).sum(1)
    scale = float(contributions(layer).abs().sum()) + 1e-9
    assert float((ours - bound).max()) <= 1e-5 * scale
    assert float((pairs(layer).sum(1) - ours).max()) <= 1e-5 * scale


@settings(deadline=None)
@given(layers(), st.randoms(use_true_random=False), st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_token_order_does_not_matter(layer, random, fraction) -> None:
    # Small integers make float32 exact, so the result must be the same to the last bit.
    column_sums, values, out_proj, stream = ((4 * t).round().clamp(-8, 8) for t in layer)
    order = torch.tensor(random.sample(range(len(values)), len(values)))
    shuffled = token_proximity(
        column_sums[:, order], values[order], out_proj, stream, exact_fraction=fraction
    )
    plain = token_proximity(column_sums, values, out_proj, stream, exact_fraction=fraction)
    assert torch.equal(shuffled, plain[order])


def test_chosen_pairs_hold_the_fraction_and_no_more_than_needed() -> None:
    bounds = torch.tensor([[8.0, 4.0], [2.0, 1.0], [1.0, 0.0]])
    largest = proximity._largest
    assert largest(bounds, 0.5).tolist() == [[True, False], [False, False], [False, False]]
    assert largest(bounds, 0.6).tolist() == [[True, True], [False, False], [False, False]]
    assert largest(bounds, 0.9).sum() == 5  # equal bounds are treated alike
    assert largest(bounds, 1.0).sum() == 5
    assert largest(bounds, 0.0).sum() == 0


def test_zero_bound_scores_exactly_zero() -> None:
    stream, out_proj = torch.ones(3), torch.eye(3)[None]
    values = torch.tensor([[[1.0, 0, 0]], [[-1.0, -1, -1]], [[0.0, 0, 0]]])
    ours = token_proximity(torch.ones(1, 3), values, out_proj, stream, exact_fraction=1.0)
    assert ours.tolist() == [1.0, 0.0, 0.0]


def test_blocks_of_rows_change_nothing(monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = (
        torch.rand(2, 40, generator=generator),
        torch.randn(40, 1, 4, generator=generator),
        torch.randn(2, 4, 16, generator=generator),
        torch.randn(16, generator=generator),
    )
    whole = token_proximity(*layer)
    monkeypatch.setattr(proximity, "_TEMPORARY_FLOATS", 3 * 16)
    torch.testing.assert_close(token_proximity(*layer), whole)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_fraction_out_of_range_is_refused(fraction) -> None:
    layer = torch.ones(1, 2), torch.ones(2, 1, 3), torch.ones(1, 3, 4), torch.ones(4)
    with pytest.raises(ValueError, match="exact_fraction"):
        token_proximity(*layer, exact_fraction=fraction)


# --- layer_scores -------------------------------------------------------------------------------


def sums_of(layer: Layer) -> LayerSums:
    """A residual that, with the contributions, adds up to the stream."""
    total = contributions(layer).sum((0, 1)).float()
    return LayerSums(column_sums=layer[0], residual=layer[3] - total, stream=layer[3])


@settings(deadline=None)
@given(layers(), st.sampled_from([0.0, 0.9, 1.0]))
def test_scores_are_a_sub_distribution(layer, fraction) -> None:
    scores = layer_scores(sums_of(layer), layer[1], layer[2], exact_fraction=fraction)
    assert (scores >= 0).all() and float(scores.sum()) <= 1 + 1e-5


@settings(deadline=None)
@given(layers(), st.sampled_from([2.0**-20, 0.25, 2.0**20]), st.sampled_from([0.5, 1.0]))
def test_scores_do_not_depend_on_the_scale_of_the_weights(layer, factor, fraction) -> None:
    sums = sums_of(layer)
    scaled = LayerSums(sums.column_sums * factor, sums.residual * factor, sums.stream * factor)
    torch.testing.assert_close(
        layer_scores(scaled, layer[1], layer[2], exact_fraction=fraction),
        layer_scores(sums, layer[1], layer[2], exact_fraction=fraction),
    )


def small_layer() -> tuple[LayerSums, Tensor, Tensor]:
    return (
        LayerSums(torch.ones(2, 3), torch.ones(4), torch.full((4,), 9.0)),
        torch.ones(3, 1, 2),
        torch.ones(2, 2, 4),
    )


def test_hand_computed_scores() -> None:
    # Each pair contributes (2, 2, 2, 2): proximity 8. Two heads, three tokens; the residual 4.
    scores = layer_scores(*small_layer())
    torch.testing.assert_close(scores, torch.full((3,), 16 / (48 + 4)))


def test_nothing_aligned_gives_zeros() -> None:
    _, values, out_proj = small_layer()
    empty = LayerSums(torch.zeros(2, 3), torch.zeros(4), torch.zeros(4))
    assert layer_scores(empty, values, out_proj).tolist() == [0, 0, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(value) -> None:
    sums, values, out_proj = small_layer()
    values.view(-1)[1] = value
    with pytest.raises(ValueError, match=r"^values .*not finite"):
        token_proximity(sums.column_sums, values, out_proj, sums.stream)
