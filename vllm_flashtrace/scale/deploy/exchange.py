"""Runs one HTTP request on an ASGI application and gives out what it sends, as it sends it.

Invariant: the application's task has ended when the exchange has, and a client that leaves is a
disconnect to the application, as it is on a socket, before it is a cancellation.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

Message = dict[str, Any]
Application = Callable[[Message, Callable[[], Awaitable[Message]], Any], Awaitable[None]]

# How long an application may take to notice that its client left.
_LEAVING_SECONDS = 5.0


async def exchange(
    app: Application, scope: Message, body: bytes
) -> AsyncGenerator[list[Message], None]:
    """Sends ``body`` to ``app``.

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
