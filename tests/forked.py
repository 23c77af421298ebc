"""Processes of vLLM that start without importing it: they are forked off one that has.

An import of vLLM takes 17 s of processor time, and a server is made of three processes. So each
process of the suite keeps a fork server (of :mod:`multiprocessing`) with vLLM's and our modules,
off which servers and engine cores are forked; what those start in turn is forked too. vLLM itself
spawns its processes on CPUs. Tests of that, and of how processes end, start a server by its
command.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.context import BaseContext, ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import values

_get_context = multiprocessing.get_context


class ForkedProcess(ForkServerProcess):
    """A process with the environment of the one that starts it, whose children are forked."""

    def start(self) -> None:
        self._environment = dict(os.environ)
        super().start()

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self._environment)
        multiprocessing.get_context = _fork_instead_of_spawn
        os.register_at_fork(after_in_child=_choose_metrics)
        super().run()

    def poll(self) -> int | None:
        """The exit status, as ``subprocess.Popen`` gives it, or None while it runs."""
        return self.exitcode

    def wait(self, timeout: float) -> int:
        """The exit status.

        Raises:
            subprocess.TimeoutExpired: It still runs after ``timeout`` seconds.
        """
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout)
        return self.exitcode


class _Context(ForkServerContext):
    Process = ForkedProcess


def forked(command: Sequence[str], log: Path, environment: dict[str, str]) -> ForkedProcess:
    """Starts ``python *command`` as the leader of a process group of its own.

    Args:
        command: ``-m MODULE`` or ``-c CODE``, with arguments.
        log: File for its output.
        environment: All its variables.
    """
    arguments = list(command), str(log), without_workers(environment)
    process = _context().Process(target=_run, args=arguments)
    process.start()
    return process


def without_workers(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what a vLLM worker in this process has set, which vLLM itself takes for a mistake."""
    return {name: value for name, value in environment.items() if name != "VLLM_DIST_IDENT"}


def run_forked(command: Sequence[str], log: Path, timeout: float, **env: str) -> tuple[int, str]:
    """The exit status and output of ``python *command`` with these variables besides ours."""
    process = forked(command, log, {**os.environ, **env})
    try:
        return process.wait(timeout), log.read_text(errors="replace")
    finally:
        process.kill()


@contextmanager
def processes_are_forked() -> Iterator[None]:
    """Whatever vLLM spawns from within is forked off the fork server instead."""
    context = _context()

    def get_context(method: str | None = None) -> BaseContext:
        return context if method == "spawn" else _get_context(method)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing, "get_context", get_context)
        yield


def _context() -> _Context:
    from vllm_flashtrace.base.process import prepare_environment

    prepare_environment()
    context = _Context()
    context.set_forkserver_preload(["tests.preloaded"])
    return context


def _fork_instead_of_spawn(method: str | None = None) -> Any:
    return _get_context("fork" if method == "spawn" else method)


def _choose_metrics() -> None:
    """Whether metrics are for several processes is otherwise decided when they are imported."""
    values.ValueClass = values.get_value_class()


def _run(command: list[str], log: str, environment: dict[str, str]) -> None:
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.environ.clear()
    os.environ.update(environment)
    option, program, *arguments = command
    sys.argv = [option, *arguments]
    # A process of multiprocessing ends without what it has registered for its end.
    atexit._clear()
    try:
        if option == "-c":
            exec(program, {"__name__": "__main__"})
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()
