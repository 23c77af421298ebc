"""An engine in a process of its own, so that engines with and without the plugin run side by side.

Invariant: every answer has a time limit, and whatever happens, the process and all it started are
gone when the ``with`` block of its engine ends.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

_STOP_SECONDS = 30.0


class EngineFailedError(RuntimeError):
    """An engine did not start, did not answer in time, or raised."""


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What engine to start.

    Attributes:
        folder: Model folder.
        vocabulary: Number of token ids.
        plugin: Whether the plugin loads.
        runner: ``v1``, ``v2`` or None for vLLM's choice.
        arguments: Of ``vllm.LLM``, over those of the test harness.
    """

    folder: str
    vocabulary: int
    plugin: bool
    runner: str | None
    arguments: dict[str, Any]


class RemoteEngine:
    """The near end: calls methods of `gpu_engine_measures.Measures` in the process."""

    def __init__(self, connection: Connection, deadline: float) -> None:
        self._connection = connection
        self._deadline = deadline

    def ask(self, method: str, *arguments: Any) -> Any:
        """Calls a method and waits for its result.

        Raises:
            EngineFailedError: It raised, or the time is up.
        """
        try:
            self._connection.send((method, arguments))
        except OSError:
            raise EngineFailedError("the engine's process ended") from None
        return self.answer()

    def answer(self) -> Any:
        """Waits for the next result; see `ask`."""
        try:
            if not self._connection.poll(max(0.0, self._deadline - time.monotonic())):
                raise EngineFailedError("the time is up")
            result, problem = self._connection.recv()
        except (EOFError, OSError):
            raise EngineFailedError("the engine's process ended") from None
        if problem:
            raise EngineFailedError(problem)
        return result

    def stop(self) -> None:
        """Asks the engine to end."""
        self._connection.send(None)


@contextmanager
def running(spec: EngineSpec, deadline: float) -> Iterator[RemoteEngine]:
    """An engine that is ready.

    Args:
        spec: What to start.
        deadline: By `time.monotonic`, when every answer must be there.

    Raises:
        EngineFailedError: It does not start.
    """
    context = multiprocessing.get_context("spawn")
    near, far = context.Pipe()
    process = context.Process(target=_serve, args=(far, spec))
    process.start()
    far.close()
    engine = RemoteEngine(near, deadline)
    try:
        engine.answer()
        yield engine
        with contextlib.suppress(OSError):
            engine.stop()
        process.join(_STOP_SECONDS)
    finally:
        # The process leads a group, in which the engine's own processes are.
        if process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()


def _serve(connection: Connection, spec: EngineSpec) -> None:
    """The far end."""
    os.setsid()
    os.environ["VLLM_FLASHTRACE_DISABLE"] = "0" if spec.plugin else "1"
    if spec.runner is not None:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(spec.runner == "v2"))
    try:
        from benchmarks.gpu_engine_measures import Measures

        measures = Measures(spec)
    except BaseException:
        connection.send((None, traceback.format_exc()))
        return
    connection.send((None, ""))
    while (request := connection.recv()) is not None:
        method, arguments = request
        try:
            connection.send((getattr(measures, method)(*arguments), ""))
        except Exception:
            connection.send((None, traceback.format_exc()))
    measures.close()
