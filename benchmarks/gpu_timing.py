"""Times calls on a device, and says what the device could do at best.

Invariant: a call's time is between CUDA events, the median of several calls, each after a write of
more than the L2 cache; on the CPU, which only a dry run uses, it is wall-clock time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

_FLUSHED_BYTES = 256 << 20
_WARM_UPS = 3
_HOST_CALLS = 10


class Peak(NamedTuple):
    """Best rates per second: 16-bit matrix products, memory, exponentials."""

    flops: float
    bytes: float
    exponentials: float


# Dense bfloat16 and memory from NVIDIA's data sheets; exponentials: 16 a clock of each of 132
# multiprocessors at 1.83 GHz.
_PEAKS = {
    "NVIDIA H100 80GB HBM3": Peak(989e12, 3.35e12, 3.9e12),
    "NVIDIA H200": Peak(989e12, 4.8e12, 3.9e12),
}


@dataclass(frozen=True, slots=True)
class Cost:
    """What a call has to do at least.

    Attributes:
        flops: Of matrix products, a multiply-add counted twice.
        bytes: Read or written once.
        exponentials: One for every visible pair of a row and a key, head and pass.
    """

    flops: float
    bytes: float
    exponentials: float = 0.0


@dataclass(frozen=True, slots=True)
class Measured:
    """Times of a call in milliseconds: on the device, and until the host may go on."""

    ms: float
    host_ms: float

    def against(self, cost: Cost, peak: Peak | None) -> dict[str, float | None]:
        """Rates reached, and the floor: the longer of products and memory at their best rates."""
        floor = None
        if peak is not None:
            floor = 1e3 * max(cost.flops / peak.flops, cost.bytes / peak.bytes)
        return {
            "ms": self.ms,
            "host_ms": self.host_ms,
            "tflops": cost.flops / self.ms / 1e9,
            "gbs": cost.bytes / self.ms / 1e6,
            "floor_ms": floor,
            "exponentials_ms": peak and 1e3 * cost.exponentials / peak.exponentials,
            "ratio_to_floor": floor and self.ms / floor,
        }


def peak_of(device: torch.device) -> Peak | None:
    """Best rates of a device, None if it is not one whose rates are known."""
    if device.type != "cuda":
        return None
    return _PEAKS.get(torch.cuda.get_device_name(device))


class Stopwatch:
    """Measures calls on one device."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        """Takes the memory that flushes the cache.

        Args:
            device: Where calls run.
            repeats: Timed calls of which the median counts.
        """
        self.device = device
        self.repeats = repeats
        on_gpu = device.type == "cuda"
        self._flush = torch.empty(_FLUSHED_BYTES if on_gpu else 0, dtype=torch.int8, device=device)

    def measure(self, call: Callable[[], object]) -> Measured:
        """Times a call; the first ones, which compile, do not count."""
        warm_ups = _WARM_UPS if self.device.type == "cuda" else 1
        for _ in range(warm_ups):
            call()
        self.wait()
        host_calls = _HOST_CALLS if self.device.type == "cuda" else 1
        began = time.perf_counter()
        for _ in range(host_calls):
            call()
        host_ms = 1e3 * (time.perf_counter() - began) / host_calls
        self.wait()
        return Measured(self.median_ms(call), host_ms)

    def median_ms(self, call: Callable[[], object]) -> float:
        """Device time of a call that is warm already."""
        return statistics.median(self._times(call))

    def wait(self) -> None:
        """Until the device has done all work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _times(self, call: Callable[[], object]) -> list[float]:
        if self.device.type != "cuda":
            times = []
            for _ in range(self.repeats):
                began = time.perf_counter()
                call()
                times.append(1e3 * (time.perf_counter() - began))
            return times
        pairs = []
        for _ in range(self.repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        self.wait()
        return [start.elapsed_time(end) for start, end in pairs]
