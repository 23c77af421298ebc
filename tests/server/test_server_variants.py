"""Servers other than the plain one: unsupported model, reasoning parser, disabled plugin."""

from __future__ import annotations

import json

import pytest

from tests.server.scripted_app import build

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_unsupported_model_serves_and_refuses_traces_by_name(plugins, model_path):
    app = await build(model_path, refusal="multi-head latent attention")
    assert (await app.chat()).status_code == 200
    calls = len(app.engine.calls)
    for response in (
        await app.chat(flashtrace=True),
        await app.complete(flashtrace=True, stream=True),
        await app.post("/v1/attributions", prompt="a", completion="b"),
    ):
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["param"] == "flashtrace"
        assert "multi-head latent attention" in error["message"]
    assert len(app.engine.calls) == calls
    report = (await app.client.get("/v1/attributions/status")).json()
    assert report["status"] == "unsupported_model"
    assert report["model"]["supported"] is False
    assert report["model"]["reason"] == "multi-head latent attention"


async def test_generating_from_tokens_refuses_the_field(plugins, model_path):
    app = await build(model_path, "--enable-scale-out")
    body = {"token_ids": [1, 2], "sampling_params": {"max_tokens": 1}, "flashtrace": True}
    response = await app.post("/inference/v1/generate", **body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "flashtrace"
    assert not app.engine.calls


async def test_unknown_option_stops_the_server(plugins, model_path):
    with pytest.raises(ValueError, match=r"flashtrace\.hop_limit"):
        await build(model_path, "--additional-config", '{"flashtrace": {"hop_limit": 3}}')


CHAT = {"messages": [{"role": "user", "content": "Which?"}]}
BODIES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "Which?"},
    "/v1/responses": {"input": "Which?"},
    "/v1/messages": {**CHAT, "max_tokens": 64},
    "/v1/attributions": {"prompt": "Which?", "completion": "The code is 4821."},
}


async def test_api_key_guards_every_route(plugins, model_path):
    app = await build(model_path, "--api-key", "sesame")
    path = f"/v1/attributions/{'ft-' + '0' * 32}"

    async def codes() -> list[int]:
        asks = [
            app.client.get("/v1/attributions/status"),
            app.client.get(path),
            app.client.delete(path),
            *(app.post(r, **body, flashtrace={"mode": "deferred"}) for r, body in BODIES.items()),
        ]
        return [(await ask).status_code for ask in asks]

    assert await codes() == [401] * 8
    app.client.headers["Authorization"] = "Bearer sesame"
    assert await codes() == [200, 404, 404, *[200] * 5]
    body = {"prompt": "a", "completion": "b"}
    assert (await app.post("/v1/attributions", **body)).status_code == 200


async def test_kill_switch_leaves_vllm_alone(plugins, model_path, monkeypatch):
    monkeypatch.setenv("VLLM_FLASHTRACE_DISABLE", "1")
    app = await build(model_path)
    assert type(app.app.state.openai_serving_chat).__name__ == "OpenAIServingChat"
    assert (await app.post("/v1/attributions", prompt="a", completion="b")).status_code == 404


async def test_reasoning_parser_decides_what_is_reasoning(plugins, model_path):
    app = await build(model_path, "--reasoning-parser", "minicpmv")
    app.engine.answers = ["<think>\nI look it up: 4821.\n</think>\n\nIt is 4821."]
    answer = (await app.chat(flashtrace={"target": "output"})).json()
    [choice] = answer["choices"]
    assert "look it up" in choice["message"]["reasoning"]
    assert choice["flashtrace"]["status"] == "completed"
    assert "look" not in choice["flashtrace"]["target"]["text"]
    assert "It is 4821." in choice["flashtrace"]["target"]["text"]


@pytest.mark.parametrize(
    ("name", "option", "limit"),
    [("layers", "max_layer_scores", 1000), ("attention", "max_attention_sums", 12_000)],
)
async def test_more_numbers_than_the_server_gives(plugins, model_path, name, option, limit):
    options = json.dumps({"flashtrace": {option: limit}})
    app = await build(model_path, "--additional-config", options)
    field = {"include": [name], "hops": 0}
    answer = (await app.chat(flashtrace=field)).json()["choices"][0]
    assert answer["message"]["content"]
    error = answer["flashtrace"]["error"]
    assert error["code"] == option.replace("max", "too_many")
    assert f"at most {limit} ({option})" in error["message"]
    body = {"prompt": "The code is 4821. " * 20, "completion": " It is 4821."}
    refused = await app.post("/v1/attributions", **body, flashtrace=field)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "flashtrace.include"
    body["prompt"] = "The code is 4821."
    given = await app.post("/v1/attributions", **body, flashtrace=field)
    assert given.json()["status"] == "completed" and given.json()[name]
    await app.client.aclose()
