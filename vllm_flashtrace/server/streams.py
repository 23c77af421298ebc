"""Attributions inside a server-sent event stream.

vLLM's own events pass unchanged and in order, none of them later than without a trace except the
closing ones (usage and ``[DONE]``, ``message_stop``), which wait for the attributions.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from vllm_flashtrace.api.request import FIELD
from vllm_flashtrace.server.citation_forms import anthropic_citations, message_fields
from vllm_flashtrace.server.session import TraceSession

_DATA = "data: "
_DONE = "data: [DONE]"
_ERROR = 'data: {"error":'
# Quotes inside JSON strings are escaped, so neither pattern can come from generated text.
_FINISHED = '"finish_reason":"'
_NO_CHOICES = '"choices":[]'
# Anthropic's events; their names stand on a line that generated text cannot reach.
_MESSAGE_ENDS = "event: message_delta\n"
_MESSAGE_STOP = "event: message_stop\n"
_BLOCK_EVENTS = "event: content_block_"
_BLOCK_DELTA = "content_block_delta"
_BLOCK_STOP = "content_block_stop"

ChoiceWithAttribution = Callable[[int, TraceSession], Awaitable[dict[str, Any]]]


async def chat_choice(index: int, session: TraceSession) -> dict[str, Any]:
    """The choice of a chat chunk; client SDKs keep unknown keys of ``delta``."""
    delta: dict[str, Any] = {FIELD: await session.result(index)}
    citations = await session.citations(index)
    if citations is not None:
        delta |= message_fields(citations, session.flashtrace.citation_form)
    return {"index": index, "delta": delta, "finish_reason": None}


async def text_choice(index: int, session: TraceSession) -> dict[str, Any]:
    """The choice of a plain completion chunk, which has no ``delta``."""
    attribution = await session.result(index)
    return {"index": index, "text": "", FIELD: attribution, "finish_reason": None}


async def with_attributions(
    events: AsyncGenerator[str, None], session: TraceSession, make_choice: ChoiceWithAttribution
) -> AsyncGenerator[str, None]:
    """Adds one event per finished choice to vLLM's stream.

    The trace of a choice starts when its ``finish_reason`` has passed. Its event goes out as soon
    as it is ready, at the latest before the usage event or ``[DONE]``. If the stream ends in an
    error, or the client leaves, what still runs is cancelled.

    Args:
        events: vLLM's stream, one string per event.
        session: Traces of this request.
        make_choice: Shape of the choice that carries an attribution.
    """
    template: dict[str, Any] = {}
    pending: list[int] = []
    try:
        async with aclosing(events):
            async for event in events:
                if event.startswith(_ERROR):
                    pending.clear()
                    await session.close()
                elif event.startswith(_DONE) or _NO_CHOICES in event:
                    for index in pending:
                        yield _event(template, await make_choice(index, session))
                    pending.clear()
                yield event
                if _FINISHED in event:
                    chunk = json.loads(event.removeprefix(_DATA))
                    template = {key: chunk[key] for key in ("id", "object", "created", "model")}
                    for index in _finished_choices(chunk):
                        session.start(index)
                        pending.append(index)
                for index in [index for index in pending if session.done(index)]:
                    pending.remove(index)
                    yield _event(template, await make_choice(index, session))
    finally:
        await session.close()


async def with_attribution_of_message(
    events: AsyncGenerator[str, None], session: TraceSession
) -> AsyncGenerator[str, None]:
    """Adds one ``flashtrace`` event before ``message_stop`` to a stream of Anthropic's form.

    Args:
        events: vLLM's stream, one string per event.
        session: Traces of this request, which has one choice.
    """
    if session.flashtrace.citations is not None:
        events = _with_citation_deltas(events, session)
    try:
        async with aclosing(events):
            async for event in events:
                if event.startswith(_MESSAGE_STOP):
                    session.start(0)
                    yield _typed({"type": FIELD, FIELD: await session.result(0)})
                yield event
                if event.startswith(_MESSAGE_ENDS):
                    session.start(0)
    finally:
        await session.close()


async def _with_citation_deltas(
    events: AsyncGenerator[str, None], session: TraceSession
) -> AsyncGenerator[str, None]:
    """Adds the citations to the blocks of text; the last block stays open until they are there.

    A block cannot be divided after it was sent, so all parts of its text cite through it.
    """
    starts: list[int] = []  # Of each block of text in the answer.
    blocks: list[int] = []  # The index of each.
    length = 0
    held = ""
    async with aclosing(events):
        async for event in events:
            if event.startswith(_MESSAGE_ENDS):
                session.start(0)
                for citation in (await session.citations(0) or ()) if blocks else ():
                    block = blocks[bisect_right(starts, citation["start"]) - 1]
                    for each in anthropic_citations([citation]):
                        delta = {"type": "citations_delta", "citation": each}
                        yield _typed({"type": _BLOCK_DELTA, "index": block, "delta": delta})
            if held:
                yield held
                held = ""
            if event.startswith(_BLOCK_EVENTS):
                data = json.loads(event.partition(_DATA)[2])
                if data.get("content_block", {}).get("type") == "text":
                    starts.append(length)
                    blocks.append(data["index"])
                length += len(data.get("delta", {}).get("text") or "")
                if data["type"] == _BLOCK_STOP and data["index"] in blocks:
                    held = event
                    continue
            yield event
        if held:
            yield held


def _finished_choices(chunk: dict[str, Any]) -> list[int]:
    return [c["index"] for c in chunk["choices"] if c.get("finish_reason") is not None]


def _typed(data: dict[str, Any]) -> str:
    """An event of Anthropic's form, which is named by its type."""
    return f"event: {data['type']}\n{_DATA}{json.dumps(data, separators=(',', ':'))}\n\n"


def _event(template: dict[str, Any], choice: dict[str, Any]) -> str:
    chunk = json.dumps({**template, "choices": [choice]}, separators=(",", ":"))
    return f"{_DATA}{chunk}\n\n"
