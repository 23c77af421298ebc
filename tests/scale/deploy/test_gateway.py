"""Which replica a request goes to, and what its client is told when that replica is gone."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import BackPressureError

from tests.scale.deploy.scripted import Handle, as_raised, served
from vllm_flashtrace.scale.deploy import gateway as module
from vllm_flashtrace.scale.deploy.exchange import REPLICA_HEADER, EngineLostError, taken_by
from vllm_flashtrace.scale.deploy.gateway import Gateway

EVENTS = [(b"content-type", b"text/event-stream")]
TAKEN = [taken_by("r9")]
JSON = [(b"content-type", b"application/json")]


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch):
    monkeypatch.setattr(module, "_PAUSE_SECONDS", 0)


def start(headers: Any = JSON, status: int = 200) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": headers}


def body(data: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


async def echo(scope: Any, receive: Any, send: Any) -> None:
    request = await receive()
    await send(start())
    await send(body(request["body"]))


def raising(error: Exception, *batches: list[dict[str, Any]]) -> Any:
    """A replica that sends batches and is then gone."""

    async def attempt(scope, data):
        for batch in batches:
            yield batch
        raise error

    return attempt


async def ask(handle: Handle, path: str = "/v1/completions", method: str = "POST") -> Any:
    """Status, headers and body that a client gets."""
    scope = {"type": "http", "method": method, "path": path, "headers": [], "extensions": {}}
    parts = [
        {"type": "http.request", "body": b"one ", "more_body": True},
        {"type": "http.request", "body": b"two", "more_body": False},
    ]
    sent: list[dict[str, Any]] = []

    async def receive():
        return parts.pop(0)

    async def send(message):
        sent.append(message)

    await Gateway(handle)(scope, receive, send)
    head, *rest = sent
    assert [message.get("more_body", False) for message in rest][-1:] == [False]
    return head["status"], dict(head["headers"]), b"".join(message["body"] for message in rest)


async def test_a_request_goes_to_a_replica_whole_and_its_answer_comes_back_signed():
    handle = Handle(served(echo, "r1").forward)
    status, headers, data = await ask(handle)
    assert (status, data) == (200, b"one two")
    assert headers[REPLICA_HEADER] == b"r1"
    assert handle.calls == ["asked", "cancelled"]


async def test_a_request_that_none_took_goes_to_another_replica():
    gone = served(echo, "gone")
    gone._engine.errored = True
    handle = Handle(
        raising(ActorDiedError()),
        raising(ActorUnavailableError("away", None)),
        raising(as_raised(EngineLostError("the engine is dead"))),
        gone.forward,
        served(echo, "r2").forward,
    )
    status, headers, data = await ask(handle)
    assert (status, data, headers[REPLICA_HEADER]) == (200, b"one two", b"r2")
    assert handle.calls.count("asked") == 5


async def test_a_request_that_was_taken_goes_to_no_other():
    handle = Handle(raising(ActorDiedError(), TAKEN), served(echo).forward)
    status, headers, data = await ask(handle)
    assert status == 503
    assert headers[b"retry-after"] == b"1"
    assert headers[REPLICA_HEADER] == b"r9"
    assert json.loads(data)["error"]["code"] == "replica_lost"
    assert handle.calls.count("asked") == 1


async def test_a_request_that_nobody_ever_takes_ends():
    handle = Handle(raising(ActorDiedError()))
    status, _, data = await ask(handle)
    assert (status, json.loads(data)["error"]["code"]) == (503, "replica_lost")
    assert handle.calls.count("asked") == module._TRIES


async def test_a_full_deployment_says_so():
    status, _, data = await ask(Handle(raising(BackPressureError(1, 1))))
    assert (status, json.loads(data)["error"]["code"]) == (503, "overloaded")


async def test_a_stream_ends_with_an_error_that_its_client_understands():
    first = body(b"data: 1\n\n", more=True)
    handle = Handle(raising(ActorDiedError(), TAKEN, [start(EVENTS)], [first]))
    status, _, data = await ask(handle)
    one, error, done, rest = data.decode().split("\n\n")
    assert (status, one, done, rest) == (200, "data: 1", "data: [DONE]", "")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "replica_lost"


async def test_half_of_a_json_answer_is_not_finished():
    handle = Handle(raising(ActorDiedError(), TAKEN, [start()], [body(b'{"a', more=True)]))
    with pytest.raises(ActorDiedError):
        await ask(handle)


async def test_a_loss_after_the_end_is_none():
    handle = Handle(raising(ActorDiedError(), TAKEN, [start(), body(b"{}")]))
    assert (await ask(handle))[::2] == (200, b"{}")


async def test_an_exception_of_the_application_is_no_lost_replica():
    handle = Handle(raising(as_raised(ValueError("boom")), TAKEN), served(echo).forward)
    with pytest.raises(ValueError):
        await ask(handle)
    assert handle.calls.count("asked") == 1


async def test_a_client_that_leaves_cancels_its_request():
    began = asyncio.Event()
    ended: list[str] = []

    async def endless(scope, receive, send):
        await send(start(EVENTS))
        await receive()
        began.set()
        ended.append((await receive())["type"])

    handle = Handle(served(endless).forward)
    task = asyncio.create_task(ask(handle))
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert handle.calls == ["asked", "cancelled"]
    assert ended == ["http.disconnect"]


async def test_a_client_that_leaves_while_it_sends_asks_nobody():
    async def receive():
        return {"type": "http.disconnect"}

    handle = Handle(served(echo).forward)
    scope = {"type": "http", "method": "POST", "path": "/v1/completions"}
    await Gateway(handle)(scope, receive, None)
    assert handle.calls == []


async def test_metrics_of_all_replicas_are_one_page():
    async def page(scope, receive, send):
        assert (scope["method"], scope["path"]) == ("GET", "/metrics")
        await send(start())
        await send(body(b"# TYPE a counter\na 1.0\n"))

    handle = Handle(served(echo).forward)
    names = ("r2", "r1")
    handle.pages = [ActorDiedError(), *[await served(page, name).metrics() for name in names]]
    status, headers, data = await ask(handle, "/metrics", "GET")
    assert status == 200
    assert headers[b"content-type"].startswith(b"text/plain; version=0.0.4")
    expected = '# TYPE a counter\na{replica="r1"} 1.0\na{replica="r2"} 1.0\n'
    assert data.decode() == expected
    handle.pages = TimeoutError()  # type: ignore[assignment]
    status, _, data = await ask(handle, "/metrics", "GET")
    assert (status, json.loads(data)["error"]["code"]) == (503, "metrics_unavailable")


async def test_a_replica_drains_when_its_last_request_is_over():
    goes_on = asyncio.Event()

    async def slow(scope, receive, send):
        await send(start())
        await goes_on.wait()
        await send(body(b""))

    replica = served(slow)
    answer = replica.forward({}, b"")
    assert await anext(answer) == [taken_by("r")]
    assert (await anext(answer))[0]["status"] == 200
    assert not await replica.drain(0.1)
    goes_on.set()
    assert [batch async for batch in answer] == [[body(b"")]]
    assert await replica.drain(0.1)
