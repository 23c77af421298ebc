"""Times a device's work by marks, and adds up what recording a trace took between them."""

from __future__ import annotations

import time
from typing import Any, ClassVar, Protocol

import torch


class Clock(Protocol):
    """Times a device's work by marks, which are set without waiting for it.

    Attributes:
        costs_nothing: Whether a mark takes next to no time of the host. Where it does take time,
            only what takes much more is timed.
    """

    costs_nothing: ClassVar[bool]

    def mark(self) -> Any:
        """A mark behind all work queued so far."""

    def passed(self, mark: Any) -> bool:
        """Whether the device has passed a mark; does not wait for it."""

    def seconds(self, start: Any, stop: Any) -> float:
        """Seconds between two marks; the device must have passed both."""


class HostClock:
    """The clock of a device on which work is done when the call returns."""

    costs_nothing: ClassVar[bool] = True

    def mark(self) -> float:
        """The time now."""
        return time.perf_counter()

    def passed(self, mark: float) -> bool:
        """Always."""
        return True

    def seconds(self, start: float, stop: float) -> float:
        """The difference."""
        return stop - start


class CudaClock:
    """The clock of the current CUDA stream: the host runs ahead, so its marks are CUDA events."""

    costs_nothing: ClassVar[bool] = False

    def mark(self) -> torch.cuda.Event:
        """An event on the current stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def passed(self, mark: torch.cuda.Event) -> bool:
        """Whether the event is over."""
        return mark.query()

    def seconds(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        """The time between two events that the device has passed."""
        return start.elapsed_time(stop) / 1000


class Pieces:
    """The pieces of recording of one step, which several traces share."""

    def __init__(self, clock: Clock) -> None:
        """Starts without a piece."""
        self._clock = clock
        self._marks: list[tuple[Any, Any]] = []
        self._seconds = 0.0

    @property
    def passed(self) -> bool:
        """Whether the device has passed all of them."""
        return not self._marks or self._clock.passed(self._marks[-1][1])

    def add(self, began: Any, ended: Any) -> None:
        """Adds the piece between two marks."""
        self._marks.append((began, ended))

    def seconds(self) -> float:
        """All pieces together; the device must have passed them."""
        self._seconds += sum(self._clock.seconds(*marks) for marks in self._marks)
        self._marks.clear()
        return self._seconds


class TimeSpent:
    """Time spent on recording a trace.

    A long trace has thousands of pieces, so those that the device has passed are added up step by
    step and not when the result is picked up.
    """

    def __init__(self) -> None:
        """Starts at 0."""
        self._seconds = 0.0
        self._steps: list[Pieces] = []

    def include(self, pieces: Pieces) -> None:
        """Counts what has been, and will be, added to ``pieces``."""
        self._steps.append(pieces)

    def fold(self) -> None:
        """Adds up the steps that are over; must not be called between those of a step's layers."""
        while self._steps and self._steps[0].passed:
            self._seconds += self._steps.pop(0).seconds()

    def seconds(self) -> float:
        """All of it; the device must have passed it."""
        return self._seconds + sum(pieces.seconds() for pieces in self._steps)
