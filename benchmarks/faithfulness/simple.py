"""Baselines that look at no model: chance, position, and shared words.

Invariant: their scores depend on the text and the seed alone.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from benchmarks.faithfulness.example import Prepared
from benchmarks.faithfulness.method import Scores, Values


class SimpleFamily:
    """Random, recency and token overlap."""

    labels: Mapping[str, str] = {
        "random": "uniform random scores",
        "recency": "later tokens score higher",
        "overlap": "tokens that stand in the output score 1, in the reasoning 0.5",
    }

    def __init__(self, resources: Any) -> None:
        """Takes ``resources.seed``."""
        self._seed = int(resources.seed)

    def attribute(self, prepared: Prepared, names: Collection[str]) -> dict[str, Scores]:
        """See `benchmarks.faithfulness.method.Family`."""
        methods: dict[str, Callable[[Prepared], Values]] = {
            "random": self._random,
            "recency": _recency,
            "overlap": _overlap,
        }
        results = {}
        for name in names:
            began = time.perf_counter()
            values = methods[name](prepared)
            results[name] = Scores(values, time.perf_counter() - began)
        return results

    def close(self) -> None:
        """Holds nothing."""

    def _random(self, prepared: Prepared) -> Values:
        key = zlib.crc32(prepared.example.id.encode())
        return np.random.default_rng([self._seed, key]).random(prepared.num_user_tokens)


def _recency(prepared: Prepared) -> Values:
    size = prepared.num_user_tokens
    return np.arange(1, size + 1, dtype=np.float64) / size


def _overlap(prepared: Prepared) -> Values:
    """By token text without blanks; ties, which are many, go to the later token."""

    def texts(start: int, end: int) -> set[str]:
        return {prepared.texts[i].strip().lower() for i in range(start, end)} - {""}

    output, reasoning = texts(*prepared.target), texts(*prepared.reasoning)
    words = [prepared.texts[i].strip().lower() for i in range(*prepared.user)]
    scores = [1.0 if word in output else 0.5 if word in reasoning else 0.0 for word in words]
    return np.array(scores, dtype=np.float64) + 1e-6 * _recency(prepared)
