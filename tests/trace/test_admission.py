"""Places and memory behind one queue: limits, order, deadline, and nothing lost on the way."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.trace.admission import Admission


def admission(places: int = 1, **changes: Any) -> Admission:
    return Admission(places, **{"max_waiting": 100, "max_waiting_seconds": 60.0, **changes})


class Holder:
    """A task that holds a place until it is told to leave."""

    def __init__(self, queue: Admission, nbytes: int = 0, log: list[Holder] | None = None) -> None:
        self.queue, self.nbytes, self.log = queue, nbytes, log
        self.inside = False
        self.waited: float | None = None
        self._leave = asyncio.Event()
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async with self.queue.place(self.nbytes) as self.waited:
            self.inside = True
            if self.log is not None:
                self.log.append(self)
            await self._leave.wait()
        self.inside = False

    async def leave(self) -> None:
        self._leave.set()
        await self.task

    async def cancel(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.inside = False


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def empty(queue: Admission) -> bool:
    return (queue.holders, queue.held_bytes, queue.waiting) == (0, 0, 0)


async def test_waiters_enter_in_order_one_per_place_freed() -> None:
    queue, log = admission(2), []
    holders = [Holder(queue, log=log) for _ in range(5)]
    await settle()
    assert (queue.holders, queue.waiting) == (2, 3)
    for holder in holders:
        await holder.leave()
        await settle()
    assert log == holders
    assert holders[0].waited == 0.0
    assert empty(queue)


async def test_one_queue_for_places_and_bytes() -> None:
    queue = admission(3, budget_bytes=100)
    first, large, small = (Holder(queue, nbytes) for nbytes in (60, 50, 10))
    await settle()
    # The small one would fit, but must not overtake the large one.
    assert [h.inside for h in (first, large, small)] == [True, False, False]
    await first.leave()
    await settle()
    assert large.inside and small.inside
    assert queue.held_bytes == 60
    await large.leave()
    await small.leave()
    assert empty(queue)


async def test_what_can_never_fit_is_refused_at_once() -> None:
    queue = admission(budget_bytes=100)
    with pytest.raises(TraceError, match=r"needs 101 bytes.*the budget is 100 bytes") as caught:
        async with queue.place(101):
            pass
    assert caught.value.code == "overloaded"
    assert empty(queue)


async def test_a_full_queue_refuses_newcomers() -> None:
    queue = admission(max_waiting=1)
    queue.refuse_if_full()
    holder, waiter = Holder(queue), None
    await settle()
    queue.refuse_if_full()
    waiter = Holder(queue)
    await settle()
    with pytest.raises(TraceError, match="1 attributions are waiting already") as caught:
        queue.refuse_if_full()
    assert caught.value.code == "overloaded"
    with pytest.raises(TraceError, match="waiting already"):
        async with queue.place():
            pass
    await holder.leave()
    await waiter.leave()
    assert empty(queue)


async def test_no_queue_at_all() -> None:
    queue = admission(max_waiting=0)
    queue.refuse_if_full()
    holder = Holder(queue)
    await settle()
    assert holder.inside
    with pytest.raises(TraceError, match="0 attributions are waiting already"):
        queue.refuse_if_full()
    await holder.leave()
    queue.refuse_if_full()


async def test_the_deadline_tells_how_long_and_how_many() -> None:
    queue = admission(max_waiting_seconds=0.05)
    holder = Holder(queue)
    await settle()
    late = [Holder(queue), Holder(queue)]
    outcomes = await asyncio.gather(*(h.task for h in late), return_exceptions=True)
    assert all(isinstance(error, TraceError) for error in outcomes)
    assert outcomes[0].code == "overloaded"  # type: ignore[union-attr]
    assert "no place in the engine within 0.05 s (2 attributions are waiting)" in str(outcomes[0])
    assert queue.waiting == 0
    await holder.leave()
    assert empty(queue)


async def test_the_wait_is_measured() -> None:
    queue = admission()
    first, second = Holder(queue), Holder(queue)
    await asyncio.sleep(0.05)
    await first.leave()
    await settle()
    assert second.waited is not None and 0.02 < second.waited < 60
    await second.leave()


async def test_a_cancelled_head_lets_those_behind_it_in() -> None:
    queue = admission(5, budget_bytes=100)
    first, large, small = (Holder(queue, nbytes) for nbytes in (60, 50, 10))
    await settle()
    await large.cancel()
    assert small.inside
    await first.leave()
    await small.leave()
    assert empty(queue)


async def test_cancelled_in_the_moment_of_admission() -> None:
    """The place was given, but its owner never ran again: the next one gets it."""
    queue = admission()
    first, second, third = (Holder(queue) for _ in range(3))
    await settle()
    first._leave.set()
    await asyncio.sleep(0)  # the first leaves and admits the second, which has not run yet
    assert queue.holders == 1 and not second.inside
    await second.cancel()
    await settle()
    assert third.inside
    await third.leave()
    assert empty(queue)


async def test_admission_passes_over_waiters_cancelled_in_the_same_moment() -> None:
    queue = admission()
    first, second, third = (Holder(queue) for _ in range(3))
    await settle()
    second.task.cancel()
    first._leave.set()
    await settle()
    assert third.inside
    await third.leave()
    assert empty(queue)


async def test_an_exception_inside_gives_the_place_back() -> None:
    queue = admission(budget_bytes=10)
    with pytest.raises(KeyError):
        async with queue.place(10):
            raise KeyError
    assert empty(queue)


@settings(max_examples=150, deadline=None)
@given(
    places=st.integers(1, 4),
    budget=st.none() | st.integers(10_000, 40_000),
    max_waiting=st.integers(0, 8),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_schedule(places: int, budget: int | None, max_waiting: int, seed: int) -> None:
    asyncio.run(_any_schedule(places, budget, max_waiting, random.Random(seed)))


class Logged(Admission):
    """Keeps the sizes of those admitted, in order; a task may run later than it is admitted."""

    def _take(self, nbytes: int) -> None:
        super()._take(nbytes)
        self.log = [*getattr(self, "log", []), nbytes]


async def _any_schedule(
    places: int, budget: int | None, max_waiting: int, rng: random.Random
) -> None:
    queue = Logged(places, budget_bytes=budget, max_waiting=max_waiting, max_waiting_seconds=60.0)
    alive: list[Holder] = []
    asked: list[Holder] = []

    async def arrive() -> None:
        holder = Holder(queue, rng.randint(0, 12) * 1000 + len(asked))  # the rest is its number
        asked.append(holder)
        alive.append(holder)

    async def leave() -> None:
        for holder in rng.sample(alive, min(len(alive), 2)):
            if holder.inside:
                holder._leave.set()

    async def cancel() -> None:
        for holder in rng.sample(alive, min(len(alive), rng.randint(1, 2))):
            holder.task.cancel()

    async def turn() -> None:
        await asyncio.sleep(0)

    actions: list[Callable[[], Awaitable[None]]] = [arrive, arrive, arrive, leave, leave, cancel]
    for _ in range(60):
        await rng.choice([*actions, turn, settle])()
        assert queue.holders <= places
        assert budget is None or queue.held_bytes <= budget
        assert queue.waiting <= max_waiting
        alive = [holder for holder in alive if not holder.task.done()]
    while alive:
        await settle()
        inside = [holder for holder in alive if holder.inside]
        assert inside or not [holder for holder in alive if not holder.task.done()], "stuck"
        for holder in inside:
            holder._leave.set()
        await settle()
        alive = [holder for holder in alive if not holder.task.done()]
    assert empty(queue)
    assert queue.log == sorted(queue.log, key=lambda nbytes: nbytes % 1000)
    await asyncio.gather(*(holder.task for holder in asked), return_exceptions=True)
