"""What is computed from scores: recovery, RISE, MAS, sufficiency, intervals and tests.

The same definitions for every method.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.faithfulness.example import Mask, Prepared, Values

Offsets = npt.NDArray[np.int64]

GROUPS = 20
"""Most groups of tokens that RISE and MAS remove one after another."""


@dataclass(frozen=True)
class Deletion:
    """RISE and MAS of one explanation, lower is better, and whether they can be trusted.

    Attributes:
        rise: Area under the running minimum of the normalised log-probability.
        mas: The same with the gap to the removed share of the scores as a penalty.
        case: ``""``; ``"inverted"``, where the response is likelier without the prompt, so that
            RISE is 0 whatever the method; ``"flat"``, where it makes no difference; ``"pinned"``,
            where the log-probability fell below that of the empty prompt before the last group.
    """

    rise: float
    mas: float
    case: str


def ranking(values: Values, excluded: Mask | None = None) -> Offsets:
    """Offsets by score, highest first; ties go to the earlier token.

    Args:
        values: ``[P]``.
        excluded: ``[P]``, tokens that are not ranked.
    """
    order = np.argsort(-values, kind="stable")
    return order if excluded is None else order[~excluded[order]]


def top_count(size: int, fraction: float) -> int:
    """How many tokens the top ``fraction`` of ``size`` are: at least one, rounded up."""
    return max(1, math.ceil(fraction * size))


def recovery(
    values: Values,
    gold: Collection[int],
    fraction: float = 0.1,
    excluded: Mask | None = None,
) -> float | None:
    """Share of the gold tokens among the top ``fraction`` of the ranked ones.

    Returns:
        None where no gold token is ranked.
    """
    ranked = ranking(values, excluded)
    wanted = set(gold) & set(ranked.tolist())
    if not wanted:
        return None
    top = ranked[: top_count(len(ranked), fraction)].tolist()
    return len(wanted.intersection(top)) / len(wanted)


def recovery_ceiling(
    size: int, gold: Collection[int], fraction: float = 0.1, excluded: Mask | None = None
) -> float | None:
    """The recovery of a method that ranks all gold tokens first."""
    ideal = np.zeros(size)
    ideal[list(gold)] = 1.0
    return recovery(ideal, gold, fraction, excluded)


def mass_on_gold(values: Values, gold: Collection[int]) -> float | None:
    """Positive scores on gold over all positive scores; None without gold, 0 without scores."""
    if not gold:
        return None
    positive = np.clip(values, 0.0, None)
    total = float(positive.sum())
    return float(positive[list(gold)].sum()) / total if total > 0 else 0.0


def group_sizes(size: int, groups: int = GROUPS) -> list[int]:
    """Sizes of the at most ``groups`` groups of ``size`` tokens, the larger ones first."""
    count = min(groups, size)
    return [size // count + (i < size % count) for i in range(count)]


def explained_share(values: Values, ranked: Offsets) -> Values:
    """``D``: the share of the scores still there before and after each group, ``[S + 1]``.

    Falls from 1 in equal steps where the scores of the ranked tokens sum to 0 or less.
    """
    sizes = group_sizes(len(ranked))
    total = float(values[ranked].sum())
    if total <= 0:
        return np.linspace(1.0, 0.0, len(sizes) + 1)
    ends = np.cumsum(sizes)
    sums = [values[ranked[end - size : end]].sum() for size, end in zip(sizes, ends, strict=True)]
    return 1.0 - np.concatenate([[0.0], np.cumsum(sums)]) / total


def deletion(steps: Sequence[float], share: Values) -> Deletion:
    """RISE and MAS of the log-probabilities ``s_0`` to ``s_S`` and the shares ``D``, both [S + 1].

    ``s_0`` is that of the response after the whole prompt, ``s_S`` after all ranked tokens have
    been replaced.
    """
    full, empty = steps[0], steps[-1]
    if full > empty:
        normalised = np.clip((np.array(steps) - empty) / (full - empty), 0.0, 1.0)
        response = np.minimum.accumulate(normalised)
        case = "pinned" if min(steps[1:-1], default=full) <= empty else ""
    else:
        response = np.full(len(share), float(full == empty))
        case = "flat" if full == empty else "inverted"
    penalised = np.clip(response + np.abs(response - share), 0.0, 1.0)
    return Deletion(_area(response), _area(_stretched(penalised)), case)


def _area(curve: Values) -> float:
    return float((curve.sum() - (curve[0] + curve[-1]) / 2) / (len(curve) - 1))


def _stretched(curve: Values) -> Values:
    """From 0 to 1; a constant curve becomes the straight line whose area is one half."""
    low, high = float(curve.min()), float(curve.max())
    if high == low:
        return np.linspace(1.0, 0.0, len(curve))
    return (curve - low) / (high - low)


FRACTIONS = (0.05, 0.1, 0.2)
"""Of the ranked tokens, removed for comprehensiveness and kept for sufficiency."""


def perturb(
    prepared: Prepared, values: Values, excluded: Mask | None, scorer: Any, pad: int
) -> dict[str, Any]:
    """What replacing the tokens of an explanation does, as it stands in the work file.

    Args:
        prepared: The example.
        values: ``[P]``.
        excluded: ``[P]``, tokens that are neither ranked nor replaced.
        scorer: As `EngineScorer`: ``response_logprobs(sequences, response_lengths)`` gives the sum
            of the log-probabilities (nats) of each response.
        pad: The token in the place of a removed one.

    Returns:
        ``rise``, ``mas`` and ``case`` of the deletion; by fraction, log-probability lost per
        response token when the top tokens are removed (``comprehensiveness``, higher is better)
        and when only they are kept (``sufficiency``, lower is better); and ``evaluations``.

    Raises:
        ValueError: No token is ranked.
    """
    ranked = ranking(values, excluded)
    if not len(ranked):
        raise ValueError(f"{prepared.example.id}: no token is ranked")
    ends = [0, *np.cumsum(group_sizes(len(ranked))).tolist()]
    tops = [top_count(len(ranked), fraction) for fraction in FRACTIONS]
    removed = [ranked[:end] for end in ends]
    removed += [ranked[:top] for top in tops] + [ranked[top:] for top in tops]
    sequences = []
    for offsets in removed:
        tokens = np.array(prepared.token_ids)
        tokens[prepared.user[0] + offsets] = pad
        sequences.append(tokens.tolist())
    found = scorer.response_logprobs(sequences, [prepared.response_length] * len(sequences))
    steps, erased = found[: len(ends)], found[len(ends) :]
    lost = [(steps[0] - value) / prepared.response_length for value in erased]
    return {
        **asdict(deletion(steps, explained_share(values, ranked))),
        "comprehensiveness": lost[: len(tops)],
        "sufficiency": lost[len(tops) :],
        "evaluations": len(sequences),
    }


RESAMPLES = 2000
FLIPS = 10_000
_EXACT_UP_TO = 12


def bootstrap(values: Sequence[float], *, seed: int = 0) -> list[float]:
    """Mean and the ends of its 95 % percentile bootstrap interval.

    Raises:
        ValueError: There are no values.
    """
    if not len(values):
        raise ValueError("no values to estimate a mean from")
    data = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(data), size=(RESAMPLES, len(data)))
    low, high = np.quantile(data[drawn].mean(axis=1), [0.025, 0.975])
    return [float(data.mean()), float(low), float(high)]


def paired_test(
    first: Sequence[float], second: Sequence[float], *, seed: int = 0
) -> tuple[int, float, float]:
    """Pairs, mean of first minus second, and p of the two-sided sign-flip permutation test.

    Every assignment of signs up to 12 pairs, else 10,000 random ones with the observed one added,
    so that ``p`` is never 0.

    Raises:
        ValueError: The two have different lengths, or there are no pairs.
    """
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    count = len(differences)
    if not count:
        raise ValueError("no pairs to compare")
    if count <= _EXACT_UP_TO:
        bits = np.arange(2**count)[:, None] >> np.arange(count) & 1
        signs, added = 2.0 * bits - 1.0, 0
    else:
        generator = np.random.default_rng(seed)
        signs, added = 2.0 * generator.integers(2, size=(FLIPS, count)) - 1.0, 1
    observed = abs(float(differences.mean()))
    # Sums in another order may miss the observed one by a rounding error.
    as_far = np.abs(signs @ differences / count) >= observed * (1 - 1e-12)
    p = (int(as_far.sum()) + added) / (len(signs) + added)
    return count, float(differences.mean()), p


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's correction for having made several tests."""
    corrected: dict[str, float] = {}
    largest = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        corrected[name] = largest
    return corrected
