"""Attributions that outlive the request that asked for them, and what a store of them can do."""

from __future__ import annotations

import asyncio
import base64
import json
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.base.logs import logger
from vllm_flashtrace.server.large_objects import as_text
from vllm_flashtrace.text.result import failed_result

# What a store raises when it cannot be used; one behind a network raises ``ConnectionError``.
STORE_ERRORS = (OSError, sqlite3.Error)

# Between an attribution's JSON, which has no line break, and its file in base64.
_FILE_BEHIND = "\n"

Job = Callable[[], Awaitable[dict[str, Any]]]

# How soon a server notices that another one deleted an entry of its own.
_RENEW_SECONDS = 1.0
# How often it looks for entries that are over their time while nothing runs.
_IDLE_SECONDS = 30.0


class DeferredAttributions:
    """The deferred attributions of one API server, in a store that others may share.

    An entry that is not finished belongs to one task of one server. The task ends when the entry
    is deleted, by whichever server, and its result is stored under the id that the client was
    given, or dropped with a line in the log.
    """

    def __init__(
        self,
        store: AttributionStore,
        *,
        places: int,
        on_change: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Nothing runs before the first attribution.

        Args:
            store: Shared by all API servers that answer for each other.
            places: How many run at once; the rest stay ``queued``, so that they do not fill the
                queue in which inline attributions wait for the engine.
            on_change: Told from time to time how many entries of the store are this server's.
        """
        self.store = store
        self._places = asyncio.Semaphore(places)
        self._on_change = on_change
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._tender: asyncio.Task[None] | None = None
        self._added = asyncio.Event()
        self._closed = False

    @property
    def unfinished(self) -> int:
        """Attributions of this server that are queued or running."""
        return len(self._tasks)

    async def submit(self, attribution_id: str, job: Job) -> dict[str, Any]:
        """Stores ``job`` as ``queued``; it goes on whatever happens to the caller.

        Args:
            attribution_id: Fresh id.
            job: Makes the attribution object, whatever happens to the trace.

        Returns:
            The ``queued`` object.

        Raises:
            TraceError: ``overloaded``: the store is full of unfinished attributions.
            STORE_ERRORS: The store cannot be used.
        """
        return await asyncio.shield(self._submit(attribution_id, job))

    async def get(self, attribution_id: str) -> str | None:
        """JSON of the attribution object; None when the id is unknown or its time is over."""
        stored = await asyncio.to_thread(self._stored, attribution_id)
        return None if stored is None else stored[0]

    async def get_with_file(self, attribution_id: str) -> tuple[str, bytes | None] | None:
        """As `get`, with the file of its sums of attention, None where it has none."""

        def both() -> tuple[str, bytes | None] | None:
            stored = self._stored(attribution_id)
            if stored is None:
                return None
            body, file = stored
            return body, base64.b64decode(file) if file else None

        return await asyncio.to_thread(both)

    def _stored(self, attribution_id: str) -> tuple[str, str] | None:
        """JSON and file, as `_with_file` has put them together."""
        stored = self.store.get(attribution_id)
        if stored is None:
            return None
        body, _, file = stored.partition(_FILE_BEHIND)
        return body, file

    async def delete(self, attribution_id: str) -> bool:
        """Drops an entry and stops its trace; False when unknown or over its time."""
        deleted = await asyncio.to_thread(self.store.delete, attribution_id)
        task = self._tasks.get(attribution_id)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        if deleted and self._tender is not None:
            await self._renew()
        return deleted

    async def keep(self) -> None:
        """Tells the store that this server is there, also when nothing runs."""
        await self._renew()

    async def close(self) -> None:
        """Stops what is unfinished, saying what was lost, and closes the store."""
        self._closed = True
        lost = list(self._tasks.items())
        tasks = [task for _, task in lost]
        if self._tender is not None:
            tasks.append(self._tender)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for attribution_id, _ in lost:
            logger.warning("Deferred attribution %s was lost: the server stops", attribution_id)
        await asyncio.to_thread(self._let_go, bool(lost))

    def _let_go(self, with_lost: bool) -> None:
        try:
            if with_lost:
                self.store.abandon()
            self.store.close()
        except STORE_ERRORS:
            logger.exception("The store of deferred attributions could not be told of the end")

    async def _submit(self, attribution_id: str, job: Job) -> dict[str, Any]:
        if self._closed:
            raise TraceError("overloaded", "the server is shutting down")
        body = await asyncio.to_thread(self.store.reserve, attribution_id)
        task = asyncio.create_task(
            self._run(attribution_id, job), name=f"flashtrace-deferred-{attribution_id}"
        )
        self._tasks[attribution_id] = task
        task.add_done_callback(lambda _: self._tasks.pop(attribution_id, None))
        if self._tender is None or self._tender.done():
            self._tender = asyncio.create_task(self._tend(), name="flashtrace-deferred-tender")
        self._added.set()
        queued: dict[str, Any] = json.loads(body)
        return queued

    async def _run(self, attribution_id: str, job: Job) -> None:
        try:
            async with self._places:
                if not await asyncio.to_thread(self.store.start, attribution_id):
                    return
                attribution = await job()
        except Exception as error:
            logger.exception("Deferred attribution %s failed", attribution_id)
            reason = TraceError("internal_error", f"{type(error).__name__}: {error}")
            attribution = failed_result(attribution_id, reason)
        try:
            status = attribution["status"]
            file = (attribution.get("attention") or {}).pop("data", None)
            body = await as_text(attribution)
            if file is not None:
                body = await asyncio.to_thread(_with_file, body, file)
            if not await asyncio.to_thread(self.store.finish, attribution_id, status, body):
                logger.info("Deferred attribution %s was deleted while it ran", attribution_id)
        except Exception:
            logger.exception("Deferred attribution %s could not be stored", attribution_id)

    async def _tend(self) -> None:
        """Renews entries in flight, stops deleted ones, and goes on until none is left."""
        while True:
            if self._tasks:
                await asyncio.sleep(_RENEW_SECONDS)
            else:
                await self._idle()
            self._added.clear()
            in_flight = list(self._tasks.items())
            there = await self._renew()
            if there is None:
                continue
            for attribution_id, task in in_flight:
                if attribution_id not in there:
                    task.cancel()
            if not there and not self._tasks:
                return

    async def _idle(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_IDLE_SECONDS):
                await self._added.wait()

    async def _renew(self) -> set[str] | None:
        try:
            there = await asyncio.to_thread(self.store.renew)
        except STORE_ERRORS:
            logger.exception("The store of deferred attributions cannot be used")
            return None
        self._on_change(len(there))
        return there


def _with_file(body: str, file: bytes | str) -> str:
    text = file if isinstance(file, str) else base64.b64encode(file).decode()
    return f"{body}{_FILE_BEHIND}{text}"


class AttributionStore(Protocol):
    """One API server's view of a store; its bounds hold for all servers that share it.

    Every method blocks, may be called from any thread, and may raise one of :data:`STORE_ERRORS`.
    No entry stays unfinished after its server is gone.
    """

    def reserve(self, attribution_id: str) -> str:
        """Adds a ``queued`` entry and returns its JSON.

        Raises:
            TraceError: ``overloaded``: every entry is unfinished and there is no room.
        """
        ...

    def start(self, attribution_id: str) -> bool:
        """Marks an entry ``running``; False when it was deleted meanwhile."""
        ...

    def finish(self, attribution_id: str, status: str, body: str) -> bool:
        """Stores the JSON of an attribution and its final status; False when it was deleted.

        Args:
            attribution_id: Its id.
            status: The object's ``status``.
            body: The object's JSON, and what belongs to it, in ASCII.
        """
        ...

    def get(self, attribution_id: str) -> str | None:
        """What `finish` was given, or the JSON of an entry that is not finished.

        Returns:
            None when unknown or over its time.
        """
        ...

    def delete(self, attribution_id: str) -> bool:
        """Drops an entry; False when unknown or over its time."""
        ...

    def renew(self) -> set[str]:
        """Keeps this server's unfinished entries; returns the ids of all that are still there."""
        ...

    def abandon(self) -> None:
        """Lets this server's unfinished entries fail with ``server_lost``: it stops."""
        ...

    def counts(self) -> dict[str, int]:
        """Number of entries by status, of all servers together."""
        ...

    def close(self) -> None:
        """Lets go of what the view holds; a later call takes it up again."""
        ...


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """Bounds of a store.

    Attributes:
        entries: Most attributions, finished or not.
        nbytes: Most bytes of finished attributions.
        ttl_seconds: How long a finished attribution is kept.
        lease_seconds: When an unfinished one that its server no longer renews has failed.
    """

    entries: int
    nbytes: int
    ttl_seconds: float
    lease_seconds: float = 120.0
