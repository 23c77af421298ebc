"""``/v1/messages`` through vLLM's own application and Anthropic's own client."""

from __future__ import annotations

import json
import re
from typing import Any

import anthropic
import pytest

from tests.server.scripted_app import App
from tests.server.sdk import anthropic_client
from vllm_flashtrace import Attribution

pytestmark = pytest.mark.asyncio(loop_scope="module")

QUESTION = "The code is 4821. What is the code?"


async def ask(app: App, **body: Any) -> Any:
    messages = [{"role": "user", "content": QUESTION}]
    return await app.post("/v1/messages", **{"messages": messages, "max_tokens": 64, **body})


def masked(text: str) -> str:
    return re.sub(r"chatcmpl-[0-9a-f]+", "ID", text)


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    blocks = [block.split("\n", 1) for block in text.split("\n\n") if block]
    return [
        (name.removeprefix("event: "), json.loads(data.removeprefix("data: ")))
        for name, data in blocks
    ]


async def test_the_message_carries_the_attribution_beside_its_content(app):
    message = (await ask(app, flashtrace={"top_k": None})).json()
    trace = message["flashtrace"]
    assert trace["status"] == "completed"
    assert trace["target"]["text"].startswith("The code is 4821.")
    located = [score for score in trace["scores"] if "message" in score]
    assert located
    for score in located:
        assert score["message"] == 0
        assert QUESTION[score["start"] : score["end"]].strip() == score["token"].strip()


async def test_scores_are_those_of_the_same_chat(app):
    field = {"hops": 1, "target": {"text": "4821"}}
    message = (await ask(app, flashtrace=field)).json()
    messages = [{"role": "user", "content": QUESTION}]
    chat = (await app.chat(messages=messages, flashtrace=field)).json()
    assert message["flashtrace"]["scores"] == chat["choices"][0]["flashtrace"]["scores"]


async def test_nothing_else_changes(app):
    plain = masked((await ask(app)).text)
    traced = json.loads(masked((await ask(app, flashtrace=True)).text))
    del traced["flashtrace"]
    assert json.dumps(traced) == json.dumps(json.loads(plain))


@pytest.mark.parametrize("value", [None, False])
async def test_null_and_false_mean_no_trace(app, value):
    assert "flashtrace" not in (await ask(app, flashtrace=value)).text
    assert not app.engine.traces


async def test_a_stream_has_one_more_event_before_message_stop(app):
    plain = masked((await ask(app, stream=True)).text)
    traced = masked((await ask(app, stream=True, flashtrace=True)).text)
    assert [name for name, _ in events(traced)][-3:] == [
        "message_delta",
        "flashtrace",
        "message_stop",
    ]
    [(_, data)] = [event for event in events(traced) if event[0] == "flashtrace"]
    assert data["type"] == "flashtrace"
    assert data["flashtrace"]["status"] == "completed"
    blocks = [block for block in traced.split("\n\n") if not block.startswith("event: flashtrace")]
    assert "\n\n".join(blocks) == plain


async def test_generated_text_that_looks_like_an_event_is_not_taken_for_it(app):
    app.engine.answers = ["event: message_stop\ndata: {}\n\nevent: message_delta\n\n"]
    traced = events((await ask(app, stream=True, flashtrace=True)).text)
    assert [name for name, _ in traced].count("flashtrace") == 1
    assert traced[-2][0] == "flashtrace"


async def test_anthropic_client_reads_it(app):
    async with anthropic_client(app) as client:
        message = await client.messages.create(
            model="m",
            max_tokens=64,
            messages=[{"role": "user", "content": QUESTION}],
            extra_body={"flashtrace": True},
        )
    assert message.content[0].text == "The code is 4821."
    assert message.flashtrace["status"] == "completed"
    attribution = Attribution.from_response(message)
    assert attribution.text == "The code is 4821."


async def test_anthropic_client_gets_the_event_of_a_stream(app):
    async with anthropic_client(app) as client:
        stream = await client.messages.create(
            model="m",
            max_tokens=64,
            messages=[{"role": "user", "content": QUESTION}],
            stream=True,
            extra_body={"flashtrace": True},
        )
        seen = [event async for event in stream]
    assert [event.type for event in seen][-3:] == ["message_delta", "flashtrace", "message_stop"]
    assert seen[-2].flashtrace["status"] == "completed"


async def test_anthropic_stream_helper_is_not_disturbed(app):
    async with (
        anthropic_client(app) as client,
        client.messages.stream(
            model="m",
            max_tokens=64,
            messages=[{"role": "user", "content": QUESTION}],
            extra_body={"flashtrace": True},
        ) as stream,
    ):
        final = await stream.get_final_message()
    assert final.content[0].text == "The code is 4821."
    assert final.stop_reason == "end_turn"


async def test_system_prompt_and_tool_results_are_messages_of_their_own(app):
    turns = [
        {"role": "user", "content": "Look it up."},
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "t1", "name": "look", "input": {"at": "x"}}],
        },
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "It is 4821."}],
        },
    ]
    field = {"include": ["segments"], "top_k": None}
    message = (await ask(app, messages=turns, system="Be brief.", flashtrace=field)).json()
    segments = message["flashtrace"]["segments"]
    roles = [segment["role"] for segment in segments if "message" in segment]
    assert roles[:2] == ["system", "user"]
    assert "tool" in roles


@pytest.mark.parametrize("stream", [False, True])
async def test_bad_field_is_anthropics_error(app, stream):
    for field, name in (
        ({"hops": -1}, "flashtrace.hops"),
        ({"target": {"tokens": [[0, 99]]}}, "flashtrace.target"),
        ("yes", "flashtrace"),
    ):
        response = await ask(app, flashtrace=field, stream=stream)
        assert response.status_code == 400
        body = response.json()
        assert body["type"] == "error"
        assert name in body["error"]["message"]
    assert not app.engine.calls


async def test_anthropic_client_sees_the_refusal(app):
    async with anthropic_client(app) as client:
        with pytest.raises(anthropic.BadRequestError, match=r"flashtrace\.hops"):
            await client.messages.create(
                model="m",
                max_tokens=8,
                messages=[{"role": "user", "content": "Hi"}],
                extra_body={"flashtrace": {"hops": -1}},
            )


async def test_forged_spec_is_refused(app):
    response = await ask(app, vllm_xargs={"flashtrace": "AAAA"})
    assert response.status_code == 400
    assert "reserved" in response.json()["error"]["message"]


async def test_trace_that_fails_leaves_the_message(app):
    message = (await ask(app, flashtrace={"target": {"text": "nowhere"}})).json()
    assert message["content"][0]["text"] == "The code is 4821."
    assert message["flashtrace"]["error"]["code"] == "target_not_found"
    assert message["flashtrace"]["status"] == "failed"


async def test_error_in_the_middle_of_a_stream_leaves_no_trace(app):
    app.engine.fail_after = 3
    names = [name for name, _ in events((await ask(app, stream=True, flashtrace=True)).text)]
    assert "error" in names
    assert "flashtrace" not in names
    assert not app.engine.traces
