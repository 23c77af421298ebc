"""Ends an engine's processes when the process that started them is gone.

Invariant: nothing happens unless it was asked for, and a process ends for the death of its own
parent only. vLLM's engine core outlives a parent that is killed, and keeps the model's memory.
"""

from __future__ import annotations

import multiprocessing
import os
import threading

_ENV = "FLASHTRACE_END_WITH_PARENT"


def end_engine_with_this_process() -> None:
    """Asks the engine processes that are started from here to end when this one does."""
    os.environ[_ENV] = "1"


def end_with_parent_if_asked() -> None:
    """In a process that ``multiprocessing`` started, watches the parent, if that asked for it."""
    parent = multiprocessing.parent_process()
    if parent is None or not os.environ.get(_ENV):
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="flashtrace-parent", daemon=True).start()
