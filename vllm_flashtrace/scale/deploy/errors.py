"""What a client is told when the replica that had its request is gone.

Invariant: the answer has the form in which its route reports errors, streams included, so that the
clients of these interfaces raise what they always raise; HTTP 503 says that it may be sent again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from vllm_flashtrace.scale.deploy.exchange import Message

RETRY_AFTER_SECONDS = 1
_TYPE = "service_unavailable"


class EngineLostError(Exception):
    """The engine of this replica is dead: the request was not begun, another one may take it."""


def error_body(path: str, code: str, message: str) -> dict[str, Any]:
    """The body of an HTTP 503 in the form of ``path``'s interface."""
    if path.startswith("/v1/messages"):
        return {"type": "error", "error": {"type": _TYPE, "code": code, "message": message}}
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
        text = f"data: {json.dumps(error_body(path, code, message))}\n\ndata: [DONE]\n\n"
    return {"type": "http.response.body", "body": text.encode(), "more_body": False}


def is_event_stream(start: Message) -> bool:
    """Whether the answer that ``start`` begins is a stream of events."""
    headers = {bytes(name).lower(): bytes(value) for name, value in start.get("headers", ())}
    return headers.get(b"content-type", b"").startswith(b"text/event-stream")
