"""Seconds of a completion and of its attribution, and what they cost.

Invariant: a trace recomputes what the engine recomputes: from the start of the KV block that holds
its first target token to its last one. The prefix before is taken to be in the cache still.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from benchmarks.capacity_constants import Constants
from benchmarks.capacity_lengths import Lengths

SHARES = (0.0, 0.01, 0.1, 0.25, 1.0)
_SECONDS_PER_HOUR = 3600


@dataclass(frozen=True, slots=True)
class Hop:
    """A trace request: recomputes ``[cached, end)``, and ``[first_row, end)`` is its target."""

    cached: int
    first_row: int
    end: int

    @property
    def recomputed(self) -> int:
        """Tokens that are prefilled again."""
        return self.end - self.cached


def hops_of(lengths: Lengths, block_size: int, hops: int) -> list[Hop]:
    """The output, then the reasoning ``hops`` times; without reasoning there is no second one."""
    first = lengths.prompt + lengths.reasoning
    rows = [(first, lengths.context)]
    if lengths.reasoning:
        rows += [(lengths.prompt, first)] * hops
    return [Hop(start // block_size * block_size, start, end) for start, end in rows]


def visible_pairs(first: int, end: int) -> float:
    """Pairs of a token in ``[first, end)`` and a key that it sees, itself included."""
    return (end * (end + 1) - first * (first + 1)) / 2 if end > first else 0.0


def prefill_work(constants: Constants, first: int, end: int) -> float:
    """Seconds that tokens ``[first, end)`` of a prompt add to a step."""
    pairs = visible_pairs(first, end)
    return (end - first) * constants.token_seconds + pairs * constants.pair_seconds


def recording_work(constants: Constants, hop: Hop, first: int, end: int) -> float:
    """Seconds that the column sums of a trace's chunk ``[first, end)`` add to a step."""
    pairs = visible_pairs(max(first, hop.first_row), end)
    return pairs * constants.recording_pair_seconds


def hop_end_work(constants: Constants, hop: Hop) -> float:
    """Seconds of the proximity pass over the context."""
    return constants.hop_seconds + hop.end * constants.hop_context_seconds


def completion_seconds(
    constants: Constants, lengths: Lengths, *, batch: float, budget: int
) -> float:
    """Seconds of its replica that a completion takes when ``batch`` of them decode together.

    The first token comes with the prefill, alone in its steps; every other shares its step.

    Args:
        constants: Of the replica.
        lengths: Of the completion.
        batch: Sequences that share a decode step.
        budget: Tokens of a step at most.
    """
    steps = -(-lengths.prompt // budget)
    prefill = steps * constants.step_seconds + prefill_work(constants, 0, lengths.prompt)
    shared = constants.decode_step_seconds / batch + constants.decode_token_seconds
    keys = visible_pairs(lengths.prompt, lengths.context - 1)
    return prefill + (lengths.generated - 1) * shared + keys * constants.context_seconds


def trace_seconds(constants: Constants, lengths: Lengths, *, hops: int, budget: int) -> float:
    """Seconds of its replica that an attribution takes, its steps shared with nothing."""
    total = 0.0
    for hop in hops_of(lengths, constants.block_size, hops):
        total += -(-hop.recomputed // budget) * constants.step_seconds
        total += prefill_work(constants, hop.cached, hop.end)
        total += recording_work(constants, hop, hop.cached, hop.end)
        total += hop_end_work(constants, hop)
    return total


@dataclass(frozen=True, slots=True)
class Setting:
    """What the operator chooses.

    Attributes:
        batch: Sequences that decode together, where the KV cache has room for them.
        budget: Tokens of a step at most (``max_num_batched_tokens``).
        hops: Recursive hops of an attribution.
        dollars_per_gpu_hour: Price of a GPU.
    """

    batch: int
    budget: int
    hops: int
    dollars_per_gpu_hour: float


@dataclass(frozen=True, slots=True)
class Cost:
    """Mean seconds of a replica over a traffic.

    Attributes:
        completion: Of a completion.
        trace: Of an attribution.
        batch: Sequences that decoded together.
        gpus: Of the replica.
    """

    completion: float
    trace: float
    batch: float
    gpus: int

    @classmethod
    def of(cls, constants: Constants, traffic: Sequence[Lengths], setting: Setting) -> Cost:
        """Averages the model over requests."""
        batch = float(setting.batch)
        if constants.kv_tokens is not None:
            fitting = constants.kv_tokens / fmean(lengths.context for lengths in traffic)
            batch = max(1.0, min(batch, fitting))
        budget = setting.budget
        return cls(
            fmean(completion_seconds(constants, x, batch=batch, budget=budget) for x in traffic),
            fmean(trace_seconds(constants, x, hops=setting.hops, budget=budget) for x in traffic),
            batch,
            constants.gpus,
        )

    def seconds(self, share: float) -> float:
        """Mean seconds of a request if ``share`` of them are traced."""
        if not 0 <= share <= 1:
            raise ValueError(f"a share of {share}")
        return self.completion + share * self.trace

    def dollars_per_million(self, seconds: float, setting: Setting) -> float:
        """Price of a million times so many seconds of the replica."""
        return 1e6 * seconds * self.gpus * setting.dollars_per_gpu_hour / _SECONDS_PER_HOUR


def cost_rows(
    constants: Sequence[Constants], traffic: dict[str, list[Lengths]], setting: Setting
) -> Iterator[dict[str, Any]]:
    """One row for each kind of traffic on each replica."""
    for kind, lengths in traffic.items():
        for one in constants:
            cost = Cost.of(one, lengths, setting)
            row: dict[str, Any] = {
                "replica": one.name,
                "basis": one.basis,
                "source": one.source,
                "traffic": kind,
                "batch": cost.batch,
                "completion_seconds": cost.completion,
                "trace_seconds": cost.trace,
                "trace_to_completion": cost.trace / cost.completion,
                "slower_by_share": {
                    str(share): cost.seconds(share) / cost.completion - 1 for share in SHARES
                },
            }
            if one.gpus:
                row["dollars"] = {
                    "completions": cost.dollars_per_million(cost.completion, setting),
                    "explanations": cost.dollars_per_million(cost.trace, setting),
                    "explained": cost.dollars_per_million(cost.seconds(1), setting),
                    "by_share": {
                        str(share): cost.dollars_per_million(cost.seconds(share), setting)
                        for share in SHARES
                    },
                }
            yield row
