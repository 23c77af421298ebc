"""What is computed from scores alone, or from scores and log-probabilities already known.

Invariant: plain functions of arrays; the same definitions for every method.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from benchmarks.faithfulness.method import Values

Mask = npt.NDArray[np.bool_]
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


def needs_steps(full: float, empty: float) -> bool:
    """Whether the steps between the full and the empty prompt can change RISE and MAS."""
    return full > empty


def deletion(full: float, empty: float, between: Sequence[float], share: Values) -> Deletion:
    """RISE and MAS.

    Args:
        full: ``s_0``, log-probability of the response after the whole prompt.
        empty: ``s_S``, after all ranked tokens have been replaced.
        between: ``s_1`` to ``s_{S-1}``. May end after the first that is at most ``empty``, since
            the running minimum stays 0 from there; may be empty unless ``needs_steps``.
        share: ``D``, ``[S + 1]``.

    Raises:
        ValueError: Steps are missing that the result depends on.
    """
    steps = len(share) - 1
    if not needs_steps(full, empty):
        level = 1.0 if full == empty else 0.0
        response = np.full(steps + 1, level)
        case = "flat" if full == empty else "inverted"
    else:
        below = next((i for i, value in enumerate(between) if value <= empty), None)
        known = between if below is None else between[: below + 1]
        if below is None and len(between) < steps - 1:
            raise ValueError(f"got {len(between)} of {steps - 1} steps")
        normalised = np.clip((np.array([full, *known]) - empty) / abs(full - empty), 0.0, 1.0)
        response = np.zeros(steps + 1)
        response[: len(normalised)] = np.minimum.accumulate(normalised)
        case = "" if below is None else "pinned"
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
