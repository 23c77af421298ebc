"""Metrics against a second, naive writing-down of their definitions, and the known traps."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.faithfulness.metrics import (
    deletion,
    explained_share,
    group_sizes,
    mass_on_gold,
    ranking,
    recovery,
    recovery_ceiling,
)

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
    result = deletion(steps[0], steps[-1], steps[1:-1], share)
    rise, mas = naive_rise_mas(values, steps)
    assert result.rise == pytest.approx(rise, abs=1e-9)
    # Where scores nearly cancel, their shares are huge and so are rounding errors.
    assert result.mas == pytest.approx(mas, abs=1e-6)


@given(_scores, st.data())
def test_nothing_changes_when_steps_after_zero_are_left_out(
    values: list[float], data: st.DataObject
) -> None:
    groups = min(20, len(values))
    steps = data.draw(st.lists(_steps, min_size=groups + 1, max_size=groups + 1))
    array = np.array(values)
    share = explained_share(array, ranking(array))
    inner = steps[1:-1]
    below = [i for i, s in enumerate(inner) if s <= steps[-1]]
    short = inner[: below[0] + 1] if below else inner
    if steps[0] <= steps[-1]:
        short = []
    whole = deletion(steps[0], steps[-1], inner, share)
    assert deletion(steps[0], steps[-1], short, share) == whole


def test_a_step_that_matters_must_not_be_left_out() -> None:
    with pytest.raises(ValueError, match="1 of 3 steps"):
        deletion(0.0, -4.0, [-1.0], np.linspace(1, 0, 5))


def test_likelier_without_the_prompt_counts_as_inverted() -> None:
    result = deletion(-4.0, -1.0, [], np.linspace(1, 0, 5))
    assert (result.rise, result.case) == (0.0, "inverted")


def test_a_prompt_without_effect_counts_as_flat() -> None:
    result = deletion(-4.0, -4.0, [], np.linspace(1, 0, 5))
    assert (result.rise, result.mas, result.case) == (1.0, 0.5, "flat")


def test_an_early_drop_pins_the_rest() -> None:
    result = deletion(0.0, -4.0, [-5.0, -1.0, -1.0], np.linspace(1, 0, 5))
    assert (result.rise, result.case) == (0.125, "pinned")


def test_a_straight_fall_is_one_half_and_no_case() -> None:
    result = deletion(0.0, -4.0, [-1.0, -2.0, -3.0], np.linspace(1, 0, 5))
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
