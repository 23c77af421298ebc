"""A scorer without a model, and an example made by hand."""

from __future__ import annotations

import zlib
from array import array

import numpy as np

from benchmarks.faithfulness.example import Example, Prepared


def prepared_example() -> Prepared:
    """Two template tokens, twelve of the user's in four sentences, one of template, a response."""
    tokens = tuple(range(100, 119))
    return Prepared(
        example=Example("linear", "test", 0, "prompt", "why", "what"),
        token_ids=tokens,
        texts=tuple(str(token) for token in tokens),
        user=(2, 14),
        prompt_length=15,
        reasoning=(15, 17),
        target=(17, 19),
        gold=frozenset(),
        sentences=((2, 4), (4, 9), (9, 13), (13, 14)),
        reasoning_sentences=((15, 17),),
    )


class HashScorer:
    """Log-probabilities that depend on every token and are no function of how many were removed.

    ``trend`` is what a token that is not the pad token is worth on top.
    """

    def __init__(self, pad: int, trend: float = 0.05) -> None:
        self.pad = pad
        self.trend = trend
        self.sequences: list[tuple[int, ...]] = []

    def response_logprobs(
        self, token_ids: list[list[int]], response_lengths: list[int]
    ) -> list[float]:
        self.sequences += map(tuple, token_ids)
        return [
            self._value(tokens, n) for tokens, n in zip(token_ids, response_lengths, strict=True)
        ]

    def _value(self, tokens: list[int], response: int) -> float:
        prompt = tokens[: len(tokens) - response]
        noise = np.random.default_rng(zlib.crc32(array("q", tokens).tobytes())).normal()
        return float(noise + self.trend * sum(token != self.pad for token in prompt))
