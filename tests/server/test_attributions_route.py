"""``POST /v1/attributions``."""

from __future__ import annotations

import asyncio
import dataclasses
import json

import pytest

from vllm_flashtrace.server import attributions

pytestmark = pytest.mark.asyncio(loop_scope="module")

QUESTION = [{"role": "user", "content": "The code is 4821. What is the code?"}]


def answered(**last):
    return [*QUESTION, {"role": "assistant", "content": "It is 4821.", **last}]


async def post(app, **body):
    return await app.post("/v1/attributions", **body)


async def test_messages_give_the_same_tokens_as_the_chat_itself(app):
    app.engine.answers = ["It is 4821."]
    chat = await app.chat(messages=QUESTION, flashtrace={"hops": 0, "target": {"text": "4821"}})
    given = await post(app, messages=answered(), flashtrace={"hops": 0, "target": {"text": "4821"}})
    generated, existing = app.engine.traces
    assert generated.prompt["prompt_token_ids"] == existing.prompt["prompt_token_ids"]
    expected, got = chat.json()["choices"][0]["flashtrace"], given.json()
    assert got["object"] == "flashtrace.attribution"
    assert got["status"] == "completed"
    assert got["scores"] == expected["scores"]
    assert len(app.engine.generations) == 1


async def test_prompt_and_completion_give_the_same_tokens_as_the_completion_itself(app):
    field = {"hops": 0, "target": {"text": "4821"}, "top_k": None}
    text = await app.complete(prompt="Which code?", flashtrace=field)
    given = await post(app, prompt="Which code?", completion="The code is 4821.", flashtrace=field)
    assert given.json()["scores"] == text.json()["choices"][0]["flashtrace"]["scores"]


async def test_token_ids_equal_text(app):
    encode = app.engine.get_tokenizer().encode
    await post(app, prompt="Which code?", completion="The code.", flashtrace={"hops": 0})
    await post(
        app,
        prompt=encode("Which code?"),
        completion=encode("The code.", add_special_tokens=False),
        flashtrace={"hops": 0},
    )
    text, ids = app.engine.traces
    assert text.prompt["prompt_token_ids"] == ids.prompt["prompt_token_ids"]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
async def test_reasoning_is_written_back_as_the_model_would(app, key):
    response = await post(
        app,
        messages=answered(**{key: "Look it up."}),
        flashtrace={"preset": "paper", "target": "output"},
    )
    result = response.json()
    assert result["status"] == "completed"
    assert "Look" not in result["target"]["text"]
    assert "4821" in result["target"]["text"]
    ids = app.engine.traces[0].prompt["prompt_token_ids"]
    text = app.engine.get_tokenizer().decode(ids)
    assert text.endswith("<think>\nLook it up.\n</think>\n\nIt is 4821.")


async def test_defaults_apply_without_the_field_and_with_null(app):
    for extra in ({}, {"flashtrace": None}, {"flashtrace": True}):
        response = await post(app, prompt="Hi", completion="there", **extra)
        assert response.json()["status"] == "completed"


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ({}, "prompt"),
        ({"prompt": "Hi"}, "completion"),
        ({"completion": "Hi"}, "prompt"),
        ({"prompt": "Hi", "completion": ""}, "completion"),
        ({"prompt": "Hi", "completion": []}, "completion"),
        ({"prompt": "Hi", "completion": [1, -2]}, "completion"),
        ({"prompt": "Hi", "completion": [1, 10**9]}, "completion"),
        ({"prompt": [1, 10**30], "completion": "Hi"}, "prompt"),
        ({"prompt": "Hi", "completion": [1.5]}, "completion"),
        ({"prompt": "Hi", "completion": "x", "colour": "red"}, "colour"),
        ({"prompt": "Hi", "completion": "x", "messages": answered()}, "prompt"),
        ({"prompt": "Hi", "completion": "x", "tools": []}, "tools"),
        ({"messages": QUESTION}, "messages"),
        ({"messages": [*QUESTION, *QUESTION]}, "messages"),
        ({"messages": answered(content="")}, "messages"),
        ({"messages": answered(content=None)}, "messages"),
        ({"messages": answered(tool_calls=[{"id": "1"}])}, "tool_calls"),
        ({"messages": answered(reasoning=5)}, "reasoning"),
        ({"messages": answered(), "flashtrace": False}, "flashtrace"),
        ({"messages": answered(), "flashtrace": {"hops": -1}}, "flashtrace"),
        ({"messages": answered(), "flashtrace": {"target": {"tokens": [[0, 99]]}}}, "flashtrace"),
        ({"messages": answered(), "flashtrace": {"target": {"text": "none"}}}, "flashtrace"),
        ({"messages": answered(), "flashtrace": {"target": {"regex": "z{9}"}}}, "flashtrace"),
        ({"prompt": "Hi", "completion": "word " * 3000}, "completion"),
        ({"prompt": [5] * 1500, "completion": [6] * 600}, "completion"),
        ({"prompt": "Hi", "completion": "long" * 10**6}, ""),
    ],
)
async def test_bad_body_is_a_400_naming_the_field(app, body, name):
    response = await post(app, **body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert name in f"{error['param']} {error['message']}"
    assert not app.engine.calls


TEXT = "must be a non-empty text or a non-empty list of token ids"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": "Hi", "completion": ""}, f'completion {TEXT}, got ""'),
        ({"prompt": "Hi", "completion": [1, None]}, f"completion {TEXT}, got [1, null]"),
        ({"prompt": True, "completion": "x"}, f"prompt {TEXT}, got true"),
        (
            {"prompt": "Hi", "completion": "x", "priority": None},
            "priority must be an integer, got null",
        ),
        (
            {"prompt": "Hi", "completion": "x", "colour": None},
            "colour is not a known field, got null",
        ),
        ({"messages": "a"}, 'messages must be a list, got "a"'),
        ({"messages": [1, 2]}, "messages.0 must be an object, got 1"),
        ({"messages": [{"content": "a"}, answered()[1]]}, "messages.0.role is missing"),
        (
            {"messages": answered(content=None)},
            "messages.1.content must be non-empty text, got null",
        ),
        ({"messages": answered(), "tools": [{}]}, "tools.0.function is missing"),
    ],
)
async def test_a_refusal_is_one_sentence_with_the_field_and_its_value_as_json(app, body, message):
    error = (await post(app, **body)).json()["error"]
    assert error["message"] == message
    assert error["param"] == message.split()[0]


@pytest.mark.parametrize("content", [b"{\xff", b"[" * 100_000, b'{"prompt": ' + b"9" * 5000 + b"}"])
async def test_unreadable_body_is_a_400_with_openais_error_body(app, content):
    headers = {"content-type": "application/json"}
    response = await app.client.post("/v1/attributions", content=content, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("body")


async def test_unknown_model_is_a_404(app):
    response = await app.client.post(
        "/v1/attributions", json={"model": "other", "prompt": "a", "completion": "b"}
    )
    assert response.status_code == 404


async def test_earlier_turns_that_cannot_be_located_are_the_clients_mistake(app, monkeypatch):
    locate = attributions.existing_chat

    async def without_render(*args):
        return dataclasses.replace(await locate(*args), render=None)

    monkeypatch.setattr(attributions, "existing_chat", without_render)
    turns = [QUESTION[0], {"role": "assistant", "content": "user"}, *answered()]
    response = await post(app, messages=turns, flashtrace={"recurse_over": "assistant"})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "flashtrace.recurse_over"
    assert "assistant message 1" in error["message"]


async def test_a_client_that_leaves_is_no_error_of_the_server(app):
    body = json.dumps({"model": "m", "prompt": "Which code?", "completion": "4821."}).encode()
    traced = len(app.engine.traces)

    async def receive():
        if not read:
            read.append(True)
            return {"type": "http.request", "body": body, "more_body": False}
        async with asyncio.timeout(20):
            while len(app.engine.traces) == traced:
                await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    read, sent = [], []
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/attributions",
        "raw_path": b"/v1/attributions",
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json"), (b"host", b"test")],
        "client": ("127.0.0.1", 1),
        "server": ("test", 80),
    }
    app.engine.trace_gate.clear()
    try:
        await app.app(scope, receive, send)  # Raised, where the answer was none.
    finally:
        app.engine.trace_gate.set()
    assert sent[0]["status"] == 499
