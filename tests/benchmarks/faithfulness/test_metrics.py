"""Metrics against a second, naive writing-down of their definitions, and the known traps."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.faithfulness.example import by_sentence
from benchmarks.faithfulness.metrics import (
    bootstrap,
    deletion,
    explained_share,
    group_sizes,
    holm,
    mass_on_gold,
    paired_test,
    perturb,
    ranking,
    recovery,
    recovery_ceiling,
)
from tests.benchmarks.faithfulness.fakes import HashScorer, prepared_example

_scores = st.lists(st.floats(-10, 10, allow_nan=False, width=32), min_size=1, max_size=60)
_steps = st.floats(-50, 0, allow_nan=False, width=32)


def naive_rise_mas(values: list[float], steps: list[float]) -> tuple[float, float]:
    """RISE and MAS of all ``S + 1`` log-probabilities, written as loops."""
    size, groups = len(values), min(20, len(values))
    order = sorted(range(size), key=lambda i: (-values[i], i))
    cut: list[list[int]] = []
    for i in range(groups):
        count = size // groups + (1 if i < size % groups else 0)
        cut.append(order[:count])
        order = order[count:]
    total = sum(values)
    d = [1.0]
    for i, group in enumerate(cut):
        if total <= 0:
            d.append(1 - (i + 1) / groups)
        else:
            d.append(d[-1] - sum(values[j] for j in group) / total)
    first, last = steps[0], steps[-1]
    r: list[float] = []
    for s in steps:
        ratio = 1.0 if first == last else (s - last) / abs(first - last)
        r.append(min([min(1.0, max(0.0, ratio)), *r[-1:]]))
    penalised = [min(1.0, max(0.0, x + abs(x - y))) for x, y in zip(r, d, strict=True)]
    low, high = min(penalised), max(penalised)
    if high == low:
        stretched = [1 - i / groups for i in range(groups + 1)]
    else:
        stretched = [(x - low) / (high - low) for x in penalised]

    def area(x: list[float]) -> float:
        return (sum(x) - (x[0] + x[-1]) / 2) / groups

    return area(r), area(stretched)


@given(_scores, st.data())
def test_rise_and_mas_match_the_definition(values: list[float], data: st.DataObject) -> None:
    groups = min(20, len(values))
    steps = data.draw(st.lists(_steps, min_size=groups + 1, max_size=groups + 1))
    array = np.array(values)
    share = explained_share(array, ranking(array))
    result = deletion(steps, share)
    rise, mas = naive_rise_mas(values, steps)
    assert result.rise == pytest.approx(rise, abs=1e-9)
    # Where scores nearly cancel, their shares are huge and so are rounding errors.
    assert result.mas == pytest.approx(mas, abs=1e-6)


def test_likelier_without_the_prompt_counts_as_inverted() -> None:
    result = deletion([-4.0, -2.0, -1.0], np.linspace(1, 0, 3))
    assert (result.rise, result.case) == (0.0, "inverted")


def test_a_prompt_without_effect_counts_as_flat() -> None:
    result = deletion([-4.0, -9.0, -4.0], np.linspace(1, 0, 3))
    assert (result.rise, result.mas, result.case) == (1.0, 0.5, "flat")


def test_an_early_drop_pins_the_rest() -> None:
    result = deletion([0.0, -5.0, -1.0, -1.0, -4.0], np.linspace(1, 0, 5))
    assert (result.rise, result.case) == (0.125, "pinned")


def test_a_straight_fall_is_one_half_and_no_case() -> None:
    result = deletion([0.0, -1.0, -2.0, -3.0, -4.0], np.linspace(1, 0, 5))
    assert (result.rise, result.mas, result.case) == (0.5, 0.5, "")


@given(st.integers(1, 200))
def test_groups_cover_every_token(size: int) -> None:
    sizes = group_sizes(size)
    assert sum(sizes) == size and len(sizes) == min(20, size)
    assert sorted(sizes, reverse=True) == sizes and max(sizes) - min(sizes) <= 1


@given(_scores, st.data())
def test_recovery_matches_the_definition(values: list[float], data: st.DataObject) -> None:
    gold = data.draw(st.sets(st.integers(0, len(values) - 1), min_size=1))
    top = sorted(range(len(values)), key=lambda i: (-values[i], i))
    top = top[: max(1, math.ceil(0.1 * len(values)))]
    assert recovery(np.array(values), gold) == len(gold.intersection(top)) / len(gold)


def test_excluded_tokens_are_neither_ranked_nor_wanted() -> None:
    values = np.array([9.0, 8.0, 1.0, 2.0])
    excluded = np.array([True, False, False, False])
    assert recovery(values, {0, 1}, 0.25, excluded) == 1.0
    assert recovery(values, {0}, 0.25, excluded) is None


def test_the_ceiling_is_what_fits_into_the_top() -> None:
    assert recovery_ceiling(20, range(4)) == 0.5
    assert recovery(np.zeros(20), set()) is None


def test_mass_on_gold_ignores_negative_scores() -> None:
    assert mass_on_gold(np.array([3.0, -9.0, 1.0]), {0, 1}) == 0.75
    assert mass_on_gold(np.array([-1.0, -2.0]), {0}) == 0.0
    assert mass_on_gold(np.array([1.0]), set()) is None


def test_perturbation_replaces_ranked_tokens_alone() -> None:
    prepared, scorer = prepared_example(), HashScorer(0)
    values = np.random.default_rng(0).normal(size=12)
    excluded = np.arange(12) < 2
    found = perturb(prepared, values, excluded, scorer, 0)
    ranked = ranking(values, excluded)

    def value(offsets: Any) -> float:
        tokens = list(prepared.token_ids)
        for offset in offsets:
            tokens[prepared.user[0] + int(offset)] = 0
        return HashScorer(0).response_logprobs([tokens], [4])[0]

    steps = [value(ranked[:end]) for end in range(11)]
    wanted = deletion(steps, explained_share(values, ranked))
    assert (found["rise"], found["mas"], found["case"]) == (wanted.rise, wanted.mas, wanted.case)
    assert found["comprehensiveness"][1] == pytest.approx((steps[0] - steps[1]) / 4)
    assert found["sufficiency"][2] == pytest.approx((steps[0] - value(ranked[2:])) / 4)
    with pytest.raises(ValueError, match="no token is ranked"):
        perturb(prepared, values, np.ones(12, dtype=np.bool_), scorer, 0)


def test_sentences_are_ranked_by_their_mean_and_their_tokens_by_their_own_score() -> None:
    prepared = prepared_example()  # Sentences of 2, 5, 4 and 1 tokens.
    values = np.array([0.0, 4.0, 0.0, 0.0, 9.0, 0.0, 0.0, 1.0, 0.5, 0.0, 0.0, 3.0])
    found = by_sentence(values, prepared)
    assert ranking(found).tolist() == [11, 1, 0, 4, 2, 3, 5, 6, 7, 8, 9, 10]
    means = np.repeat([2.0, 1.8, 0.375, 3.0], [2, 5, 4, 1])
    np.testing.assert_allclose(found, means, atol=1e-5)
    np.testing.assert_allclose(found.sum(), values.sum())
    assert values[1] == 4.0


def test_the_interval_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(1).normal(5.0, 2.0, size=400)
    mean, low, high = bootstrap(values)
    half = 1.96 * values.std() / 20
    assert mean == pytest.approx(values.mean())
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_a_constant_has_an_interval_of_no_width() -> None:
    assert bootstrap([0.25] * 7) == [0.25] * 3
    with pytest.raises(ValueError, match="no values"):
        bootstrap([])


def test_few_pairs_are_tested_exactly() -> None:
    first, second = [3.0, 1.0, 4.0, 1.0, 5.0], [1.0, 1.5, 2.0, 0.0, 2.0]
    differences = np.subtract(first, second)
    flips = [np.mean(differences * signs) for signs in itertools.product((-1, 1), repeat=5)]
    expected = np.mean([abs(flip) >= abs(differences.mean()) - 1e-12 for flip in flips])
    assert paired_test(first, second) == (5, pytest.approx(1.5), expected)


def test_many_pairs_tell_a_difference_from_none() -> None:
    source = np.random.default_rng(3)
    base = source.normal(size=60)
    apart = paired_test(base + 0.5 + 0.2 * source.normal(size=60), base)
    same = paired_test(base + 0.2 * source.normal(size=60), base)
    assert apart[2] < 0.001 < 0.02 < same[2]


def test_holm_on_a_textbook_example() -> None:
    corrected = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert corrected == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
