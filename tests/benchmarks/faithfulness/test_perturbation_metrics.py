"""Batched, early-stopped perturbation metrics against one evaluation for every step."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.faithfulness.example import Example, Prepared
from benchmarks.faithfulness.metrics import deletion, explained_share, group_sizes, ranking
from benchmarks.faithfulness.perturbation_metrics import Explanation, PerturbationMetrics
from tests.benchmarks.faithfulness.fake_scorer import HashScorer

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
