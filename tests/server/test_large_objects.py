"""Large attributions: whole, the same on every route, and never long on the event loop."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import torch

from tests.server.scripted_app import App
from vllm_flashtrace.api.attribution import Attribution
from vllm_flashtrace.server import attributions
from vllm_flashtrace.server.large_objects import as_text, json_pieces, plain
from vllm_flashtrace.trace import tracer as tracer_module
from vllm_flashtrace.trace.large_results import LARGE_BYTES, LargeAttribution

pytestmark = pytest.mark.asyncio(loop_scope="module")

WORDS = "The harbour master wrote the tide times on a slate. " * 60
LARGE = {
    "hops": 1,
    "top_k": None,
    "include": ["layers", "attention", "hops", "segments", "tokens"],
}
CHAT = {"messages": [{"role": "user", "content": f"{WORDS} Straße 東京 \u2028 “4821”?"}]}
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {**CHAT, "n": 2},
    "/v1/completions": {"prompt": [WORDS, f"{WORDS} Again."]},
    "/v1/responses": {"input": WORDS},
    "/v1/messages": {**CHAT, "max_tokens": 30},
}
EXISTING = {"prompt": WORDS, "completion": " 4821"}


@pytest.fixture(autouse=True)
def uneven(app: App) -> Iterator[None]:
    """Scores that are no round numbers, from 10^-9 upwards."""
    app.engine.trace_scores = lambda length: torch.linspace(1e-9, 1, length) ** 3 + 1e-9
    yield
    assert app.app.state.flashtrace.tracer.load["result_bytes"] == 0


def objects(value: Any) -> list[dict[str, Any]]:
    """Every attribution in an answer, without what differs from run to run."""
    if isinstance(value, list):
        return [found for part in value for found in objects(part)]
    if not isinstance(value, dict):
        return []
    if value.get("object") == "flashtrace.attribution":
        value.pop("id"), value["usage"].pop("seconds")
        return [value]
    return [found for part in value.values() for found in objects(part)]


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


async def ask(
    app: App, path: str, body: dict[str, Any], field: dict[str, Any] = LARGE
) -> list[dict[str, Any]]:
    response = await app.post(path, **body, flashtrace=field)
    assert response.status_code == 200, response.text[:500]
    assert "flashtrace-" not in response.text
    found = objects(events(response.text) if body.get("stream") else response.json())
    # In a stream each goes out when it is ready.
    return sorted(found, key=lambda one: one["prompt_tokens"])


async def test_several_targets_are_carried_as_in_one_piece(app, monkeypatch):
    field = {**LARGE, "targets": ["output", {"text": "4821"}], "include": ["hops", "segments"]}
    found = await ask(app, "/v1/attributions", EXISTING, field)
    assert len(found[0]["targets"]) == 2
    monkeypatch.setattr(tracer_module, "LARGE_BYTES", 1 << 40)
    assert await ask(app, "/v1/attributions", EXISTING, field) == found


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ROUTES)
async def test_every_route_carries_the_object_that_it_would_carry_in_one_piece(
    app, path, stream, monkeypatch
):
    body = ROUTES[path] | ({"stream": True} if stream else {})
    found = await ask(app, path, body)
    monkeypatch.setattr(tracer_module, "LARGE_BYTES", 1 << 40)
    assert found == await ask(app, path, body)
    assert [len(one["layers"]) for one in found] == [2] * (2 if "completions" in path else 1)
    sums = Attribution(found[0]).attention
    assert list(sums.shape) == found[0]["attention"]["shape"]
    generated = sums.shape[-1] - found[0]["prompt_tokens"]
    assert generated > 0 and sums[..., :-generated].gt(0).any()
    assert all(len(one["scores"]) == one["prompt_tokens"] > 600 for one in found)


async def test_existing_text_and_deferred_ones_too(app, monkeypatch):
    async def fetched() -> list[dict[str, Any]]:
        field = {**LARGE, "mode": "deferred"}
        queued = (await app.post("/v1/attributions", **EXISTING, flashtrace=field)).json()
        async with asyncio.timeout(120):
            while True:
                response = await app.client.get(f"/v1/attributions/{queued['id']}")
                if response.json()["status"] == "completed":
                    assert int(response.headers["content-length"]) == len(response.content)
                    found = objects(response.json())
                    assert list(found[0]["attention"]) == ["shape"]
                    file = await app.client.get(f"/v1/attributions/{queued['id']}/attention")
                    assert int(file.headers["content-length"]) == len(file.content)
                    found[0]["attention"]["data"] = base64.b64encode(file.content).decode()
                    return found
                await asyncio.sleep(0.02)

    now, later = await ask(app, "/v1/attributions", EXISTING), await fetched()
    monkeypatch.setattr(tracer_module, "LARGE_BYTES", 1 << 40)
    assert now == later == await ask(app, "/v1/attributions", EXISTING) == await fetched()


async def test_a_response_that_vllm_keeps_has_the_whole_object(app, monkeypatch):
    stock = app.app.state.openai_serving_responses._stock
    monkeypatch.setattr(stock, "enable_store", True)
    monkeypatch.setattr(app.app.state.openai_serving_responses, "enable_store", True)
    answer = (await app.post("/v1/responses", input=WORDS, flashtrace=LARGE)).json()
    again = (await app.client.get(f"/v1/responses/{answer['id']}")).json()
    assert objects(again) == objects(answer) != []


async def test_small_ones_are_as_ever(app):
    response = await app.chat(flashtrace=True)
    assert response.headers["content-length"] == str(len(response.content))
    text = json.dumps(response.json(), ensure_ascii=False, separators=(",", ":"))
    assert response.text == text


async def exchange(
    app: App, path: str, body: dict[str, Any], on_part: Callable[[], Awaitable[None]] | None = None
) -> list[dict[str, Any]]:
    """The ASGI messages of an answer; ``on_part`` is awaited with each part of the body."""
    sent: list[dict[str, Any]] = []
    content = json.dumps({"model": "m", **body}).encode()
    request = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if request:
            return request.pop()
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)
        if on_part is not None and message["type"] == "http.response.body":
            await on_part()

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    await app.app(scope, receive, send)
    return sent


FIELD = {"hops": 0, "top_k": None, "include": ["layers"]}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/attributions"])
async def test_the_event_loop_never_works_long_for_a_large_object(app, path):
    """By processor time of its thread, which other processes do not change."""
    app.engine.layers = 400
    body = {"prompt": WORDS, "flashtrace": FIELD}
    body |= {"completion": " 4821"} if path == "/v1/attributions" else {"max_tokens": 4}
    await exchange(app, path, body)  # What is done once only.
    turns, over = [], asyncio.Event()

    async def watch() -> None:
        last = time.thread_time()
        while not over.is_set():
            await asyncio.sleep(0)
            now = time.thread_time()
            turns.append(now - last)
            last = now

    task = asyncio.create_task(watch())
    sent = await exchange(app, path, body)
    over.set()
    await task
    parts = [message.get("body", b"") for message in sent[1:]]
    answer = json.loads(b"".join(parts))
    began = time.thread_time()
    text = json.dumps(answer)
    at_once = time.thread_time() - began
    assert len(text) > 5_000_000
    assert max(map(len, parts)) < 100_000
    assert max(turns) < at_once / 4


async def test_token_ids_are_not_searched_for_text(app, monkeypatch):
    searched = []
    monkeypatch.setattr(attributions, "check_text", lambda value, name: searched.append(name))
    ids = app.engine.get_tokenizer().encode(WORDS)
    response = await app.post("/v1/attributions", prompt=ids, completion=" 4821")
    assert response.json()["status"] == "completed"
    assert searched == ["completion", "model"]


async def test_its_memory_is_held_until_the_last_part_is_sent(app):
    load = lambda: app.app.state.flashtrace.tracer.load  # noqa: E731
    going, parts = asyncio.Event(), []

    async def slowly() -> None:
        parts.append(load()["result_bytes"])
        await going.wait()

    body = {"prompt": WORDS, "flashtrace": FIELD}
    task = asyncio.create_task(exchange(app, "/v1/completions", body, slowly))
    async with asyncio.timeout(120):
        while not parts:
            await asyncio.sleep(0.005)
    held = load()["result_bytes"]
    assert held > LARGE_BYTES and load()["running"] == 0
    going.set()
    await task
    await asyncio.sleep(0)
    assert set(parts[:3]) == {held}


async def test_a_result_waits_until_others_are_sent(app, monkeypatch):
    tracer = app.app.state.flashtrace.tracer
    monkeypatch.setattr(tracer._results, "budget_bytes", 1 << 20)
    going, begun = asyncio.Event(), asyncio.Event()

    async def slowly() -> None:
        begun.set()
        await going.wait()

    body = {"prompt": WORDS, "flashtrace": FIELD}
    first = asyncio.create_task(exchange(app, "/v1/completions", body, slowly))
    await begun.wait()
    second = asyncio.create_task(app.complete(prompt=WORDS, flashtrace=FIELD))
    async with asyncio.timeout(120):
        while not tracer._results.waiting:
            await asyncio.sleep(0.005)
    assert len(app.engine.traces) == 1 and tracer.load["waiting"] == 1
    small = (await app.complete(flashtrace=True)).json()["choices"][0]["flashtrace"]
    assert small["status"] == "completed"
    going.set()
    await first
    assert objects((await second).json())[0]["status"] == "completed"


async def test_a_result_without_room_is_skipped(app, monkeypatch):
    tracer = app.app.state.flashtrace.tracer
    monkeypatch.setattr(tracer._results, "budget_bytes", 200_000)
    answer = (await app.complete(prompt=WORDS, flashtrace=FIELD)).json()["choices"][0]
    assert answer["text"] == "The code is 4821."
    assert answer["flashtrace"]["status"] == "skipped"
    assert answer["flashtrace"]["error"]["code"] == "overloaded"
    assert "bytes of results (max_result_mib), the budget is 200000 bytes" in str(answer)
    assert not app.engine.traces


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/attributions"])
async def test_a_client_that_leaves_gives_it_back(app, path):
    parts = 0

    async def leaves() -> None:
        nonlocal parts
        parts += 1
        if parts == 2:
            raise ConnectionError

    body = {"prompt": WORDS, "flashtrace": FIELD}
    body |= {"completion": " 4821"} if path == "/v1/attributions" else {}
    with pytest.raises(BaseException):  # noqa: B017 - whatever the application makes of it
        await exchange(app, path, body, leaves)
    await asyncio.sleep(0.05)


async def test_pieces_are_the_json_of_the_object():
    released = []
    numbers = torch.rand(3, 5000, dtype=torch.float64) * 1e-6
    data = {
        "text": 'quote " Straße \u2028\n',
        "layers": numbers.float(),
        "hops": [{"hop": 0, "scores": numbers[0]}, {"hop": 1, "scores": numbers[1]}],
        "scores": [{"index": i, "token": "é"} for i in range(1000)],
        "no numbers": torch.empty(0),
        "none": None,
        "file": {"data": bytes(range(256)) * 400 + b"end"},
        "empty": [],
        "nothing": {},
        "one": [1.0],
    }
    attribution = LargeAttribution(data, lambda: released.append(True))
    pieces = [piece async for piece in json_pieces(attribution)]
    text = b"".join(pieces).decode("ascii")
    assert json.loads(text) == plain(data)
    assert max(map(len, pieces)) < 100_000
    assert "\n" not in text and ", " not in text
    await asyncio.sleep(0)
    assert released == [True]
    assert await as_text({"a": ["é", 1.5]}) == '{"a":["\\u00e9",1.5]}'
    del attribution
    await asyncio.sleep(0)
    assert released == [True]


async def test_what_is_thrown_away_is_given_back():
    released = []
    attribution = LargeAttribution({}, lambda: released.append(True))
    await asyncio.to_thread(lambda held: None, attribution)
    del attribution
    async with asyncio.timeout(60):  # A thread of the pool may hold its last task for a while.
        while not released:
            await asyncio.sleep(0.01)
    assert released == [True]
