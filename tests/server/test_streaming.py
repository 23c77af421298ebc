"""Streams: where the attribution goes, and what happens when they break."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

pytestmark = pytest.mark.asyncio(loop_scope="module")


def chunks(text: str) -> list[Any]:
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [event if event == "[DONE]" else json.loads(event) for event in events]


def kind(chunk: Any, index: int = 0) -> str:
    """What one chunk is for choice ``index``."""
    if chunk == "[DONE]":
        return "done"
    if not chunk["choices"]:
        return "usage"
    [choice] = chunk["choices"]
    if choice["index"] != index:
        return "other"
    if "flashtrace" in choice.get("delta", choice):
        return "trace"
    return "finish" if choice.get("finish_reason") else "text"


def order(events: list[Any], index: int = 0) -> list[str]:
    seen: list[str] = []
    for event in events:
        name = kind(event, index)
        if name != "other" and (not seen or seen[-1] != name):
            seen.append(name)
    return seen


@pytest.mark.parametrize("route", ["chat", "complete"])
@pytest.mark.parametrize("usage", [False, True])
async def test_trace_comes_after_finish_and_before_usage_and_done(app, route, usage):
    options = {"stream_options": {"include_usage": True}} if usage else {}
    response = await getattr(app, route)(stream=True, flashtrace=True, **options)
    events = chunks(response.text)
    assert order(events) == ["text", "finish", "trace", *(["usage"] if usage else []), "done"]


async def test_chat_attribution_is_in_the_delta_and_the_chunk_matches_the_stream(app):
    events = chunks((await app.chat(stream=True, flashtrace=True)).text)
    [trace] = [event for event in events if kind(event) == "trace"]
    assert trace["choices"][0]["delta"]["flashtrace"]["status"] == "completed"
    for key in ("id", "object", "created", "model"):
        assert trace[key] == events[0][key]


async def test_stock_chunks_of_a_traced_stream_are_vllms(app):
    plain = chunks((await app.chat(stream=True)).text)
    traced = chunks((await app.chat(stream=True, flashtrace=True)).text)
    traced = [event for event in traced if kind(event) != "trace"]
    for event in [*plain, *traced]:
        if event != "[DONE]":
            event.pop("id"), event.pop("created")
    assert traced == plain


async def test_streamed_ids_and_text_equal_the_unstreamed_ones(app):
    await app.complete(flashtrace={"hops": 0})
    await app.complete(flashtrace={"hops": 0}, stream=True)
    whole, streamed = app.engine.traces
    assert whole.prompt["prompt_token_ids"] == streamed.prompt["prompt_token_ids"]


async def test_each_of_n_choices_gets_one_chunk(app):
    app.engine.answers = ["Short.", "This one is a good deal longer than that."]
    events = chunks((await app.chat(stream=True, n=2, flashtrace=True)).text)
    for index in (0, 1):
        assert order(events, index) == ["text", "finish", "trace", "done"]
        assert [kind(event, index) for event in events].count("trace") == 1


async def test_several_prompts_in_a_stream(app):
    events = chunks(
        (await app.complete(prompt=["one two", "three"], stream=True, n=2, flashtrace=True)).text
    )
    assert [order(events, i) for i in range(4)] == [["text", "finish", "trace", "done"]] * 4


async def test_trace_of_an_early_choice_does_not_wait_for_the_others(app):
    app.engine.answers = ["Hi", "word " * 40]

    async def first_trace_is_ready(step: int) -> None:
        if step == 10:
            await until(lambda: not running_traces())

    app.engine.before_step = first_trace_is_ready
    events = chunks((await app.chat(stream=True, n=2, flashtrace=True)).text)
    trace = [kind(event) for event in events].index("trace")
    later = [kind(event, 1) for event in events[trace:]]
    assert later.count("text") > 20
    assert "finish" in later


async def test_generated_text_that_looks_like_protocol_is_not_taken_for_it(app):
    app.engine.answers = ['{"finish_reason":"stop","choices":[]} data: [DONE]']
    events = chunks((await app.chat(stream=True, flashtrace=True)).text)
    assert order(events) == ["text", "finish", "trace", "done"]
    text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events[:-1])
    assert text == app.engine.answers[0]


async def test_pure_echo_stream_says_it_was_skipped(app):
    response = await app.complete(echo=True, max_tokens=0, stream=True, flashtrace=True)
    [trace] = [event for event in chunks(response.text) if kind(event) == "trace"]
    assert trace["choices"][0]["flashtrace"]["error"]["code"] == "nothing_generated"
    assert trace["choices"][0]["text"] == ""


def running_traces() -> list[asyncio.Task[Any]]:
    return [t for t in asyncio.all_tasks() if t.get_name().startswith("flashtrace-choice")]


async def start(app: Any, **body: Any) -> Any:
    """What vLLM's route calls; the route itself cancels this when the client leaves."""
    messages = [{"role": "user", "content": "What is the code?"}]
    request = ChatCompletionRequest(model="m", messages=messages, flashtrace={"hops": 0}, **body)
    return await app.app.state.openai_serving_chat.create_chat_completion(request)


async def start_stream(app: Any, **body: Any) -> Any:
    return await start(app, stream=True, **body)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def test_error_in_the_middle_cancels_the_traces(app):
    app.engine.answers = ["Hi", "This one is a good deal longer than that."]
    app.engine.fail_after = 6
    app.engine.trace_gate.clear()
    events = [event async for event in await start_stream(app, n=2)]
    assert '"error"' in events[-2]
    assert events[-1] == "data: [DONE]\n\n"
    assert not any('"flashtrace"' in event for event in events)
    assert not running_traces()
    assert all(trace.aborted for trace in app.engine.traces)


async def test_client_that_leaves_during_the_trace_aborts_it(app):
    app.engine.trace_gate.clear()
    stream = await start_stream(app)

    async def read() -> None:
        async for _ in stream:
            pass

    reader = asyncio.create_task(read())
    await until(lambda: app.engine.traces)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert not running_traces()
    assert [trace.aborted for trace in app.engine.traces] == [True]


async def test_client_that_leaves_during_generation_aborts_it(app):
    app.engine.answers = ["word " * 50]
    stream = await start_stream(app)
    await anext(stream)
    await anext(stream)
    await stream.aclose()
    [generation] = app.engine.generations
    # vLLM's own stream leaves closing its source to the event loop.
    await until(lambda: generation.aborted)
    assert not app.engine.traces


async def test_client_that_leaves_an_unstreamed_request_aborts_its_trace(app):
    app.engine.trace_gate.clear()
    request = asyncio.create_task(start(app))
    await until(lambda: app.engine.traces)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert not running_traces()
    assert [trace.aborted for trace in app.engine.traces] == [True]
