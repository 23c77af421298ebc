"""Intervals and tests, by resampling.

Invariant: results depend on the data and the seed alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
FLIPS = 10_000
_EXACT_UP_TO = 12


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A paired comparison.

    Attributes:
        n: Pairs.
        mean: Of first minus second.
        p: Of the two-sided permutation test.
    """

    n: int
    mean: float
    p: float


def bootstrap(values: Sequence[float], *, seed: int = 0, level: float = 0.95) -> Estimate:
    """Mean with its percentile bootstrap interval.

    Raises:
        ValueError: There are no values.
    """
    if not len(values):
        raise ValueError("no values to estimate a mean from")
    data = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(data), size=(RESAMPLES, len(data)))
    tail = (1 - level) / 2
    low, high = np.quantile(data[drawn].mean(axis=1), [tail, 1 - tail])
    return Estimate(float(data.mean()), float(low), float(high))


def paired_test(first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> Difference:
    """Whether the means of paired values differ: the sign-flip permutation test.

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
    return Difference(count, float(differences.mean()), p)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's correction for having made several tests."""
    corrected: dict[str, float] = {}
    largest = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        corrected[name] = largest
    return corrected
