"""Time as the device spends it: marks set between pieces of work, and the seconds between them.

On a GPU the host runs ahead, so a mark there is a CUDA event, whose time is known once the device
has passed it.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Marks points in a device's work."""

    def mark(self) -> Any:
        """A mark after all work queued so far; never waits."""

    def seconds(self, start: Any, stop: Any) -> float:
        """Seconds between two marks; the device must have passed both."""


class HostClock:
    """The clock of a device on which work is done when the call returns."""

    def mark(self) -> float:
        """The time now."""
        return time.perf_counter()

    def seconds(self, start: float, stop: float) -> float:
        """The difference."""
        return stop - start


class CudaClock:
    """The clock of the current CUDA stream."""

    def mark(self) -> torch.cuda.Event:
        """An event on the current stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        """The time between two events that the device has passed."""
        return start.elapsed_time(stop) / 1000
