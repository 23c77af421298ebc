"""``/v1/responses`` through vLLM's own application and OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import openai
import pytest
import pytest_asyncio
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

from tests.server.scripted_app import App, build
from tests.server.sdk import openai_client
from vllm_flashtrace import Attribution

pytestmark = pytest.mark.asyncio(loop_scope="module")

QUESTION = "The code is 4821. What is the code?"
TOOL = {
    "type": "function",
    "name": "pay",
    "parameters": {"type": "object", "properties": {"iban": {"type": "string"}}},
}
CALL = '<tool_call>\n{"name": "pay", "arguments": {"iban": "DE42"}}\n</tool_call>'


async def respond(app: App, **body: Any) -> Any:
    return await app.post("/v1/responses", **{"input": QUESTION, **body})


def masked(text: str) -> str:
    """Without what differs between any two responses."""
    text = re.sub(r"(resp|msg|rs|fc|call)_[0-9a-f]{8,}|chatcmpl-tool-[0-9a-f]+", "ID", text)
    return re.sub(r'"(created_at|completed_at)":[0-9.]+', '"at":0', text)


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    blocks = [block.split("\n", 1) for block in text.split("\n\n") if block]
    return [
        (name.removeprefix("event: "), json.loads(data.removeprefix("data: ")))
        for name, data in blocks
    ]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tools_app(plugins: None, model_path: str) -> Any:
    app = await build(
        model_path, "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
        "--reasoning-parser", "minicpmv",
    )  # fmt: skip
    yield app
    await app.client.aclose()


@pytest.fixture
def tools(tools_app: App) -> App:
    tools_app.engine.reset()
    return tools_app


async def test_the_message_item_carries_the_attribution(app):
    response = (await respond(app, flashtrace={"top_k": None})).json()
    [item] = response["output"]
    trace = item["flashtrace"]
    assert trace["status"] == "completed"
    assert trace["target"]["text"].startswith("The code is 4821.")
    for score in trace["scores"]:
        if "message" in score:
            assert score["message"] == 0
            assert QUESTION[score["start"] : score["end"]].strip() == score["token"].strip()
    assert any("message" in score for score in trace["scores"])


async def test_tokens_and_scores_are_those_of_the_same_chat(app):
    field = {"hops": 1, "target": {"text": "4821"}}
    item = (await respond(app, flashtrace=field)).json()["output"][0]
    chat = await app.chat(messages=[{"role": "user", "content": QUESTION}], flashtrace=field)
    trace = chat.json()["choices"][0]["flashtrace"]
    assert item["flashtrace"]["scores"] == trace["scores"]
    traced = [call.prompt["prompt_token_ids"] for call in app.engine.traces]
    assert traced[:2] == traced[2:]


async def test_nothing_else_changes(app):
    plain = masked((await respond(app)).text)
    traced = masked((await respond(app, flashtrace=True)).text)
    assert "flashtrace" not in plain
    body = json.loads(traced)
    del body["output"][0]["flashtrace"]
    assert json.dumps(body) == json.dumps(json.loads(plain))


async def test_every_byte_of_a_stream_but_the_attribution_is_vllms(app):
    plain = masked((await respond(app, stream=True)).text)
    traced = masked((await respond(app, stream=True, flashtrace=True)).text)
    *before, (name, completed) = events(traced)
    assert name == "response.completed"
    trace = completed["response"]["output"][0].pop("flashtrace")
    assert trace["status"] == "completed"
    assert "flashtrace" not in traced.rpartition("event: response.completed")[0]
    assert traced.rpartition("event: ")[0] == plain.rpartition("event: ")[0]
    assert completed == events(plain)[-1][1]
    assert len(before) > 5


async def test_streamed_and_whole_response_have_the_same_scores(app):
    whole = (await respond(app, flashtrace=True)).json()["output"][0]["flashtrace"]
    stream = events((await respond(app, stream=True, flashtrace=True)).text)[-1][1]
    assert stream["response"]["output"][0]["flashtrace"]["scores"] == whole["scores"]


async def test_openai_client_reads_it(app):
    async with openai_client(app) as client:
        response = await client.responses.create(
            model="m", input=QUESTION, extra_body={"flashtrace": True}
        )
    attribution = Attribution.from_response(response)
    assert attribution.status == "completed"
    assert attribution.text == "The code is 4821."


async def test_openai_stream_helper_keeps_it(app):
    async with (
        openai_client(app) as client,
        client.responses.stream(
            model="m", input=QUESTION, extra_body={"flashtrace": True}
        ) as stream,
    ):
        seen = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert seen[-1] == "response.completed"
    assert Attribution.from_response(final).status == "completed"


async def test_instructions_are_message_0_and_input_follows(app):
    items = [
        {"role": "user", "content": "The code is 4821."},
        {"role": "assistant", "content": "Noted."},
        {"role": "user", "content": [{"type": "input_text", "text": "What is it?"}]},
    ]
    field = {"top_k": None, "include": ["segments"]}
    response = await respond(app, input=items, instructions="Be brief.", flashtrace=field)
    trace = response.json()["output"][0]["flashtrace"]
    roles = [segment["role"] for segment in trace["segments"]]
    assert roles == ["system", "user", "assistant", "user", "template"]
    words = [s["token"].strip() for s in trace["scores"] if s.get("message") == 3]
    assert "".join(words) == "Whatisit?"


async def test_output_items_with_an_attribution_can_be_sent_back(app):
    first = (await respond(app, flashtrace=True)).json()["output"]
    items = [{"role": "user", "content": QUESTION}, *first, {"role": "user", "content": "Again."}]
    again = await respond(app, input=items, flashtrace=True)
    assert again.json()["output"][0]["flashtrace"]["status"] == "completed"
    prompt = app.engine.get_tokenizer().decode(
        app.engine.generations[-1].prompt["prompt_token_ids"]
    )
    assert "ft-" not in prompt
    assert prompt.count("The code is 4821.") == 2


async def test_a_function_call_carries_the_attribution(tools):
    tools.engine.answers = [CALL]
    items = (await respond(tools, tools=[TOOL], flashtrace=True)).json()["output"]
    assert [item["type"] for item in items] == ["function_call"]
    assert items[0]["flashtrace"]["status"] == "completed"
    assert "DE42" in items[0]["flashtrace"]["target"]["text"]


async def test_reasoning_is_not_the_answer_and_the_message_carries_it(tools):
    tools.engine.answers = ["<think>\nI look it up.\n</think>\n\nIt is 4821."]
    for stream in (False, True):
        response = await respond(tools, stream=stream, flashtrace=True)
        body = events(response.text)[-1][1]["response"] if stream else response.json()
        assert [item["type"] for item in body["output"]] == ["reasoning", "message"]
        reasoning, message = body["output"]
        assert "flashtrace" not in reasoning
        assert "It is 4821." in message["flashtrace"]["target"]["text"]
        assert "look" not in message["flashtrace"]["target"]["text"]


async def test_hidden_reasoning_stays_hidden(tools):
    tools.engine.answers = ["<think>\nI look it up.\n</think>\n\nIt is 4821."]
    field = {"target": "generated", "include": ["generated"]}
    response = await respond(tools, include_reasoning=False, flashtrace=field)
    trace = response.json()["output"][0]["flashtrace"]
    assert trace["status"] == "completed"
    assert "look" not in response.text


@pytest.mark.parametrize("stream", [False, True])
async def test_bad_field_is_a_400_before_anything_is_generated(app, stream):
    for field in ({"hops": -1}, {"target": {"tokens": [[0, 9]]}}):
        response = await respond(app, flashtrace=field, max_output_tokens=8, stream=stream)
        assert response.status_code == 400
        assert response.json()["error"]["param"].startswith("flashtrace.")
    assert not app.engine.calls


async def test_forged_spec_is_refused(app):
    response = await respond(app, vllm_xargs={"flashtrace": "AAAA"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "vllm_xargs.flashtrace"


async def test_background_is_refused_by_name(app, monkeypatch):
    response = await respond(app, background=True, flashtrace=True)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "background"
    assert not app.engine.calls


async def test_openai_client_sees_the_refusal(app):
    async with openai_client(app) as client:
        with pytest.raises(openai.BadRequestError) as error:
            await client.responses.create(
                model="m", input="Hi", extra_body={"flashtrace": {"hops": -1}}
            )
    assert error.value.param == "flashtrace.hops"


async def test_previous_response_is_part_of_the_conversation(plugins, model_path, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_RESPONSES_API_STORE", "1")
    app = await build(model_path)
    first = (await respond(app, store=True, flashtrace=True)).json()
    field = {"include": ["segments"]}
    second = await respond(
        app, input="Say it again.", previous_response_id=first["id"], flashtrace=field
    )
    trace = second.json()["output"][0]["flashtrace"]
    roles = [segment["role"] for segment in trace["segments"]]
    assert roles == ["user", "assistant", "user", "template"]
    stored = (await app.client.get(f"/v1/responses/{first['id']}")).json()
    assert stored["output"][0]["flashtrace"] == first["output"][0]["flashtrace"]


@pytest.mark.parametrize("stream", [False, True])
async def test_client_that_leaves_during_the_trace_aborts_it(app, stream):
    app.engine.trace_gate.clear()
    handler = app.app.state.openai_serving_responses
    request = ResponsesRequest(model="m", input=QUESTION, stream=stream, flashtrace=True)

    async def serve() -> None:  # What vLLM's route does; it cancels this when the client leaves.
        answer = await handler.create_responses(request)
        async for _ in answer:
            pass

    serving = asyncio.create_task(serve())
    async with asyncio.timeout(10):
        while not app.engine.traces:
            await asyncio.sleep(0.01)
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    assert [trace.aborted for trace in app.engine.traces] == [True]


async def test_error_in_the_middle_of_a_stream_leaves_no_trace(app):
    app.engine.fail_after = 3
    response = await respond(app, stream=True, flashtrace=True)
    assert "response.completed" not in response.text
    assert not app.engine.traces
