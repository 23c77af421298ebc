"""A stopping server outlives a process that vanishes while its name is looked up.

What it changes: the name ``find_process_using_port`` in vLLM's HTTP launcher. What it returns has
its command line read already, and a process that is gone by then is None.

Why here: on SIGTERM vLLM kills the engine and then logs which other process still listens on its
port. Engine and workers inherit the socket where they are forked, so the one that it finds is often
the one that it has just killed, and asking psutil for the command line of a process that is gone
raises. The server then leaves its event loop without waiting for its connections, and a completion
that was finished and only waited for its trace is lost as ``Internal Server Error``.

Tested on: vLLM 0.32.0.
"""

from __future__ import annotations

import functools
from typing import Any

import psutil
from vllm.entrypoints.launchers import launcher

from vllm_flashtrace.patches._check import require_parameters


class PortOwner:
    """What the launcher logs of a process, read while the process was there."""

    def __init__(self, process: psutil.Process) -> None:
        """Reads it.

        Raises:
            psutil.Error: The process is gone.
        """
        self._name = str(process)
        self._command = process.cmdline()

    def __str__(self) -> str:
        """As psutil describes the process."""
        return self._name

    def cmdline(self) -> list[str]:
        """The process's arguments."""
        return self._command


def check() -> None:
    """Raises PatchError unless the launcher looks for the process under this name."""
    find = getattr(launcher, "find_process_using_port", None)
    require_parameters(find, "launcher.find_process_using_port", "port")


def apply() -> None:
    """Wraps the function where the launcher finds it."""
    stock = launcher.find_process_using_port

    @functools.wraps(stock)
    def find_process_using_port(port: int) -> Any:
        process = stock(port)
        try:
            return None if process is None else PortOwner(process)
        except psutil.Error:
            return None

    launcher.find_process_using_port = find_process_using_port
