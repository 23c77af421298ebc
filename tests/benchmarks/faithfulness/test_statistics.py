"""Intervals and tests on data whose answers are known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from benchmarks.faithfulness.statistics import bootstrap, holm, paired_test


def test_the_interval_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(1).normal(5.0, 2.0, size=400)
    estimate = bootstrap(values)
    half = 1.96 * values.std() / 20
    assert estimate.mean == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    source = np.random.default_rng(2)
    found = [bootstrap(source.normal(size=40), seed=i) for i in range(200)]
    assert 0.88 <= np.mean([e.low <= 0 <= e.high for e in found]) <= 0.99


def test_a_constant_has_an_interval_of_no_width() -> None:
    estimate = bootstrap([0.25] * 7)
    assert (estimate.mean, estimate.low, estimate.high) == (0.25, 0.25, 0.25)
    with pytest.raises(ValueError, match="no values"):
        bootstrap([])


def test_few_pairs_are_tested_exactly() -> None:
    first, second = [3.0, 1.0, 4.0, 1.0, 5.0], [1.0, 1.5, 2.0, 0.0, 2.0]
    differences = np.subtract(first, second)
    flips = [np.mean(differences * signs) for signs in itertools.product((-1, 1), repeat=5)]
    expected = np.mean([abs(flip) >= abs(differences.mean()) - 1e-12 for flip in flips])
    test = paired_test(first, second)
    assert (test.n, test.p) == (5, expected)
    assert test.mean == pytest.approx(1.5)


def test_many_pairs_tell_a_difference_from_none() -> None:
    source = np.random.default_rng(3)
    base = source.normal(size=60)
    apart = paired_test(base + 0.5 + 0.2 * source.normal(size=60), base)
    same = paired_test(base + 0.2 * source.normal(size=60), base)
    assert apart.p < 0.001 < 0.02 < same.p


def test_no_difference_at_all_is_no_evidence() -> None:
    assert paired_test([1.0, 2.0], [1.0, 2.0]).p == 1.0
    assert paired_test([1.0] * 30, [1.0] * 30).p == 1.0


def test_holm_on_a_textbook_example() -> None:
    corrected = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert corrected == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
