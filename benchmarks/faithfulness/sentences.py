"""Scores of tokens read sentence by sentence.

Invariant: sentences are ranked by their mean score, and the tokens of one by their own; the scores
of a sentence keep their sum but for one part in a million.
"""

from __future__ import annotations

from benchmarks.faithfulness.example import Prepared
from benchmarks.faithfulness.method import Values

_OWN = 1e-6
"""Share of a token's own score: enough to rank the tokens of one sentence."""


def by_sentence(values: Values, prepared: Prepared) -> Values:
    """``(1 - e) mean(sentence) + e values`` with a tiny ``e``.

    Args:
        values: ``[P]``.
        prepared: Whose ``sentences`` partition the ``P`` tokens.
    """
    found = _OWN * values
    for start, end in prepared.sentences:
        part = slice(start - prepared.user[0], end - prepared.user[0])
        found[part] += (1 - _OWN) * values[part].mean()
    return found
