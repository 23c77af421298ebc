"""Attributions inside a server-sent event stream.

vLLM's own events pass unchanged and in order, none of them later than without a trace except the
closing ones (usage and ``[DONE]``, ``message_stop``), which wait for the attributions.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from vllm_flashtrace.api.request import FIELD
from vllm_flashtrace.server.large_objects import Carried
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

ChoiceWithAttribution = Callable[[int, Carried], dict[str, Any]]


def chat_choice(index: int, attribution: Carried) -> dict[str, Any]:
    """The choice of a chat chunk; client SDKs keep unknown keys of ``delta``."""
    return {"index": index, "delta": {FIELD: attribution}, "finish_reason": None}


def text_choice(index: int, attribution: Carried) -> dict[str, Any]:
    """The choice of a plain completion chunk, which has no ``delta``."""
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
                        yield _event(template, make_choice(index, await session.result(index)))
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
                    yield _event(template, make_choice(index, await session.result(index)))
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
    try:
        async with aclosing(events):
            async for event in events:
                if event.startswith(_MESSAGE_STOP):
                    session.start(0)
                    data = {"type": FIELD, FIELD: await session.result(0)}
                    yield f"event: {FIELD}\n{_DATA}{json.dumps(data, separators=(',', ':'))}\n\n"
                yield event
                if event.startswith(_MESSAGE_ENDS):
                    session.start(0)
    finally:
        await session.close()


def _finished_choices(chunk: dict[str, Any]) -> list[int]:
    return [c["index"] for c in chunk["choices"] if c.get("finish_reason") is not None]


def _event(template: dict[str, Any], choice: dict[str, Any]) -> str:
    chunk = json.dumps({**template, "choices": [choice]}, separators=(",", ":"))
    return f"{_DATA}{chunk}\n\n"
