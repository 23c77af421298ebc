"""The ASGI application in front of the engine replicas, and one page of metrics for all of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from vllm_flashtrace.scale.deploy.exchange import (
    EngineLostError,
    Message,
    end_of_stream,
    is_event_stream,
    replica_header,
    who_took,
    whole_answer,
)
from vllm_flashtrace.scale.ray_cluster import import_ray

LABEL = "replica"
LOST = "replica_lost"
BUSY = "overloaded"
NO_METRICS = "metrics_unavailable"
_LOST_MESSAGE = "the replica that ran this request is gone; the request may be sent again"
_METRICS_SECONDS = 10.0
_TRIES = 20
_PAUSE_SECONDS = 0.25
# What vLLM's application reads; the rest belongs to the connection.
_SCOPE = (
    *("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string"),
    *("root_path", "headers", "client", "server"),
)

logger = logging.getLogger("ray.serve")


class Gateway:
    """Forwards HTTP requests to engine replicas.

    A client gets the answer of one replica. Its request goes to another one only while none has
    said that it took it; from then on the death of the replica is an error that the client is told.
    """

    def __init__(self, engines: Any) -> None:
        """Wraps the handle of the engines' deployment."""
        self._ray: Any = import_ray()
        self._serve: Any = import_ray("ray.serve.exceptions")
        self._engines = engines
        self._forwarding = engines.options(stream=True)

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        """Serves one connection, as ASGI applications do."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1003, "reason": "HTTP only"})
        elif (scope["method"], scope["path"]) == ("GET", "/metrics"):
            await self._metrics(send)
        else:
            await self._forward(scope, receive, send)

    async def _forward(self, scope: Message, receive: Any, send: Any) -> None:
        body = await _whole_body(receive)
        if body is None:
            return
        path, replica, start, ended = scope["path"], None, None, False
        try:
            async with aclosing(self._messages(scope, body)) as messages:
                async for message in messages:
                    if taker := who_took(message):
                        replica = taker
                        continue
                    if message["type"] == "http.response.start":
                        start = message
                    ended = _is_last(message)
                    await send(message)
        except (self._ray.exceptions.RayError, self._serve.RayServeException) as error:
            logger.warning("A request to %s failed: %s", path, type(error).__name__)
            if ended:
                return
            if self._is_applications(error):
                raise
            if start is None:
                headers = [] if replica is None else [replica_header(replica)]
                for message in whole_answer(path, *self._reason(error), headers):
                    await send(message)
            elif is_event_stream(start):
                await send(end_of_stream(path, *self._reason(error)))
            else:
                raise

    async def _messages(self, scope: Message, body: bytes) -> AsyncGenerator[Message, None]:
        sent = {key: scope[key] for key in _SCOPE if key in scope}
        for remaining in reversed(range(_TRIES)):
            taken = False
            answer = self._forwarding.forward.remote(sent, body)
            try:
                async for messages in answer:
                    taken = True
                    for message in messages:
                        yield message
                return
            except Exception as error:
                if taken or not remaining or not self._is_loss(error):
                    raise
            finally:
                answer.cancel()
            await asyncio.sleep(_PAUSE_SECONDS)

    def _is_loss(self, error: Exception) -> bool:
        cause = getattr(error, "cause", None)
        return isinstance(cause, EngineLostError) or isinstance(
            error,
            self._ray.exceptions.RayActorError
            | self._serve.ReplicaUnavailableError
            | EngineLostError,
        )

    def _is_applications(self, error: Exception) -> bool:
        """Whether the application itself raised it, on a replica that lives."""
        return isinstance(error, self._ray.exceptions.RayTaskError) and not self._is_loss(error)

    def _reason(self, error: Exception) -> tuple[str, str]:
        if isinstance(error, self._serve.BackPressureError):
            return BUSY, "too many requests are waiting; the request may be sent again"
        return LOST, _LOST_MESSAGE

    async def _metrics(self, send: Any) -> None:
        try:
            response = self._engines.broadcast("metrics")
            pages = await response.results_async(timeout_s=_METRICS_SECONDS, return_exceptions=True)
        except (TimeoutError, self._ray.exceptions.RayError, self._serve.RayServeException):
            reason = f"a replica did not tell its metrics within {_METRICS_SECONDS:g} s"
            for message in whole_answer("/metrics", NO_METRICS, reason):
                await send(message)
            return
        # One that is going down has none.
        found: dict[str, str] = dict(page for page in pages if isinstance(page, tuple))
        body = merge(dict(sorted(found.items()))).encode()
        headers = [(b"content-type", b"text/plain; version=0.0.4; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})


def _is_last(message: Message) -> bool:
    return message["type"] == "http.response.body" and not message.get("more_body", False)


async def _whole_body(receive: Any) -> bytes | None:
    """The body of a request; None if the client left before its end."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def _lifespan(receive: Any, send: Any) -> None:
    for phase in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{phase}.complete"})


def merge(pages: Mapping[str, str]) -> str:
    """Merges Prometheus text pages; no sample is lost or changed but for the replica's label.

    Args:
        pages: Text by name of the replica.

    Returns:
        One page; every sample has a ``replica`` label.
    """
    families: dict[str, list[str]] = {}
    comments: dict[str, list[str]] = {}
    for replica, text in pages.items():
        family = ""
        for line in text.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                family = line.split(" ", 3)[2]
                known = comments.setdefault(family, [])
                if line not in known:
                    known.append(line)
            elif line and not line.startswith("#"):
                families.setdefault(family, []).append(_labelled(line, replica))
    lines = []
    for family in {**comments, **families}:
        lines += [*comments.get(family, ()), *families.get(family, ())]
    return "".join(f"{line}\n" for line in lines)


def _labelled(line: str, replica: str) -> str:
    label = f'{LABEL}="{replica}"'
    name, brace, rest = line.partition("{")
    if brace:
        return f"{name}{{{label},{rest}"
    name, _, value = line.partition(" ")
    return f"{name}{{{label}}} {value}"
