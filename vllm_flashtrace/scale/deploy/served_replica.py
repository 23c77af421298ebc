"""One engine replica: vLLM's own application and engine in a Ray Serve actor."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from typing import Any

from vllm_flashtrace.scale.deploy.exchange import (
    Application,
    EngineLostError,
    Message,
    exchange,
    replica_header,
    taken_by,
)
from vllm_flashtrace.scale.ray_cluster import import_ray, prepare_actor
from vllm_flashtrace.server.deferred import AttributionStore, StoreLimits

_POLL_SECONDS = 0.25
# Left of the time to stop in for the engine itself.
_ENGINE_STOP_SECONDS = 5.0
# For the answers of a dead engine to get out.
_LAST_WORDS_SECONDS = 5.0

logger = logging.getLogger("ray.serve")  # Serve shows what it logs of a replica.


@dataclass(frozen=True, slots=True)
class ReplicaPlan:
    """What every replica of a deployment is made from.

    Attributes:
        argv: Model and options for ``vllm serve``.
        deployment: Name of the deployment.
        environment: Environment variables that vLLM is to see.
        workers: Worker processes of an engine.
        cpus: Cores of a replica where it computes on the CPU, else None.
        drain_seconds: How long a replica that is to stop may finish what it has begun.
    """

    argv: tuple[str, ...]
    deployment: str
    environment: dict[str, str]
    workers: int
    cpus: float | None
    drain_seconds: float


class EngineReplica:
    """Serve's deployment class.

    A replica whose engine is dead takes no request and ends its process, and its engine's processes
    end with it, however it ends. One that is told to stop first finishes what it has begun.
    """

    async def __init__(self, plan: ReplicaPlan) -> None:  # type: ignore[misc]
        """Starts the engine; Serve sends no request before it has."""
        context = import_ray("ray.serve").get_replica_context()
        self._plan = plan
        self._served: ServedApp | None = None
        os.environ.update(plan.environment)
        prepare_actor(context.rank.local_rank, plan.cpus, plan.workers)

        from vllm_flashtrace.server.engine_app import engine_app, read_engine_options
        from vllm_flashtrace.server.session import service_of

        args = read_engine_options(plan.argv, neighbours=(context.world_size or 1) - 1)
        self._stack = AsyncExitStack()
        app, engine = await self._stack.enter_async_context(engine_app(args, self._make_store))
        service = service_of(app.state)
        self._served = ServedApp(app, engine, service, context.replica_id.unique_id)
        self._watch = asyncio.create_task(self._end_with_engine(self._served))

    async def forward(self, scope: Message, body: bytes) -> AsyncIterator[list[Message]]:
        """Answers one HTTP request; see :meth:`ServedApp.forward`."""
        async with aclosing(self._ready.forward(scope, body)) as answer:
            async for messages in answer:
                yield messages

    async def metrics(self) -> tuple[str, str]:
        """This replica's name and its page of metrics."""
        return await self._ready.metrics()

    async def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        await self._ready.check_health()

    async def __del__(self) -> None:
        """Serve calls it when the last request is over: finishes what was deferred, then ends."""
        served, self._served = getattr(self, "_served", None), None
        if served is None:
            return
        self._watch.cancel()
        seconds = max(self._plan.drain_seconds - _ENGINE_STOP_SECONDS, 0)
        if not await served.drain(seconds):
            logger.warning("Deferred attributions are not finished after %.0f s", seconds)
        await self._stack.aclose()

    @property
    def _ready(self) -> ServedApp:
        if self._served is None:
            raise EngineLostError("the replica is ending")
        return self._served

    def _make_store(self, owner: str, limits: StoreLimits) -> AttributionStore:
        from vllm_flashtrace.scale.deploy.store_actor import LEASE_SECONDS, ActorStore

        limits = replace(limits, lease_seconds=LEASE_SECONDS)
        return ActorStore(self._plan.deployment, owner, limits)

    async def _end_with_engine(self, served: ServedApp) -> None:
        await served.engine_death()
        logger.error("The engine of replica %s died; the replica ends", served.name)
        await served.drain(_LAST_WORDS_SECONDS)
        os._exit(1)


class ServedApp:
    """An application with its engine, as the gateway calls it.

    A request is taken only while the engine lives, and the first thing that its answer holds is
    that it was taken.
    """

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
