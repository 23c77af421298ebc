"""Ablation baselines: the sparse surrogate alone, without an engine."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.faithfulness.baselines import AblationFamily, lasso, spread, surrogate
from tests.benchmarks.faithfulness.fakes import prepared_example

PAD = 0


class LinearScorer:
    """Log-probability -60 plus a bonus for each token that is still there."""

    def __init__(self, bonus: dict[int, float]) -> None:
        self.bonus = bonus
        self.calls = 0

    def response_logprobs(
        self, token_ids: list[list[int]], response_lengths: list[int]
    ) -> list[float]:
        self.calls += len(token_ids)
        assert set(response_lengths) == {4}
        return [
            -60.0 + sum(value for at, value in self.bonus.items() if tokens[at] != PAD)
            for tokens in token_ids
        ]

    def forget(self) -> None:
        """Has no memory."""


def family(bonus: dict[int, float]) -> tuple[AblationFamily, LinearScorer]:
    scorer = LinearScorer(bonus)
    engine = SimpleNamespace(scorer=scorer, pad_token_id=PAD)
    return AblationFamily(SimpleNamespace(engine=engine, seed=0)), scorer


def test_leave_one_out_finds_each_tokens_bonus() -> None:
    ablation, scorer = family({3: 2.0, 10: -1.5, 0: 9.0})
    scores = ablation.attribute(prepared_example(), ["loo-token"])["loo-token"]
    expected = np.zeros(12)
    expected[3 - 2], expected[10 - 2] = 2.0, -1.5  # the template's token 0 is never removed
    np.testing.assert_allclose(scores.values, expected)
    assert scorer.calls == scores.facts["evaluations"] == 13


def test_leave_one_sentence_out_spreads_its_loss() -> None:
    ablation, _ = family({5: 2.0, 6: 3.0})
    scores = ablation.attribute(prepared_example(), ["loo-sentence"])["loo-sentence"]
    expected = np.zeros(12)
    expected[2:7] = 1.0
    np.testing.assert_allclose(scores.values, expected)


def test_contextcite_ranks_the_sentence_that_matters() -> None:
    ablation, scorer = family({5: 12.0, 13: 4.0})
    prepared = prepared_example()
    values = ablation.attribute(prepared, ["contextcite"])["contextcite"].values
    assert scorer.calls == 32
    by_sentence = [values[first - 2 : end - 2].sum() for first, end in prepared.sentences]
    assert by_sentence[1] == pytest.approx(12.0, abs=0.5)
    assert by_sentence[3] == pytest.approx(4.0, abs=0.5)
    assert max(abs(by_sentence[0]), abs(by_sentence[2])) < 0.1
    again = ablation.attribute(prepared, ["contextcite"])["contextcite"].values
    np.testing.assert_array_equal(again, values)


def test_contextcite_with_more_ablations_is_nearer() -> None:
    ablation, scorer = family({5: 12.0, 13: 4.0})
    prepared = prepared_example()
    values = ablation.attribute(prepared, ["contextcite-128"])["contextcite-128"]
    assert scorer.calls == values.facts["evaluations"] == 128
    sums = [values.values[first - 2 : end - 2].sum() for first, end in prepared.sentences]
    np.testing.assert_allclose(sums, [0, 12, 0, 4], atol=0.3)


def test_lasso_recovers_a_sparse_linear_function() -> None:
    source = np.random.default_rng(0)
    features = source.standard_normal((200, 30))
    features -= features.mean(axis=0)
    true = np.zeros(30)
    true[[3, 17, 20]] = [2.0, -1.0, 0.5]
    found = lasso(features, features @ true + 7.0, 0.01)
    np.testing.assert_allclose(found, true, atol=0.03)
    assert np.count_nonzero(found) == 3


def test_lasso_meets_the_optimality_conditions() -> None:
    source = np.random.default_rng(1)
    features = source.standard_normal((40, 12))
    features -= features.mean(axis=0)
    targets = features[:, 0] + 0.3 * source.standard_normal(40)
    alpha = 0.1
    weights = lasso(features, targets, alpha)
    gradient = features.T @ (targets - targets.mean() - features @ weights) / 40
    active = weights != 0
    assert 0 < active.sum() < 12
    np.testing.assert_allclose(gradient[active], alpha * np.sign(weights[active]), atol=1e-7)
    assert (abs(gradient[~active]) <= alpha + 1e-9).all()


def test_surrogate_ignores_a_source_that_never_varies() -> None:
    source = np.random.default_rng(3)
    kept = source.random((32, 4)) < 0.5
    kept[:, 2] = True
    weights = surrogate(kept, list(-50.0 + 10.0 * kept[:, 1]), 5)
    assert weights[2] == 0.0
    assert weights[1] == pytest.approx(10.0, rel=0.02)


def test_surrogate_takes_a_certain_response() -> None:
    kept = np.array([[True], [False]] * 16)
    weights = surrogate(kept, [0.0, -5.0] * 16, 1)
    assert np.isfinite(weights).all()
    assert weights[0] > 0


def test_spread_keeps_the_sum() -> None:
    scores = spread(np.array([3.0, -1.0]), [(10, 13), (13, 15)], (10, 15))
    np.testing.assert_allclose(scores, [1, 1, 1, -0.5, -0.5])
