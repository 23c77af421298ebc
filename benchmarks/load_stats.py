"""Latencies and throughput of the answers that a load got.

Invariant: every figure comes from the client's own clock; milliseconds unless the name says else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.load_client import Timing

PERCENTILES = (50, 95, 99)

Percentiles = dict[str, float]


@dataclass(frozen=True, slots=True)
class Block:
    """Requests that were measured together.

    Attributes:
        timings: One per request.
        seconds: From the first request sent to the last stream's end.
        beside: Seconds of each attribution of existing text that ran beside them.
    """

    timings: Sequence[Timing]
    seconds: float
    beside: Sequence[float] = ()

    @classmethod
    def of(cls, timings: Sequence[Timing], beside: Sequence[float] = ()) -> Block:
        """A block of these answers."""
        seconds = max(t.ended for t in timings) - min(t.sent for t in timings)
        return cls(timings, seconds, beside)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second."""
        return sum(t.output_tokens for t in self.timings) / self.seconds


def percentile(values: Sequence[float], percent: float) -> float:
    """Percentile with linear interpolation between neighbours."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
    return below + (above - below) * (place - math.floor(place))


def percentiles_ms(seconds: Iterable[float]) -> Percentiles | None:
    """p50, p95 and p99 in milliseconds; None of no values."""
    values = list(seconds)
    if not values:
        return None
    return {f"p{percent}": 1000 * percentile(values, percent) for percent in PERCENTILES}


def token_gaps(timings: Iterable[Timing]) -> list[float]:
    """Seconds between neighbouring token events, all requests pooled."""
    return [later - earlier for t in timings for earlier, later in pairwise(t.tokens)]


def attribution_seconds(timings: Iterable[Timing]) -> list[float]:
    """Seconds from the last token to the attribution, of traced requests."""
    return [t.attributed - t.tokens[-1] for t in timings if t.attributed is not None]


def latencies(timings: Sequence[Timing]) -> dict[str, Percentiles | None]:
    """Percentiles of everything a client waits for.

    Figures of untraced requests alone are None where no request is traced, ``traced_itl_ms`` where
    all are; a kind of request that does not occur has no figures either.
    """
    traced = [t for t in timings if t.traced]
    untraced = [t for t in timings if not t.traced]
    return {
        "ttft_ms": percentiles_ms(t.tokens[0] - t.sent for t in timings),
        "itl_ms": percentiles_ms(token_gaps(timings)),
        "e2e_ms": percentiles_ms(t.ended - t.sent for t in timings),
        "untraced_itl_ms": percentiles_ms(token_gaps(untraced)) if traced else None,
        "untraced_e2e_ms": percentiles_ms(t.ended - t.sent for t in untraced) if traced else None,
        "traced_itl_ms": percentiles_ms(token_gaps(traced)) if untraced else None,
        "traced_e2e_ms": percentiles_ms(t.ended - t.sent for t in traced),
        "attribution_ms": percentiles_ms(attribution_seconds(timings)),
    }
