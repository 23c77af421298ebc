"""Which attribution may enter the engine next: places and accumulator memory, behind one queue.

Waiters are admitted strictly in order, so a large trace is not overtaken for ever. Whatever ends a
holder or a waiter (return, exception, cancellation, the deadline) gives back what it held and lets
the next one in.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from vllm_flashtrace.base.errors import TraceError


@dataclass(frozen=True, slots=True, eq=False)
class _Waiter:
    nbytes: int
    admitted: asyncio.Future[None]


class Admission:
    """The attributions of one API server that are in the engine or wait for a place in it.

    Attributes:
        budget_bytes: What the holders may take together; None for no limit.
    """

    def __init__(
        self,
        places: int,
        *,
        max_waiting: int,
        max_waiting_seconds: float,
        budget_bytes: int | None = None,
        on_change: Callable[[Admission], None] | None = None,
        waits_for: str = "place in the engine",
        bytes_of: str = "accumulators",
    ) -> None:
        """Opens an empty queue.

        Args:
            places: Most holders at once.
            max_waiting: Most waiters at once.
            max_waiting_seconds: Longest wait.
            budget_bytes: What the holders may take together; None for no limit.
            on_change: Called after every change of holders or waiters; must not raise.
            waits_for: What a waiter waits for, as messages name it.
            bytes_of: What the budget is of, as messages name it.
        """
        self.budget_bytes = budget_bytes
        self._on_change = on_change
        self._waits_for = waits_for
        self._bytes_of = bytes_of
        self._places = places
        self._max_waiting = max_waiting
        self._max_seconds = max_waiting_seconds
        self._holders = 0
        self._held_bytes = 0
        self._queue: deque[_Waiter] = deque()

    @property
    def holders(self) -> int:
        """Places taken."""
        return self._holders

    @property
    def held_bytes(self) -> int:
        """Bytes of the budget taken."""
        return self._held_bytes

    @property
    def waiting(self) -> int:
        """Length of the queue."""
        return len(self._queue)

    def refuse_if_full(self, ahead: int = 0) -> None:
        """Refuses an attribution that would find neither a place nor room in the queue.

        Args:
            ahead: Others that will ask for a place before it does.

        Raises:
            TraceError: ``overloaded``.
        """
        free = 0 if self._queue else self._places - self._holders
        waiting = self.waiting + max(0, ahead - free)
        if ahead >= free and waiting >= self._max_waiting:
            raise _queue_is_full(waiting)

    @asynccontextmanager
    async def place(self, nbytes: int = 0) -> AsyncIterator[float]:
        """Holds a place and ``nbytes`` of the budget; yields the seconds spent waiting for them.

        Raises:
            TraceError: ``overloaded``: the queue is full, the wait was too long, or ``nbytes``
                exceeds the whole budget.
        """
        seconds = await self.enter(nbytes)
        try:
            yield seconds
        finally:
            self.leave(nbytes)

    async def enter(self, nbytes: int = 0) -> float:
        """What :meth:`place` does first; whoever calls it has to :meth:`leave`."""
        if self.budget_bytes is not None and nbytes > self.budget_bytes:
            raise TraceError(
                "overloaded",
                f"the trace needs {nbytes} bytes of {self._bytes_of}, the budget is "
                f"{self.budget_bytes} bytes",
            )
        if not self._queue and self._fits(nbytes):
            self._take(nbytes)
            self._changed()
            return 0.0
        if self.waiting >= self._max_waiting:
            raise _queue_is_full(self.waiting)
        began = time.monotonic()
        waiter = _Waiter(nbytes, asyncio.get_running_loop().create_future())
        self._queue.append(waiter)
        self._changed()
        try:
            async with asyncio.timeout(self._max_seconds):
                await waiter.admitted
        except TimeoutError:
            waiting = self.waiting
            self._withdraw(waiter)
            raise TraceError(
                "overloaded",
                f"no {self._waits_for} within {self._max_seconds:g} s ({waiting} attributions "
                "are waiting)",
            ) from None
        except BaseException:
            self._withdraw(waiter)
            raise
        return time.monotonic() - began

    def shrink(self, nbytes: int) -> None:
        """Gives back ``nbytes`` of a place that is kept."""
        self._held_bytes -= nbytes
        self._admit()

    def leave(self, nbytes: int = 0) -> None:
        """Gives back a place and ``nbytes``, and lets in who waits for them."""
        self._holders -= 1
        self._held_bytes -= nbytes
        self._admit()

    def _withdraw(self, waiter: _Waiter) -> None:
        if waiter in self._queue:
            self._queue.remove(waiter)
            self._admit()  # The others may have waited behind it.
        elif not waiter.admitted.cancelled():
            self.leave(waiter.nbytes)  # Admitted in the moment it was cancelled.

    def _admit(self) -> None:
        while self._queue:
            head = self._queue[0]
            if not head.admitted.cancelled():
                if not self._fits(head.nbytes):
                    break
                self._take(head.nbytes)
                head.admitted.set_result(None)
            self._queue.popleft()
        self._changed()

    def _changed(self) -> None:
        if self._on_change is not None:
            self._on_change(self)

    def _fits(self, nbytes: int) -> bool:
        room = self.budget_bytes is None or self._held_bytes + nbytes <= self.budget_bytes
        return room and self._holders < self._places

    def _take(self, nbytes: int) -> None:
        self._holders += 1
        self._held_bytes += nbytes


def _queue_is_full(waiting: int) -> TraceError:
    return TraceError("overloaded", f"{waiting} attributions are waiting already")
