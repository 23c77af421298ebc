"""SIGINT and SIGTERM, which stop a run without losing anything.

Invariant: a signal interrupts once; the clean-up that it causes is not interrupted in turn. What
the block raises after a signal is the signal's doing: Ray's C code makes other exceptions of one
that is raised while it runs, or drops it, which is why loops are to look for themselves.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


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
