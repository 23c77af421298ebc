"""HTTP between gateway and replicas: one request on an ASGI application, and what a client is told.

Where the replica that had a request is gone, the client's answer has the form in which its route
reports errors, streams included, so that client libraries raise what they always raise. HTTP 503
says that the request may be sent again.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any

Message = dict[str, Any]
Application = Callable[[Message, Callable[[], Awaitable[Message]], Any], Awaitable[None]]

# How long an application may take to notice that its client left.
_LEAVING_SECONDS = 5.0
RETRY_AFTER_SECONDS = 1
REPLICA_HEADER = b"x-flashtrace-replica"
_TYPE = "service_unavailable"
# A message of ours that tells the gateway which replica has a request; it never reaches the client.
_TAKEN = "flashtrace.taken"


async def exchange(
    app: Application, scope: Message, body: bytes
) -> AsyncGenerator[list[Message], None]:
    """Sends ``body`` to ``app``, whose task has ended when this generator has.

    When the caller leaves, the application gets a disconnect, as on a socket, before it is
    cancelled.

    Args:
        app: The application.
        scope: ASGI scope of the request.
        body: The whole body.

    Yields:
        ASGI messages, all those that are there at a time.

    Raises:
        Exception: Whatever the application raises, after what it has sent.
    """
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    gone = asyncio.Event()
    request: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if request:
            return request.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    task = asyncio.ensure_future(app(scope, receive, sent.put))
    task.add_done_callback(lambda _: sent.put_nowait(None))
    try:
        ended = False
        while not ended:
            batch = [await sent.get()]
            batch += [sent.get_nowait() for _ in range(sent.qsize())]
            messages = [message for message in batch if message is not None]
            ended = len(messages) < len(batch)
            if messages:
                yield messages
        await task
    finally:
        gone.set()
        await _end(task)


async def _end(task: asyncio.Future[None]) -> None:
    if task.done():
        return
    await asyncio.wait([task], timeout=_LEAVING_SECONDS)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


class EngineLostError(Exception):
    """The engine of this replica is dead: the request was not begun, another one may take it."""


def error_body(path: str, code: str, message: str) -> dict[str, Any]:
    """The body of an HTTP 503 in the form of ``path``'s interface."""
    if path.startswith("/v1/messages"):
        return {"type": "error", "error": {"type": _TYPE, "code": code, "message": message}}
    if path.startswith("/cohere/"):
        return {"message": message}
    error = {"message": message, "type": _TYPE, "param": None, "code": code}
    return {"error": error}


def whole_answer(
    path: str, code: str, message: str, more: Sequence[tuple[bytes, bytes]] = ()
) -> list[Message]:
    """An HTTP 503, as ASGI messages.

    Args:
        path: Of the request.
        code: Of the error.
        message: For people.
        more: Further headers.
    """
    body = json.dumps(error_body(path, code, message)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"retry-after", str(RETRY_AFTER_SECONDS).encode()),
        *more,
    ]
    return [
        {"type": "http.response.start", "status": 503, "headers": headers},
        {"type": "http.response.body", "body": body, "more_body": False},
    ]


def end_of_stream(path: str, code: str, message: str) -> Message:
    """The last events of a stream that had begun, as an ASGI message."""
    if path.startswith("/v1/responses"):
        event = {"type": "error", "code": code, "message": message, "param": None}
        text = f"event: error\ndata: {json.dumps(event)}\n\n"
    elif path.startswith("/v1/messages"):
        text = f"event: error\ndata: {json.dumps(error_body(path, code, message))}\n\n"
    else:
        if path.startswith("/cohere/"):
            last = {"type": "message-end", "delta": {"error": message, "finish_reason": "ERROR"}}
        else:
            last = error_body(path, code, message)
        text = f"data: {json.dumps(last)}\n\ndata: [DONE]\n\n"
    return {"type": "http.response.body", "body": text.encode(), "more_body": False}


def is_event_stream(start: Message) -> bool:
    """Whether the answer that ``start`` begins is a stream of events."""
    headers = {bytes(name).lower(): bytes(value) for name, value in start.get("headers", ())}
    return headers.get(b"content-type", b"").startswith(b"text/event-stream")


def taken_by(replica: str) -> Message:
    """The message with which a replica takes a request."""
    return {"type": _TAKEN, "replica": replica}


def who_took(message: Message) -> str | None:
    """The replica, if the message says that it took the request."""
    return message["replica"] if message["type"] == _TAKEN else None


def replica_header(replica: str) -> tuple[bytes, bytes]:
    """The header of an answer that names its replica."""
    return REPLICA_HEADER, replica.encode()
