"""What is computed from scores: recovery, RISE, MAS, sufficiency, intervals and tests.

The same definitions for every method. Work is only saved where it cannot matter: no step after the
running minimum has reached 0, no removed set of an example twice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
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

    def to_row(self) -> dict[str, Any]:
        """As it stands in the work file."""
        return {
            **asdict(self.deletion),
            "comprehensiveness": list(self.comprehensiveness.values()),
            "sufficiency": list(self.sufficiency.values()),
            "evaluations": self.evaluations,
        }


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

    def __init__(self, scorer: Any, pad_token_id: int) -> None:
        """Evaluates nothing yet.

        Args:
            scorer: As `EngineScorer`: its ``response_logprobs(sequences, response_lengths)`` gives
                the sum of the log-probabilities (nats) of each response.
            pad_token_id: Stands in the place of a removed token.
        """
        self.cost = Cost()
        self._scorer = scorer
        self._pad = pad_token_id

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
