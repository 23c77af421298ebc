"""Metrics against a second, naive writing-down of their definitions, and the known traps."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.faithfulness.example import Example, Prepared, by_sentence
from benchmarks.faithfulness.metrics import (
    Explanation,
    PerturbationMetrics,
    bootstrap,
    deletion,
    explained_share,
    group_sizes,
    holm,
    mass_on_gold,
    paired_test,
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


PAD = 0


def made(number: int, size: int = 47, response: int = 5) -> Prepared:
    ids = tuple(range(1000 * number + 1, 1000 * number + 1 + 3 + size + 2 + response))
    start = 3 + size + 2
    return Prepared(
        example=Example(f"e{number}", "t", 0, "p", "r", "o"),
        token_ids=ids,
        texts=tuple(map(str, ids)),
        user=(3, 3 + size),
        prompt_length=start,
        reasoning=(start, start + 2),
        target=(start + 2, start + response),
        gold=frozenset({1}),
        sentences=((3, 3 + size),),
        reasoning_sentences=((start, start + 2),),
    )


def explanations(count: int = 4, methods: int = 5) -> list[Explanation]:
    source = np.random.default_rng(0)
    found = []
    for number in range(count):
        prepared = made(number)
        for method in range(methods):
            values = source.normal(size=47) if method else np.linspace(1, 0, 47)
            excluded = source.random(47) < 0.2 if method == 4 else None
            found.append(Explanation(prepared, values, excluded))
    return found


def one_by_one(scorer: HashScorer, explanation: Explanation) -> tuple[list[float], float, float]:
    """All ``s_i``, and what 10 % removed and 10 % kept cost per response token."""
    prepared = explanation.prepared
    ranked = ranking(explanation.values, explanation.excluded)

    def without(offsets: np.ndarray) -> float:
        tokens = list(prepared.token_ids)
        for offset in offsets:
            tokens[prepared.user[0] + int(offset)] = PAD
        return scorer.response_logprobs([tokens], [prepared.response_length])[0]

    ends = [0, *np.cumsum(group_sizes(len(ranked)))]
    steps = [without(ranked[:end]) for end in ends]
    top = -(-len(ranked) // 10)
    lost = [(steps[0] - without(part)) / 5 for part in (ranked[:top], ranked[top:])]
    return steps, lost[0], lost[1]


@pytest.mark.parametrize("trend", [0.3, 0.05, -0.1])
def test_the_numbers_are_those_of_every_step_alone(trend: float) -> None:
    given = explanations()
    metrics = PerturbationMetrics(HashScorer(PAD, trend), PAD)
    for explanation, found in zip(given, metrics.evaluate(given), strict=True):
        steps, removed, kept = one_by_one(HashScorer(PAD, trend), explanation)
        share = explained_share(
            explanation.values, ranking(explanation.values, explanation.excluded)
        )
        assert found.deletion == deletion(steps[0], steps[-1], steps[1:-1], share)
        assert found.comprehensiveness[0.1] == pytest.approx(removed)
        assert found.sufficiency[0.1] == pytest.approx(kept)


def test_no_sequence_is_evaluated_twice_and_early_stops_save_work() -> None:
    scorer = HashScorer(PAD, 0.05)
    metrics = PerturbationMetrics(scorer, PAD)
    metrics.evaluate(explanations())
    assert len(set(scorer.sequences)) == len(scorer.sequences) == metrics.cost.evaluated
    assert metrics.cost.evaluated < metrics.cost.asked < metrics.cost.without_stop == 20 * 27


def test_template_and_response_stay_as_they_are() -> None:
    scorer = HashScorer(PAD)
    given = explanations(count=1, methods=1)
    PerturbationMetrics(scorer, PAD).evaluate(given)
    prepared = given[0].prepared
    for tokens in scorer.sequences:
        assert tokens[:3] == prepared.token_ids[:3]
        assert tokens[50:] == prepared.token_ids[50:]


def test_an_explanation_that_ranks_nothing_is_refused() -> None:
    everything = np.ones(47, dtype=np.bool_)
    with pytest.raises(ValueError, match="e0: no token is ranked"):
        PerturbationMetrics(HashScorer(PAD), PAD).evaluate(
            [Explanation(made(0), np.ones(47), everything)]
        )


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
