"""A scorer of responses without a model: deterministic, and it counts what it is asked."""

from __future__ import annotations

import zlib
from array import array

import numpy as np


class HashScorer:
    """Log-probabilities that depend on every token and are no function of how many were removed.

    ``trend`` is what a token that is not the pad token is worth on top.
    """

    def __init__(self, pad: int, trend: float = 0.05) -> None:
        self.pad = pad
        self.trend = trend
        self.sequences: list[tuple[int, ...]] = []
        self.fail_after: int | None = None

    def response_logprobs(
        self, token_ids: list[list[int]], response_lengths: list[int]
    ) -> list[float]:
        if self.fail_after is not None and len(self.sequences) >= self.fail_after:
            raise KeyboardInterrupt
        self.sequences += map(tuple, token_ids)
        return [
            self._value(tokens, n) for tokens, n in zip(token_ids, response_lengths, strict=True)
        ]

    def _value(self, tokens: list[int], response: int) -> float:
        prompt = tokens[: len(tokens) - response]
        noise = np.random.default_rng(zlib.crc32(array("q", tokens).tobytes())).normal()
        return float(noise + self.trend * sum(token != self.pad for token in prompt))
