from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_flashtrace.core import TargetWeights

spans = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 10)).map(lambda s: (s[0], s[0] + s[1])),
    min_size=1,
    max_size=6,
)


@given(spans)
def test_from_spans_covers_the_union_once(spans) -> None:
    target = TargetWeights.from_spans(spans)
    covered = sorted({p for start, end in spans for p in range(start, end)})
    assert target.positions.tolist() == covered
    assert target.weights.tolist() == [1.0] * len(covered)
    assert (target.first, target.last) == (covered[0], covered[-1])


@given(spans)
def test_spans_are_the_maximal_runs(spans) -> None:
    target = TargetWeights.from_spans(spans)
    runs = target.spans
    assert TargetWeights.from_spans(runs).positions.equal(target.positions)
    assert all(end < start for (_, end), (start, _) in itertools.pairwise(runs))


@pytest.mark.parametrize("spans", [[], [(3, 3)], [(5, 2)], [(1, 4), (9, 9)], [(-1, 2)]])
def test_from_spans_refuses(spans) -> None:
    with pytest.raises(ValueError, match="target"):
        TargetWeights.from_spans(spans)


def test_from_mapping_sorts_and_drops_zeros() -> None:
    target = TargetWeights.from_mapping({9: 0.5, 2: 2.0, 4: 0.0})
    assert target.positions.tolist() == [2, 9]
    assert target.weights.tolist() == [2.0, 0.5]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({}, "no position"),
        ({1: 0.0}, "no position"),
        ({1: 1.0, 7: -0.5}, "position 7 .*-0.5"),
        ({3: math.nan}, "position 3"),
        ({3: math.inf}, "position 3"),
        ({3: 1e39}, "position 3"),  # infinite in float32
        ({-2: 1.0}, "-2"),
    ],
)
def test_from_mapping_refuses(mapping, message) -> None:
    with pytest.raises(ValueError, match=message):
        TargetWeights.from_mapping(mapping)


@pytest.mark.parametrize("positions", [[3, 3], [4, 2]])
def test_positions_must_ascend(positions) -> None:
    with pytest.raises(ValueError, match="ascend"):
        TargetWeights(torch.tensor(positions), torch.ones(2))


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="one length"):
        TargetWeights(torch.tensor([1, 2]), torch.ones(3))


def test_from_scores_takes_positive_scores_within_the_mask() -> None:
    scores = torch.tensor([0.5, 0.0, 0.25, 0.25], dtype=torch.float64)
    target = TargetWeights.from_scores(scores, torch.tensor([False, True, True, True]))
    assert target is not None
    assert target.positions.tolist() == [2, 3]
    assert target.weights.dtype == torch.float32
    assert TargetWeights.from_scores(scores, torch.tensor([False, True, False, False])) is None
    assert TargetWeights.from_scores(scores, torch.zeros(4, dtype=torch.bool)) is None


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
def test_from_scores_refuses_bad_scores_within_the_mask_only(bad) -> None:
    scores = torch.tensor([0.5, bad])
    with pytest.raises(ValueError, match="position 1"):
        TargetWeights.from_scores(scores, torch.tensor([True, True]))
    target = TargetWeights.from_scores(scores, torch.tensor([True, False]))
    assert target is not None and target.positions.tolist() == [0]


def test_from_scores_treats_what_vanishes_in_float32_as_zero() -> None:
    scores = torch.tensor([1e-60], dtype=torch.float64)
    assert TargetWeights.from_scores(scores, torch.tensor([True])) is None


def test_normalised_sums_to_one() -> None:
    target = TargetWeights.from_mapping({1: 3e38, 2: 1e38}).normalised()
    torch.testing.assert_close(target.weights, torch.tensor([0.75, 0.25]))


def test_without_and_below_drop_positions() -> None:
    target = TargetWeights.from_spans([(2, 6)])
    mask = torch.zeros(10, dtype=torch.bool)
    mask[[2, 4, 9]] = True
    kept = target.without(mask)
    assert kept is not None and kept.positions.tolist() == [3, 5]
    assert target.without(torch.ones(10, dtype=torch.bool)) is None
    below = target.below(4)
    assert below is not None and below.positions.tolist() == [2, 3]
    assert target.below(2) is None


@pytest.mark.parametrize("mask", [torch.zeros(5, dtype=torch.bool), torch.zeros(10)])
def test_without_refuses_a_mask_that_does_not_fit(mask) -> None:
    with pytest.raises(ValueError, match="mask"):
        TargetWeights.from_spans([(2, 6)]).without(mask)


def test_spans_are_the_contiguous_runs() -> None:
    target = TargetWeights.from_mapping(dict.fromkeys([1, 2, 3, 7, 9, 10], 1.0))
    assert target.spans == [(1, 4), (7, 8), (9, 11)]
