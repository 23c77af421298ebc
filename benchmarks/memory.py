"""Resident memory of a process, read from Linux's ``/proc``.

The kernel keeps the largest resident size that a process ever had; writing 5 to ``clear_refs``
starts that record anew. So a peak between two moments is exact, with no sampling.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.engine.harness import Engine

_RESET_PEAK = "5"


def rss_mb(pid: int | None = None) -> float:
    """Resident MiB of a process (this one by default) now."""
    return _status_mb(pid, "VmRSS")


def peak_rss_mb(pid: int | None = None) -> float:
    """Largest resident MiB since the start, or since `reset_peak`."""
    return _status_mb(pid, "VmHWM")


def reset_peak(pid: int | None = None) -> None:
    """Starts the record of the largest resident size anew."""
    Path(f"/proc/{pid or os.getpid()}/clear_refs").write_text(_RESET_PEAK)


class WorkerMemory:
    """Peak memory of the engine's worker process, beside what it holds when idle."""

    def __init__(self, engine: Engine) -> None:
        """Returns freed memory to the system and starts to record.

        Args:
            engine: An engine that runs no request now.
        """
        self._pid = engine.on_worker(_release_freed)
        self.idle_mb = rss_mb(self._pid)
        reset_peak(self._pid)

    def peak_mb(self) -> float:
        """Largest resident MiB since construction."""
        return peak_rss_mb(self._pid)


def _release_freed(worker: Any) -> int:
    """Runs in the worker: freed but kept pages would hide what a later run allocates."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc has it
        trim(0)
    return os.getpid()


def _status_mb(pid: int | None, key: str) -> float:
    for line in Path(f"/proc/{pid or os.getpid()}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) / 1024
    raise KeyError(key)
