"""Large attribution objects on their way to the client or the store, in pieces.

An object with ``top_k: null`` or ``layers`` over a long prompt is tens of megabytes of JSON. Made
in one call it would hold the interpreter for seconds, and no other stream would move. So vLLM's
code only ever sees a mark in its place, a short string that nobody can guess; where the mark leaves
the application, `LargeObjects` puts the object there. It is written piece by piece in one thread of
the process, no faster than the client reads.
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

import msgspec
from fastapi import Response
from fastapi.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor

from vllm_flashtrace.trace.large_results import LARGE_BYTES, LargeAttribution

Carried = dict[str, Any] | str
"""What a response carries: an attribution object, or the mark of a large one."""

JSON, BYTES = "application/json", "application/octet-stream"
# Numbers and entries of a piece: less than a millisecond of encoding, some 40 kB.
_NUMBERS = 2048
_ENTRIES = 128
_PIECE_BYTES = 32 << 10
# Bytes of a file to a piece of base64; a multiple of three.
_FILE_BYTES = 24 << 10
_THREAD = ThreadPoolExecutor(1, thread_name_prefix="flashtrace-json")
# The marks of the HTTP request at hand, in JSON's quotes.
_marks: ContextVar[dict[bytes, LargeAttribution] | None] = ContextVar("marks", default=None)


def carried(attribution: dict[str, Any]) -> Carried:
    """What a response carries for ``attribution``: itself, or the mark of a large one."""
    marks = _marks.get()
    if not isinstance(attribution, LargeAttribution):
        return attribution
    if marks is None:  # Not asked for over HTTP.
        return plain(attribution)
    mark = f"flashtrace-{secrets.token_hex(16)}"
    marks[f'"{mark}"'.encode()] = attribution
    return mark


class LargeObjects:
    """ASGI middleware that puts large objects in the place of their marks.

    Responses without marks pass as they are.
    """

    def __init__(self, app: ASGIApp) -> None:
        """Wraps ``app``."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        marks: dict[bytes, LargeAttribution] = {}

        async def send_with_objects(message: Message) -> None:
            if marks:
                message = await _with_objects(message, marks, send)
            await send(message)

        before = _marks.set(marks)
        try:
            await self._app(scope, receive, send_with_objects)
        finally:
            _marks.reset(before)
            for left in marks.values():
                left.release()


async def _with_objects(
    message: Message, marks: dict[bytes, LargeAttribution], send: Send
) -> Message:
    """Sends a message up to its last mark with the objects; returns the rest of it."""
    if message["type"] == "http.response.start":
        headers = [h for h in message["headers"] if h[0].lower() != b"content-length"]
        return {**message, "headers": headers}
    body = bytes(message.get("body", b""))
    while found := [(at, mark) for mark in marks if (at := body.find(mark)) >= 0]:
        at, mark = min(found)
        if at:
            await send({**message, "body": body[:at], "more_body": True})
        async with aclosing(json_pieces(marks.pop(mark))) as pieces:
            async for piece in pieces:
                await send({**message, "body": piece, "more_body": True})
        body = body[at + len(mark) :]
    return {**message, "body": body}


def as_response(body: str | bytes, media_type: str) -> Response:
    """An HTTP response whose body is text in ASCII, or bytes."""
    if len(body) < LARGE_BYTES:
        return Response(body, media_type=media_type)

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(body), LARGE_BYTES):
            piece = body[at : at + LARGE_BYTES]
            yield piece.encode() if isinstance(piece, str) else piece
            await asyncio.sleep(0)

    length = {"content-length": str(len(body))}
    return StreamingResponse(pieces(), media_type=media_type, headers=length)


async def as_text(attribution: dict[str, Any]) -> str:
    """The object's JSON, in ASCII."""
    if not isinstance(attribution, LargeAttribution):
        return json.dumps(attribution, separators=(",", ":"))
    pieces = [piece async for piece in json_pieces(attribution)]
    return await asyncio.to_thread(lambda: b"".join(pieces).decode())


async def json_pieces(attribution: LargeAttribution) -> AsyncGenerator[bytes, None]:
    """The object's JSON, in ASCII; gives back its memory when it ends."""
    loop = asyncio.get_running_loop()
    pieces = _gathered(_written(attribution))
    try:
        while (piece := await loop.run_in_executor(_THREAD, next, pieces, None)) is not None:
            yield piece
    finally:
        attribution.release()


def plain(value: Any) -> Any:
    """The same with lists in the place of tensors, and base64 of bytes."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list) and _is_nested(value):
        return [plain(part) for part in value]
    return value


def _gathered(texts: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in fewer pieces."""
    piece = bytearray()
    for text in texts:
        piece += text
        if len(piece) >= _PIECE_BYTES:
            yield bytes(piece)
            piece.clear()
    if piece:
        yield bytes(piece)


def _written(value: Any) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        yield from _array(value)
    elif isinstance(value, bytes):
        yield b'"'
        for at in range(0, len(value), _FILE_BYTES):
            yield base64.b64encode(value[at : at + _FILE_BYTES])
        yield b'"'
    elif isinstance(value, dict):
        for i, (key, part) in enumerate(value.items()):
            yield b"%b%b:" % (b"," if i else b"{", _dumps(key))
            yield from _written(part)
        yield b"}" if value else b"{}"
    elif isinstance(value, list) and _is_nested(value):
        for i, part in enumerate(value):
            yield b"," if i else b"["
            yield from _written(part)
        yield b"]"
    elif isinstance(value, list) and len(value) > _ENTRIES:
        for at in range(0, len(value), _ENTRIES):
            yield b"," if at else b"["
            yield _dumps(value[at : at + _ENTRIES])[1:-1]
        yield b"]"
    else:
        yield _dumps(value)


def _array(numbers: Tensor) -> Iterator[bytes]:
    """Float ``[n]`` or ``[m, n]``; each number reads back as the same float64."""
    if numbers.dim() > 1:
        for i, row in enumerate(numbers):
            yield b"," if i else b"["
            yield from _array(row)
    else:
        for at in range(0, len(numbers), _NUMBERS):
            yield b"," if at else b"["
            yield msgspec.json.encode(numbers[at : at + _NUMBERS].tolist())[1:-1]
    yield b"]" if len(numbers) else b"[]"


def _is_nested(values: list[Any]) -> bool:
    """Whether entries hold tensors or long lists; all entries are alike."""
    first = values[0] if values else None
    return isinstance(first, dict) and any(
        isinstance(part, Tensor)
        or (isinstance(part, list) and (len(part) > _ENTRIES or _is_nested(part)))
        for part in first.values()
    )


def _dumps(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
