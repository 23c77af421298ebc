"""SIGINT and SIGTERM, which stop a run without losing anything.

Invariant: a signal interrupts once; the clean-up that it causes is not interrupted in turn.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


class Interrupted(BaseException):
    """A signal asked the run to stop.

    Attributes:
        code: What the process is to exit with.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.code = _EXIT_CODES[signal.Signals(number)]


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Turns SIGINT and SIGTERM into :class:`Interrupted` for as long as the block lasts."""
    before = {number: signal.signal(number, _stop) for number in _EXIT_CODES}
    try:
        yield
    except Interrupted:
        raise  # The process is about to end; the signals stay ignored until then.
    else:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, _: FrameType | None) -> None:
    for each in _EXIT_CODES:
        signal.signal(each, signal.SIG_IGN)
    raise Interrupted(number)
