"""``document`` and ``search_result`` blocks of ``/v1/messages`` as text that the model reads.

vLLM's form of Anthropic's Messages API knows neither. In a request with the ``flashtrace`` field
they become text blocks here, before vLLM reads the request, and are kept as its documents. What
has no text (a PDF, a file, a URL) stays as it is, and vLLM refuses it. Without the field nothing
is touched.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_flashtrace.api.request import FIELD
from vllm_flashtrace.base.records import Document

_ROUTE = "/v1/messages"
_KINDS = ("document", "search_result")
_BETWEEN_BLOCKS = "\n\n"
_documents: ContextVar[tuple[Document, ...]] = ContextVar("documents", default=())


def documents_of_request() -> tuple[Document, ...]:
    """The documents of the HTTP request at hand."""
    return _documents.get()


class AnthropicDocuments:
    """ASGI middleware that turns the blocks into text."""

    def __init__(self, app: ASGIApp) -> None:
        """Wraps ``app``."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] != _ROUTE:
            await self._app(scope, receive, send)
            return
        body, last = await _body(receive)
        found = _with_texts(body)
        if found is not None:
            body, documents = found
            headers = [each for each in scope["headers"] if each[0] != b"content-length"]
            length = str(len(body)).encode()
            scope = {**scope, "headers": [*headers, (b"content-length", length)]}
        whole: Message = {"type": "http.request", "body": body, "more_body": False}
        messages = [whole if last["type"] == "http.request" else last]

        async def received() -> Message:
            return messages.pop() if messages else await receive()

        before = _documents.set(() if found is None else documents)
        try:
            await self._app(scope, received, send)
        finally:
            _documents.reset(before)


async def _body(receive: Receive) -> tuple[bytes, Message]:
    """The whole body, and the last message of the connection that was read for it."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts), message


def _with_texts(body: bytes) -> tuple[bytes, tuple[Document, ...]] | None:
    """The body with text blocks in place of documents; None where there is nothing to do."""
    if FIELD.encode() not in body or not any(kind.encode() in body for kind in _KINDS):
        return None
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict) or data.get(FIELD) in (None, False):
        return None
    documents: list[Document] = []
    for blocks, index in _blocks(data):
        read = _read(blocks[index], len(documents))
        if read is not None:
            text, document = read
            documents.append(document)
            blocks[index] = {"type": "text", "text": text}
    return (json.dumps(data).encode(), tuple(documents)) if documents else None


def _blocks(data: Mapping[str, Any]) -> Iterator[tuple[list[Any], int]]:
    """The blocks of the messages, and of the tool results in them, each as an entry of a list."""
    messages = data.get("messages")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        blocks: list[Any] = content if isinstance(content, list) else []
        for index, block in enumerate(blocks):
            yield blocks, index
            if isinstance(block, dict) and block.get("type") == "tool_result":
                inner: list[Any] = (
                    block["content"] if isinstance(block.get("content"), list) else []
                )
                yield from ((inner, i) for i in range(len(inner)))


def _read(block: Any, number: int) -> tuple[str, Document] | None:
    """The text that a block becomes, and the document in it."""
    if not isinstance(block, dict) or block.get("type") not in _KINDS:
        return None
    kind = block["type"]
    if kind == "document":
        source = block.get("source")
        parts = _texts(source) if isinstance(source, dict) else []
        url = None
        heading = [block.get("title"), block.get("context")]
    else:
        parts = _texts({"type": "content", "content": block.get("content")})
        url = block.get("source")
        heading = [block.get("title"), url]
    text = _BETWEEN_BLOCKS.join(parts)
    if not text.strip():
        return None
    starts, at = [], 0
    for part in parts:
        starts.append(at)
        at += len(part) + len(_BETWEEN_BLOCKS)
    title = block.get("title")
    document = Document(
        id=f"{kind}-{number}",
        text=text,
        kind=kind,
        title=title if isinstance(title, str) and title else None,
        url=url if isinstance(url, str) and url else None,
        by_template=False,
        blocks=tuple(starts),
    )
    lines = [line for line in heading if isinstance(line, str) and line]
    return "\n".join([*lines, text]), document


def _texts(source: Mapping[str, Any]) -> list[str]:
    """The texts of a document's source."""
    if source.get("type") == "text":
        data = source.get("data")
        return [data] if isinstance(data, str) else []
    content = source.get("content") if source.get("type") == "content" else None
    if isinstance(content, str):
        return [content]
    blocks = content if isinstance(content, list) else []
    texts = [block.get("text") for block in blocks if isinstance(block, dict)]
    known = [text for text in texts if isinstance(text, str)]
    return known if len(known) == len(blocks) else []
