"""Finds the processes of an engine by their place in the tree.

Their titles, ``VLLM::EngineCore`` and ``VLLM::Worker``, are not always there: setproctitle looks
for the memory of a title next to that of the environment's first variable, and changes nothing
where that variable was changed. Which one is the first is chance where Ray starts a process.
"""

from __future__ import annotations

import psutil

_HELPERS = ("resource_tracker", "forkserver")


def engine_processes(server: psutil.Process) -> list[psutil.Process]:
    """The engine core and the workers below the process that ``server`` is."""
    return [process for core in _children(server) for process in (core, *_children(core))]


def engine_core(server: psutil.Process) -> psutil.Process:
    """The engine core of ``server``.

    Raises:
        ValueError: There is none, or several.
    """
    [core] = [child for child in _children(server) if _children(child)]
    return core


def worker(server: psutil.Process) -> psutil.Process:
    """The worker of an engine that has one.

    Raises:
        ValueError: There is none, or several.
    """
    [found] = _children(engine_core(server))
    return found


def _children(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children() if not _is_helper(child)]


def _is_helper(process: psutil.Process) -> bool:
    """Whether Python's multiprocessing started it for itself."""
    try:
        command = " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return True
    return any(name in command for name in _HELPERS)
