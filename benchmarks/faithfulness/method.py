"""What an attribution method is to the benchmark.

Invariant: a method gives one finite float64 score for each of the ``P`` user tokens, higher meaning
more important, or raises :class:`MethodFailed`; it never sees the gold spans.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from benchmarks.faithfulness.example import Prepared

Values = npt.NDArray[np.float64]


class MethodFailed(RuntimeError):
    """A method could not explain an example; the message says why."""


@dataclass(frozen=True)
class Scores:
    """What a method says about one example.

    Attributes:
        values: ``[P]`` float64, by offset from the first user token.
        seconds: What it cost on its own, also when it was computed together with others.
        facts: Numbers beyond the scores, e.g. ``reasoning_mass`` or ``remaining_mass``.
    """

    values: Values
    seconds: float
    facts: Mapping[str, float] = field(default_factory=dict)


class Family(Protocol):
    """Methods that share work on an example.

    Attributes:
        labels: Description of every method by its name, e.g. ``{"flashtrace-k1": "..."}``.
    """

    labels: Mapping[str, str]

    def attribute(self, prepared: Prepared, names: Collection[str]) -> dict[str, Scores]:
        """Scores of these methods of the family.

        Raises:
            MethodFailed: None of them can explain this example.
        """
        ...

    def close(self) -> None:
        """Lets go of what the family holds."""
        ...


class ResponseScorer(Protocol):
    """Log-probability of a fixed response after changed prompts."""

    def response_logprobs(
        self, token_ids: list[list[int]], response_lengths: list[int]
    ) -> list[float]:
        """Sum of the log-probabilities (nats) of the last ``response_lengths[i]`` tokens of each.

        Args:
            token_ids: Whole sequences, prompt and response.
            response_lengths: How many tokens at the end are the response.
        """
        ...
