"""Ray for batches and deployments: started or joined, engines' processes prepared, runs stopped.

A Ray that is started here listens on 127.0.0.1 only, reports no usage and ends with this process; a
cluster that was joined goes on.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import Any

import psutil

from vllm_flashtrace.base.errors import FlashTraceError, in_one_line
from vllm_flashtrace.base.process import (
    bind_cores,
    enable_plugin,
    end_engine_with_this_process,
    prepare_environment,
)

_LOCALHOST = "127.0.0.1"
_LOCAL_NAMES = (_LOCALHOST, "localhost")
# A documentation address: any that is not on this machine does.
_ANYWHERE = ("192.0.2.1", 9)
_PROBE_SECONDS = 2.0
_ADDRESS = "RAY_ADDRESS"
# Options that a cluster is started with, and that one that is joined has already.
_OF_A_MACHINE = ("num_", "object_store_memory")
_EXTRA = "vllm-flashtrace[scale]"
# Tries to start a Ray, and what Ray says of one that did not come up in time.
_STARTS = 4
_TOO_SLOW = "timed out during startup"
_EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


class RayUnavailableError(FlashTraceError):
    """Ray is not installed, did not start, or cannot be joined."""

    def __init__(self, message: str) -> None:
        super().__init__("ray_unavailable", message)


@contextmanager
def connect(**options: Any) -> Iterator[Any]:
    """Ray, for as long as the ``with`` block lasts.

    Joins the cluster in ``RAY_ADDRESS``; without it a Ray of its own is started on this machine,
    without dashboard. Where this process is connected already, that connection is used and stays.

    Args:
        **options: Passed to ``ray.init``, e.g. ``num_cpus``; without effect on a connection that
            exists. Resources (``num_*``, ``object_store_memory``) are those of the cluster where
            one is joined.

    Yields:
        The ``ray`` module.

    Raises:
        RayUnavailableError: Ray is not installed, did not start, or cannot be joined.
    """
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # Nothing starts a Ray by the way.
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    address = os.environ.get(_ADDRESS)
    settings: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": True,
        **options,
    }
    if address:
        settings = {k: v for k, v in settings.items() if not k.startswith(_OF_A_MACHINE)}
    else:
        settings |= {
            "address": "local",
            "include_dashboard": False,
            "_node_ip_address": _LOCALHOST,
        }
    try:
        _init(ray, settings)
    except Exception as error:  # Ray raises many kinds, all of them meaning no Ray.
        reason = in_one_line(error)
        what = f"joining Ray at {address}" if address else "starting Ray"
        if _is_refused(error):
            reason = "it wants a token; set RAY_AUTH_MODE=token, with the cluster's token in place"
        raise RayUnavailableError(f"{what} failed: {reason}") from error
    try:
        yield ray
    finally:
        # What Ray Data made is ended when it is freed, and that would start a new Ray if this one
        # were gone, at any later moment.
        gc.collect()
        ray.shutdown()


def _init(ray: Any, settings: dict[str, Any]) -> None:
    """``ray.init``, again where a busy machine needs longer than the half minute that Ray waits."""
    process = psutil.Process()
    for left in reversed(range(_STARTS)):
        before = process.children()
        try:
            ray.init(**settings)
            return
        except Exception as error:
            if not left or _TOO_SLOW not in str(error):
                raise
        for child in process.children():
            if child not in before:
                child.kill()  # Of the Ray that came too late; Ray itself ends them at exit.


def _is_refused(error: BaseException | None) -> bool:
    """Whether the reason for ``error`` is a missing or wrong token."""
    while error is not None:
        if "AuthenticationError" in f"{type(error).__name__} {error}":
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_on_loopback_alone(address: str) -> bool:
    """Whether a cluster is found at 127.0.0.1, where Ray does not look, and nowhere else."""
    host, _, port = address.rpartition(":")
    if host not in _LOCAL_NAMES or not port.isdigit():
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(_ANYWHERE)  # Sends nothing, but chooses the interface.
            own = sock.getsockname()[0]
        except OSError:
            return True
    return _listens(_LOCALHOST, int(port)) and not _listens(own, int(port))


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=_PROBE_SECONDS).close()
    except OSError:
        return False
    return True


def import_ray(module: str = "ray") -> Any:
    """Imports Ray or a part of it, such as ``ray.data``, with usage reports off.

    Raises:
        RayUnavailableError: It is not installed; the message names the extra that brings it.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Engines are what the machine is there for; by default Ray's workers give way to everything.
    os.environ.setdefault("RAY_worker_niceness", "0")
    address = os.environ.get(_ADDRESS)
    if not address or _is_on_loopback_alone(address):
        # Ray listens on the loopback interface alone, and finds others there, where it takes itself
        # to be no cluster, which it reads from this variable when it is imported.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        return import_module(module)
    except ImportError as error:
        missing = getattr(error, "name", None) or module
        raise RayUnavailableError(f"{missing} is not installed; install {_EXTRA}") from None


def prepare_actor(rank: int, cpus: float | None, workers: int) -> None:
    """Readies the process of a Ray actor for an engine, which ends with it.

    Args:
        rank: Of this replica among those of the machine.
        cpus: Cores of a replica; 0 or None where it does not compute on the CPU.
        workers: Worker processes of the engine.
    """
    from vllm_flashtrace.trace.wire import ensure_secret

    if cpus:
        bind_cores(rank, cpus, workers)
    prepare_environment()
    enable_plugin()
    ensure_secret()
    end_engine_with_this_process()


class Interrupted(BaseException):
    """A signal asked the run to stop.

    Attributes:
        code: What the process is to exit with.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.code = _EXIT_CODES[signal.Signals(number)]


class Stopping:
    """Whether a signal came.

    Attributes:
        number: The signal's, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def check(self) -> None:
        """Raises :class:`Interrupted` if a signal came."""
        if self.number is not None:
            raise Interrupted(self.number)

    def _stop(self, number: int, _: FrameType | None) -> None:
        for each in _EXIT_CODES:
            signal.signal(each, signal.SIG_IGN)
        self.number = number
        self.check()


@contextmanager
def stop_on_signals() -> Iterator[Stopping]:
    """Turns SIGINT and SIGTERM into :class:`Interrupted` for as long as the block lasts.

    A signal interrupts once: the clean-up that it causes is not interrupted in turn. Whatever the
    block raises after a signal counts as the signal's doing, because Ray's C code turns an
    exception that is raised while it runs into another one, or drops it. For the same reason loops
    in the block have to ask for themselves.

    Yields:
        What a loop in the block is to ask at each turn.
    """
    stopping = Stopping()
    before = {number: signal.signal(number, stopping._stop) for number in _EXIT_CODES}
    try:
        yield stopping
        stopping.check()
    except Interrupted:
        raise  # The process is about to end; the signals stay ignored until then.
    except BaseException as error:
        if stopping.number is not None:
            raise Interrupted(stopping.number) from error
        _restore(before)
        raise
    _restore(before)


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
