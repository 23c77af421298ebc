"""Scores read sentence by sentence."""

from __future__ import annotations

import numpy as np

from benchmarks.faithfulness.metrics import ranking
from benchmarks.faithfulness.sentences import by_sentence
from tests.benchmarks.faithfulness.small_example import prepared_example


def test_sentences_are_ranked_by_their_mean_and_their_tokens_by_their_own_score() -> None:
    prepared = prepared_example()  # Sentences of 2, 5, 4 and 1 tokens.
    values = np.array([0.0, 4.0, 0.0, 0.0, 9.0, 0.0, 0.0, 1.0, 0.5, 0.0, 0.0, 3.0])
    found = by_sentence(values, prepared)
    assert ranking(found).tolist() == [11, 1, 0, 4, 2, 3, 5, 6, 7, 8, 9, 10]
    means = np.repeat([2.0, 1.8, 0.375, 3.0], [2, 5, 4, 1])
    np.testing.assert_allclose(found, means, atol=1e-5)
    np.testing.assert_allclose(found.sum(), values.sum())
    assert values[1] == 4.0
