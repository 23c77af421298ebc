"""Numbers the replicas on one machine, so that each can take CPU cores of its own.

Invariant: a slot belongs to one living process; when that ends, however it ends, the slot is free.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


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
