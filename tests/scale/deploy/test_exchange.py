"""One request on an ASGI application without a socket."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from vllm_flashtrace.scale.deploy import exchange as module
from vllm_flashtrace.scale.deploy.exchange import exchange

START = {"type": "http.response.start", "status": 200, "headers": []}


def part(text: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": text, "more_body": more}


async def test_the_application_gets_the_body_and_its_messages_come_out():
    async def app(scope, receive, send):
        request = await receive()
        await send(START)
        await send(part(request["body"] + scope["path"].encode(), more=False))

    batches = [batch async for batch in exchange(app, {"path": "/x"}, b"body of ")]
    assert [m for batch in batches for m in batch] == [START, part(b"body of /x", more=False)]


async def test_nothing_is_held_back_until_the_next_message():
    goes_on = asyncio.Event()

    async def app(scope, receive, send):
        await send(START)
        await send(part(b"first"))
        await goes_on.wait()
        await send(part(b"last", more=False))

    answer = exchange(app, {}, b"")
    seen: list[Any] = []
    while part(b"first") not in seen:
        seen += await asyncio.wait_for(anext(answer), 60)
    goes_on.set()
    assert [batch async for batch in answer] == [[part(b"last", more=False)]]


async def test_a_client_that_leaves_is_a_disconnect():
    received: list[Any] = []

    async def app(scope, receive, send):
        received.append(await receive())
        await send(START)
        received.append(await receive())

    answer = exchange(app, {}, b"x")
    assert await anext(answer) == [START]
    await answer.aclose()
    assert received[1] == {"type": "http.disconnect"}


async def test_an_application_that_ignores_the_disconnect_is_cancelled(monkeypatch):
    monkeypatch.setattr(module, "_LEAVING_SECONDS", 0.05)
    ended: list[str] = []

    async def app(scope, receive, send):
        try:
            await send(START)
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    answer = exchange(app, {}, b"")
    await anext(answer)
    await answer.aclose()
    assert ended == ["cancelled"]


async def test_a_cancelled_caller_ends_the_application():
    began, gone = asyncio.Event(), asyncio.Event()

    async def app(scope, receive, send):
        await send(START)
        await receive()
        began.set()
        assert (await receive())["type"] == "http.disconnect"
        gone.set()

    async def call():
        async for _ in exchange(app, {}, b""):
            pass

    task = asyncio.create_task(call())
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert gone.is_set()


async def test_an_exception_comes_after_what_was_sent():
    async def app(scope, receive, send):
        await send(START)
        await send(part(b"half"))
        raise ValueError("boom")

    seen: list[Any] = []
    with pytest.raises(ValueError, match="boom"):
        async for batch in exchange(app, {}, b""):
            seen += batch
    assert seen == [START, part(b"half")]
