"""Keeps replicas on one machine apart: each takes a slot, and with it CPU cores of its own.

Invariant: a slot belongs to one living process; when that ends, however it ends, the slot is free.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

_BINDING = "VLLM_CPU_OMP_THREADS_BIND"


class Slot:
    """The lowest number that no other replica of this user holds on this machine."""

    def __init__(self, group: str) -> None:
        """Takes a slot.

        Args:
            group: Replicas of one group share the numbers.
        """
        from filelock import FileLock, Timeout

        folder = Path(tempfile.gettempdir()) / f"vllm-flashtrace-{os.getuid()}" / group
        folder.mkdir(parents=True, exist_ok=True)
        self.number = 0
        while True:
            self._lock = FileLock(folder / f"slot-{self.number}")
            try:
                self._lock.acquire(blocking=False)
                return
            except Timeout:
                self.number += 1


def core_binding(slot: int, cores: int, workers: int, available: list[int]) -> str | None:
    """The value of ``VLLM_CPU_OMP_THREADS_BIND`` that gives a slot its own cores.

    Args:
        slot: Number of the slot.
        cores: Cores for each slot.
        workers: Worker processes among which they are divided.
        available: Cores of this process.

    Returns:
        Cores of each worker, workers separated by ``|``; None where they do not suffice.
    """
    mine = available[slot * cores : (slot + 1) * cores]
    share = len(mine) // workers
    if share < 1 or len(mine) < cores:
        return None
    parts = [mine[i * share : (i + 1) * share] for i in range(workers)]
    return "|".join(",".join(map(str, part)) for part in parts)


def bind_cores(slot: Slot, cores: int, workers: int) -> None:
    """Binds the engine that this process starts to its slot's cores, unless the user bound it."""
    binding = core_binding(slot.number, cores, workers, sorted(os.sched_getaffinity(0)))
    if binding is not None:
        os.environ.setdefault(_BINDING, binding)
