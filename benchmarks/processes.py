"""The processes of a server and of its engine, and how much memory they have resident.

Processes are found by their place in the tree: the titles ``VLLM::EngineCore`` and ``VLLM::Worker``
are not always there. setproctitle looks for the memory of a title next to that of the environment's
first variable, and changes nothing where that variable was changed.

Linux keeps the largest resident size of a process; writing 5 to ``clear_refs`` starts that record
anew, so a peak between two moments is exact, with no sampling.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from tests.engine.harness import Engine

_HELPERS = ("resource_tracker", "forkserver")
_RESET_PEAK = "5"


def engine_processes(server: psutil.Process) -> list[psutil.Process]:
    """The engine core and the workers below the process that ``server`` is."""
    return [process for core in _children(server) for process in (core, *_children(core))]


def engine_core(server: psutil.Process) -> psutil.Process:
    """The engine core of ``server``; raises ValueError unless there is exactly one."""
    children = _children(server)
    [core] = [child for child in children if _children(child)] or children
    return core


def worker(server: psutil.Process) -> psutil.Process:
    """The process of ``server``'s worker, which may be its engine core's own.

    Raises ValueError unless there is exactly one.
    """
    core = engine_core(server)
    [found] = _children(core) or [core]
    return found


def memory_mb(pid: int) -> dict[str, float]:
    """Resident MiB of an API server, its engine core and its worker."""
    root = psutil.Process(pid)
    found = {"server": root, "engine": engine_core(root), "worker": worker(root)}
    return {f"{role}_mb": process.memory_info().rss / 2**20 for role, process in found.items()}


def rss_mb(pid: int | None = None) -> float:
    """Resident MiB of a process (this one by default) now."""
    return _status_mb(pid, "VmRSS")


def peak_rss_mb(pid: int | None = None) -> float:
    """Largest resident MiB since the start, or since the record was started anew."""
    return _status_mb(pid, "VmHWM")


class WorkerMemory:
    """Peak memory of the engine's worker process, beside what it holds when idle."""

    def __init__(self, engine: Engine) -> None:
        """Returns freed memory to the system and starts to record; no request may run now."""
        self._pid = engine.on_worker(_release_freed)
        self.idle_mb = rss_mb(self._pid)
        Path(f"/proc/{self._pid}/clear_refs").write_text(_RESET_PEAK)

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


def _children(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children() if not _is_helper(child)]


def _is_helper(process: psutil.Process) -> bool:
    """Whether Python's multiprocessing started it for itself."""
    try:
        command = " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return True
    return any(name in command for name in _HELPERS)
