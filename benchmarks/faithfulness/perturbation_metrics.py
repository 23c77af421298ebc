"""RISE, MAS, sufficiency and comprehensiveness through any scorer of responses.

Invariant: the numbers are those of evaluating every step alone. Work is only saved where it cannot
matter: no step after the running minimum has reached 0, no removed set of an example twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.faithfulness.example import Prepared
from benchmarks.faithfulness.method import ResponseScorer, Values
from benchmarks.faithfulness.metrics import (
    Deletion,
    Mask,
    Offsets,
    deletion,
    explained_share,
    group_sizes,
    needs_steps,
    ranking,
    top_count,
)

FRACTIONS = (0.05, 0.1, 0.2)
"""Of the ranked tokens, removed for comprehensiveness and kept for sufficiency."""


@dataclass(frozen=True)
class Explanation:
    """What a method said about an example, to be tested.

    Attributes:
        prepared: The example.
        values: ``[P]``.
        excluded: ``[P]``, tokens that are neither ranked nor removed.
    """

    prepared: Prepared
    values: Values
    excluded: Mask | None = None


@dataclass(frozen=True)
class Perturbed:
    """What removing the tokens of an explanation does.

    Attributes:
        deletion: RISE and MAS.
        comprehensiveness: Log-probability lost per response token (nats) when the top tokens are
            removed, by fraction; higher is better.
        sufficiency: The same when only the top tokens are kept; lower is better.
        evaluations: Sequences that the explanation needed, shared ones included.
    """

    deletion: Deletion
    comprehensiveness: dict[float, float]
    sufficiency: dict[float, float]
    evaluations: int


@dataclass
class Cost:
    """What the metrics cost.

    Attributes:
        asked: Sequences that the explanations needed.
        evaluated: Sequences that were sent to the scorer.
        without_stop: Sequences that one forward pass for every step would have taken.
        seconds: Spent in the scorer.
    """

    asked: int = 0
    evaluated: int = 0
    without_stop: int = 0
    seconds: float = 0.0


@dataclass
class _State:
    explanation: Explanation
    ranked: Offsets
    ends: list[int]
    values: dict[bytes, float]
    between: list[float] = field(default_factory=list)
    asked: int = 0

    def removed(self, offsets: Offsets) -> Mask:
        mask = np.zeros(self.explanation.prepared.num_user_tokens, dtype=np.bool_)
        mask[offsets] = True
        return mask

    def step(self, number: int) -> Mask:
        """What is gone after so many groups."""
        return self.removed(self.ranked[: self.ends[number]])

    def erasures(self) -> list[tuple[str, float, Mask]]:
        """Sets for comprehensiveness and sufficiency."""
        counts = {f: top_count(len(self.ranked), f) for f in FRACTIONS}
        without = [("without", f, self.removed(self.ranked[:n])) for f, n in counts.items()]
        alone = [("alone", f, self.removed(self.ranked[n:])) for f, n in counts.items()]
        return without + alone

    def value(self, mask: Mask) -> float:
        return self.values[mask.tobytes()]


class PerturbationMetrics:
    """Evaluates explanations, many at a time."""

    def __init__(
        self,
        scorer: ResponseScorer,
        pad_token_id: int,
        *,
        on_evaluated: Callable[[int], None] | None = None,
    ) -> None:
        """Evaluates nothing yet.

        Args:
            scorer: Gives log-probabilities of responses.
            pad_token_id: Stands in the place of a removed token.
            on_evaluated: Told how many sequences have just been evaluated.
        """
        self.cost = Cost()
        self._scorer = scorer
        self._pad = pad_token_id
        self._on_evaluated = on_evaluated

    def evaluate(self, explanations: Sequence[Explanation]) -> list[Perturbed]:
        """The metrics of each explanation.

        Explanations of one example share sequences, so give them together; step ``i`` of all that
        still run is one call of the scorer.

        Raises:
            ValueError: An explanation ranks no token.
        """
        values: dict[tuple[str, int], dict[bytes, float]] = {}
        states = [self._state(explanation, values) for explanation in explanations]
        self._ask(
            (state, mask)
            for state in states
            for mask in (state.step(0), state.step(-1), *(m for _, _, m in state.erasures()))
        )
        running = [s for s in states if needs_steps(s.value(s.step(0)), s.value(s.step(-1)))]
        number = 1
        while running := [s for s in running if number < len(s.ends) - 1]:
            self._ask((state, state.step(number)) for state in running)
            for state in running:
                state.between.append(state.value(state.step(number)))
            running = [s for s in running if s.between[-1] > s.value(s.step(-1))]
            number += 1
        return [self._result(state) for state in states]

    def _state(
        self, explanation: Explanation, values: dict[tuple[str, int], dict[bytes, float]]
    ) -> _State:
        ranked = ranking(explanation.values, explanation.excluded)
        if not len(ranked):
            raise ValueError(f"{explanation.prepared.example.id}: no token is ranked")
        ends = [0, *np.cumsum(group_sizes(len(ranked))).tolist()]
        # Examples are told apart by their tokens too: ids are unique within one run alone.
        key = (explanation.prepared.example.id, hash(explanation.prepared.token_ids))
        state = _State(explanation, ranked, ends, values.setdefault(key, {}))
        self.cost.without_stop += len(ends) + 2 * len(FRACTIONS)
        return state

    def _ask(self, wanted: Iterable[tuple[_State, Mask]]) -> None:
        """Evaluates the sets that are not known yet, one call for all."""
        sequences: list[list[int]] = []
        lengths: list[int] = []
        places: list[tuple[dict[bytes, float], bytes]] = []
        for state, mask in wanted:
            state.asked += 1
            self.cost.asked += 1
            key = mask.tobytes()
            if key in state.values:
                continue
            state.values[key] = float("nan")  # taken: the next one with this set waits for it
            prepared = state.explanation.prepared
            tokens = list(prepared.token_ids)
            for offset in np.flatnonzero(mask).tolist():
                tokens[prepared.user[0] + offset] = self._pad
            sequences.append(tokens)
            lengths.append(prepared.response_length)
            places.append((state.values, key))
        if not sequences:
            return
        began = time.perf_counter()
        found = self._scorer.response_logprobs(sequences, lengths)
        self.cost.seconds += time.perf_counter() - began
        self.cost.evaluated += len(sequences)
        for (known, key), value in zip(places, found, strict=True):
            known[key] = float(value)
        if self._on_evaluated is not None:
            self._on_evaluated(len(sequences))

    def _result(self, state: _State) -> Perturbed:
        full, empty = state.value(state.step(0)), state.value(state.step(-1))
        share = explained_share(state.explanation.values, state.ranked)
        tokens = state.explanation.prepared.response_length
        lost = {
            (kind, fraction): (full - state.value(mask)) / tokens
            for kind, fraction, mask in state.erasures()
        }
        return Perturbed(
            deletion=deletion(full, empty, state.between, share),
            comprehensiveness={f: lost["without", f] for f in FRACTIONS},
            sufficiency={f: lost["alone", f] for f in FRACTIONS},
            evaluations=state.asked,
        )
