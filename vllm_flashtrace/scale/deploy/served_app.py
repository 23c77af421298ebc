"""vLLM's application on a replica: what the gateway calls, and the end of it.

Invariant: a request is taken only while the engine lives, and the first thing that its answer holds
is that it was taken. Draining waits for everything that was begun, deferred attributions included.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from vllm_flashtrace.scale.deploy.errors import EngineLostError
from vllm_flashtrace.scale.deploy.exchange import Application, Message, exchange
from vllm_flashtrace.scale.deploy.taking import replica_header, taken_by

_POLL_SECONDS = 0.25


class ServedApp:
    """An application with its engine."""

    def __init__(self, app: Application, engine: Any, service: Any, name: str) -> None:
        """Wraps what was started elsewhere.

        Args:
            app: vLLM's application.
            engine: Its ``EngineClient``.
            service: Its :class:`TraceService`; None where the plugin is off.
            name: Names this replica in answers and metrics.
        """
        self.name = name
        self._app = app
        self._engine = engine
        self._deferred = None if service is None else service.deferred
        self._ongoing = 0
        self._keeping: asyncio.Task[None] | None = None

    @property
    def unfinished(self) -> int:
        """Requests that are being answered, and deferred attributions."""
        return self._ongoing + (0 if self._deferred is None else int(self._deferred.unfinished))

    async def forward(self, scope: Message, body: bytes) -> AsyncGenerator[list[Message], None]:
        """Answers one HTTP request with ASGI messages.

        Yields:
            First one message of our own, :func:`taken_by`: the request was taken. Then the
            application's.

        Raises:
            EngineLostError: It was not taken.
        """
        if self._engine.errored:
            raise EngineLostError(f"the engine of replica {self.name} is dead")
        self._ongoing += 1
        try:
            async with aclosing(exchange(self._app, scope, body)) as answer:
                yield [taken_by(self.name)]
                async for messages in answer:
                    yield [self._signed(message) for message in messages]
        finally:
            self._ongoing -= 1

    async def metrics(self) -> tuple[str, str]:
        """This replica's name and its page of metrics."""
        scope: Message = {"type": "http", "method": "GET", "path": "/metrics", "headers": []}
        scope |= {"query_string": b"", "http_version": "1.1", "raw_path": b"/metrics"}
        sent = [message async for part in exchange(self._app, scope, b"") for message in part]
        return self.name, b"".join(message.get("body", b"") for message in sent).decode()

    async def check_health(self) -> None:
        """Tells the store that this replica is there.

        Raises:
            Exception: The engine is dead.
        """
        await self._engine.check_health()
        if self._deferred is not None and (self._keeping is None or self._keeping.done()):
            # Not waited for: a store that does not answer makes no replica unhealthy.
            self._keeping = asyncio.create_task(self._deferred.keep())

    async def drain(self, seconds: float) -> bool:
        """Waits for all that was begun; False if something was left after ``seconds``."""
        deadline = asyncio.get_running_loop().time() + seconds
        while self.unfinished and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(_POLL_SECONDS)
        return not self.unfinished

    async def engine_death(self) -> None:
        """Returns when the engine is dead."""
        while not self._engine.errored:
            await asyncio.sleep(_POLL_SECONDS)

    def _signed(self, message: Message) -> Message:
        if message["type"] != "http.response.start":
            return message
        headers = [*message.get("headers", ()), replica_header(self.name)]
        return {**message, "headers": headers}
