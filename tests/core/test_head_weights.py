"""Weights of heads: the fit against its optimality conditions and brute force, and the scores."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_flashtrace.core import fit_head_weights, head_scores
from vllm_flashtrace.core.head_weights import (
    TOLERANCE,
    HeadExample,
    kept_scores,
    non_negative_minimum,
    rank_correlation,
)


def example(
    seed: int, truth: torch.Tensor, sources: int = 6, ablations: int = 16, noise: float = 0.0
) -> HeadExample:
    """What a model would show whose answers lose exactly what the heads of ``truth`` read."""
    generator = torch.Generator().manual_seed(seed)
    attention = torch.rand(sources, *truth.shape, generator=generator, dtype=torch.float64)
    kept = (torch.rand(ablations, sources, generator=generator) < 0.5).double()
    logprobs = kept @ (attention * truth).sum((1, 2)) - 7.0
    logprobs += noise * torch.randn(ablations, generator=generator, dtype=torch.float64)
    return HeadExample(attention, kept, logprobs)


def dense_problem(
    examples: list[HeadExample], ridge: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Standardised features, targets and what features were divided by, written out."""
    features, targets = [], []
    for one in examples:
        own = one.kept @ one.attention.flatten(1)
        features.append(own - own.mean(0))
        spread = one.logprobs.std(correction=0)
        targets.append((one.logprobs - one.logprobs.mean()) / (spread if spread > 0 else 1.0))
    x, y = torch.cat(features), torch.cat(targets)
    scale = x.std(0, correction=0)
    scale[scale == 0] = 1
    return x / scale, y, scale


@settings(max_examples=40)
@given(
    st.integers(0, 10_000),
    st.integers(1, 5),
    st.integers(1, 12),
    st.sampled_from([1e-3, 0.3, 3.0, 100.0]),
    st.sampled_from([0.0, 1.0, 30.0]),
)
def test_a_fit_is_optimal(seed: int, count: int, heads: int, ridge: float, noise: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(2, heads, generator=generator, dtype=torch.float64).clamp(min=0)
    truth[0, 0] = 1.0
    examples = [example(seed + 1 + i, truth, noise=noise) for i in range(count)]
    x, y, scale = dense_problem(examples, ridge)
    try:
        weights = fit_head_weights(examples, ridge).double().flatten() * scale
    except ValueError as error:
        assert "nothing can be learned" in str(error)
        weights = torch.zeros(2 * heads, dtype=torch.float64)
    assert bool((weights >= 0).all())
    # Karush, Kuhn and Tucker: no slope where a weight is free, and none downwards where it is 0.
    slope = x.T @ (x @ weights - y) + ridge * len(y) * weights
    limit = 1e-5 * float((x.T @ y).abs().max())  # The weights are rounded to float32.
    assert all(abs(s) <= limit for s in slope[weights > 0].tolist())
    assert all(s >= -limit for s in slope[weights == 0].tolist())


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 5), st.sampled_from([1e-4, 1.0]))
def test_a_minimum_is_the_best_of_all_supports(seed: int, size: int, smallest: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size + 1, size, generator=generator, dtype=torch.float64)
    matrix = root.T @ root + smallest * torch.eye(size, dtype=torch.float64)
    vector = torch.randn(size, generator=generator, dtype=torch.float64)
    found = non_negative_minimum(matrix, vector, smallest)

    def value(x: torch.Tensor) -> float:
        return float(x @ matrix @ x / 2 - vector @ x)

    best = 0.0
    for support in itertools.chain.from_iterable(
        itertools.combinations(range(size), n) for n in range(1, size + 1)
    ):
        own = list(support)
        x = torch.zeros(size, dtype=torch.float64)
        x[own] = torch.linalg.solve(matrix[own][:, own], vector[own])
        if bool((x >= 0).all()):
            best = min(best, value(x))
    assert bool((found >= 0).all())
    assert value(found) == pytest.approx(best, rel=1e-6, abs=1e-9)
    slope = matrix @ found - vector
    limit = TOLERANCE * max(float(vector.max()), 0.0)
    assert all(abs(s) <= limit for s in slope[found > 0].tolist())
    assert all(s >= -limit for s in slope[found == 0].tolist() if float(vector.max()) > 0)


def test_a_minimum_that_cannot_be_reached_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_flashtrace.core.head_weights._MOST_STEPS", 3)
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(30, 30, generator=generator, dtype=torch.float64)
    matrix = root.T @ root + 1e-6 * torch.eye(30, dtype=torch.float64)
    with pytest.raises(ValueError, match="a larger ridge"):
        non_negative_minimum(matrix, torch.ones(30, dtype=torch.float64), 1e-6)


def test_the_heads_that_matter_are_found() -> None:
    truth = torch.zeros(3, 4, dtype=torch.float64)
    truth[1, 2], truth[2, 0] = 2.0, 1.0
    examples = [example(seed, truth, noise=0.02) for seed in range(20)]
    weights = fit_head_weights(examples, 0.01)
    assert weights.dtype == torch.float32
    assert weights.shape == (3, 4)
    assert weights.flatten().topk(2).indices.tolist() == [6, 8]
    assert float(weights[1, 2] + weights[2, 0]) > 0.9 * float(weights.sum())
    assert torch.equal(weights, fit_head_weights(examples, 0.01))
    held = example(99, truth)
    scores = (held.attention * weights).sum((1, 2))
    assert rank_correlation(kept_scores(scores, held.kept), held.logprobs) > 0.95


def test_a_head_that_is_nowhere_read_has_no_weight() -> None:
    truth = torch.ones(2, 2, dtype=torch.float64)
    one = example(0, truth)
    one.attention[:, 1, 1] = 0
    assert fit_head_weights([one], 1.0)[1, 1] == 0


def test_what_cannot_be_learned_has_a_reason() -> None:
    truth = -torch.ones(2, 2, dtype=torch.float64)  # Answers are likelier without what is read.
    with pytest.raises(ValueError, match="nothing can be learned of 3 examples"):
        fit_head_weights([example(seed, truth) for seed in range(3)], 1.0)
    constant = example(0, truth)
    constant.logprobs[:] = -3.0
    with pytest.raises(ValueError, match="nothing can be learned"):
        fit_head_weights([constant], 1.0)


def test_bad_examples_are_refused() -> None:
    truth = torch.ones(2, 2, dtype=torch.float64)
    good = example(0, truth)
    with pytest.raises(ValueError, match="no example"):
        fit_head_weights([], 1.0)
    for ridge in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="ridge"):
            fit_head_weights([good], ridge)
    other = example(1, torch.ones(2, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="does not fit 2 x 2"):
        fit_head_weights([good, other], 1.0)
    for bad in (math.nan, math.inf):
        broken = example(0, truth)
        broken.logprobs[3] = bad
        with pytest.raises(ValueError, match="not finite"):
            fit_head_weights([broken], 1.0)


def test_scores_are_the_weighted_sums_of_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    weights, sums = (torch.rand(*size, generator=generator) for size in ((3, 4), (3, 4, 9)))
    expected = torch.einsum("lh,lhn->ln", weights.double(), sums.double())
    assert torch.allclose(head_scores(weights, sums).double(), expected, rtol=1e-6)
    inside = head_scores(weights, sums, out=sums[:, 0])
    assert inside.data_ptr() == sums.data_ptr()
    assert torch.allclose(sums[:, 0].double(), expected, rtol=1e-6)


def test_rank_correlation() -> None:
    values = torch.tensor([3.0, 1.0, 2.0, 2.0])
    assert rank_correlation(values, values) == pytest.approx(1.0)
    assert rank_correlation(values, -values) == pytest.approx(-1.0)
    assert rank_correlation(values, torch.ones(4)) == 0.0
    # Ranks 4, 1, 2.5, 2.5 and 1, 2, 3, 4.
    assert rank_correlation(values, torch.tensor([0.0, 1.0, 2.0, 9.0])) == pytest.approx(
        -0.31622776
    )


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=30))
def test_rank_correlation_is_pearson_of_average_ranks(pairs: list[tuple[int, int]]) -> None:
    first, second = (torch.tensor(side, dtype=torch.float64) for side in zip(*pairs, strict=True))
    value = rank_correlation(first, second)
    assert rank_correlation(second, first) == pytest.approx(value)
    assert rank_correlation(first.exp(), second) == pytest.approx(value)  # monotone
    ranks = torch.stack(
        [(own[:, None] > own).sum(1) + (own[:, None] == own).sum(1) / 2 for own in (first, second)]
    )
    ranks = ranks.double()
    constant = (ranks == ranks[:, :1]).all(1).any()
    expected = 0.0 if constant else float(torch.corrcoef(ranks)[0, 1])
    assert value == pytest.approx(expected, abs=1e-9)
