"""Deferred mode through vLLM's own application."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from safetensors.torch import load
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from tests.server.scripted_app import App, build
from vllm_flashtrace.api.attribution import Attribution
from vllm_flashtrace.api.response import AttributionObject
from vllm_flashtrace.server import deferred
from vllm_flashtrace.server.session import new_trace_id
from vllm_flashtrace.server.sqlite_store import STORE_ENV

pytestmark = pytest.mark.asyncio(loop_scope="module")

DEFERRED = {"mode": "deferred", "target": {"text": "4821"}, "hops": 0}
EXISTING = {"prompt": "The code is 4821. Repeat:", "completion": " 4821", "flashtrace": DEFERRED}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def module_app(
    plugins: None, model_path: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[App]:
    """Two places, room for four entries."""
    options = {"max_stored_attributions": 4, "max_concurrent_traces": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(STORE_ENV, str(tmp_path_factory.mktemp("deferred") / "store"))
        patch.setattr(deferred, "_RENEW_SECONDS", 0.05)
        app = await build(
            model_path, "--additional-config", json.dumps({"flashtrace": options})
        )  # fmt: skip
        yield app
        await app.app.state.flashtrace.close()
        await app.client.aclose()


@pytest_asyncio.fixture(loop_scope="module")
async def app(module_app: App) -> AsyncIterator[App]:
    module_app.engine.reset()
    yield module_app
    module_app.engine.trace_gate.set()
    await until(lambda: not pending(module_app))


def pending(app: App) -> int:
    return int(app.app.state.flashtrace.deferred.unfinished)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def fetch(app: App, attribution_id: str) -> dict[str, Any]:
    response = await app.client.get(f"/v1/attributions/{attribution_id}")
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    AttributionObject.model_validate(body)
    return body


async def finished(app: App, attribution_id: str) -> dict[str, Any]:
    await until(lambda: not pending(app))
    return await fetch(app, attribution_id)


def ours(body: dict[str, Any]) -> dict[str, Any]:
    """The object in a response of any route."""
    holder = next((body[key][0] for key in ("choices", "output") if body.get(key)), body)
    found: dict[str, Any] = holder.get("flashtrace", holder)
    return found


ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Which?"}]},
    "/v1/completions": {"prompt": "Which?"},
    "/v1/responses": {"input": "Which?"},
    "/v1/messages": {"messages": [{"role": "user", "content": "Which?"}], "max_tokens": 64},
    "/v1/attributions": {"prompt": "Which?", "completion": "The code is 4821."},
}


@pytest.mark.parametrize("route", ROUTES)
async def test_the_answer_does_not_wait_and_the_result_is_the_inline_one(app, route):
    inline = ours(
        (await app.post(route, **ROUTES[route], flashtrace={**DEFERRED, "mode": "inline"})).json()
    )
    app.engine.trace_gate.clear()
    queued = ours((await app.post(route, **ROUTES[route], flashtrace=DEFERRED)).json())
    assert queued == {"id": queued["id"], "object": "flashtrace.attribution", "status": "queued"}
    await until(lambda: len(app.engine.traces) == 2)
    assert (await fetch(app, queued["id"]))["status"] == "running"
    app.engine.trace_gate.set()
    result = await finished(app, queued["id"])
    assert result["status"] == "completed"
    assert result["id"] == queued["id"]
    same = [key for key in inline if key not in ("id", "usage")]
    assert {key: result[key] for key in same} == {key: inline[key] for key in same}


async def test_sums_of_attention_are_fetched_by_themselves(app):
    async def asked(attribution_id: str) -> Any:
        return await app.client.get(f"/v1/attributions/{attribution_id}/attention")

    wanted = {**DEFERRED, "include": ["attention"]}
    inline = (await app.post("/v1/attributions", **{**EXISTING, "flashtrace": {
        **wanted, "mode": "inline"}})).json()  # fmt: skip
    app.engine.trace_gate.clear()
    queued = (await app.post("/v1/attributions", **{**EXISTING, "flashtrace": wanted})).json()
    refused = await asked(queued["id"])
    assert refused.status_code == 404
    assert "has no sums of attention: it is" in refused.json()["error"]["message"]
    app.engine.trace_gate.set()
    found = await finished(app, queued["id"])
    assert found["attention"] == {"shape": inline["attention"]["shape"]}
    file = await asked(queued["id"])
    assert file.headers["content-type"] == "application/octet-stream"
    sums = load(file.content)["attention"]
    assert torch.equal(sums, Attribution(inline).attention)
    assert list(sums.shape) == found["attention"]["shape"] and sums.dtype == torch.float16
    with pytest.raises(ValueError, match="no sums of attention in this response"):
        Attribution(found).attention  # noqa: B018
    assert (await app.client.delete(f"/v1/attributions/{queued['id']}")).status_code == 200
    assert (await asked(queued["id"])).status_code == 404
    without = (await app.post("/v1/attributions", **EXISTING)).json()
    await finished(app, without["id"])
    refused = await asked(without["id"])
    assert refused.status_code == 404
    assert "its request has no include 'attention'" in refused.json()["error"]["message"]


@pytest.mark.parametrize("route", [route for route in ROUTES if route != "/v1/attributions"])
async def test_a_stream_ends_without_waiting(app, route):
    app.engine.trace_gate.clear()
    response = await app.post(route, **ROUTES[route], flashtrace=DEFERRED, stream=True)
    assert response.text.count('"status":"queued"') == 1
    attribution_id = "ft-" + response.text.partition('"ft-')[2][:32]
    app.engine.trace_gate.set()
    assert (await finished(app, attribution_id))["status"] == "completed"


async def test_each_of_n_choices_has_its_own(app):
    app.engine.answers = ["The code is 4821.", "No: 4821 it is."]
    choices = (await app.chat(n=2, flashtrace=DEFERRED)).json()["choices"]
    ids = [choice["flashtrace"]["id"] for choice in choices]
    assert len(set(ids)) == 2
    spans = [(await finished(app, one))["target"]["tokens"] for one in ids]
    assert spans[0] != spans[1]


async def test_a_failed_trace_is_a_failed_object(app):
    field = {**DEFERRED, "target": {"text": "nowhere"}}
    queued = (await app.chat(flashtrace=field)).json()["choices"][0]["flashtrace"]
    result = await finished(app, queued["id"])
    assert result["status"] == "failed"
    assert result["error"]["code"] == "target_not_found"


async def test_nothing_generated_is_said_at_once_and_stored_nowhere(app):
    choice = (await app.complete(echo=True, max_tokens=0, flashtrace=DEFERRED)).json()["choices"][0]
    assert choice["flashtrace"]["status"] == "skipped"
    unknown = await app.client.get(f"/v1/attributions/{choice['flashtrace']['id']}")
    assert unknown.status_code == 404


async def test_a_store_full_of_unfinished_ones_skips(app):
    app.engine.trace_gate.clear()
    bodies = [(await app.post("/v1/attributions", **EXISTING)).json() for _ in range(5)]
    assert [body["status"] for body in bodies] == ["queued"] * 4 + ["skipped"]
    assert bodies[-1]["error"]["code"] == "overloaded"
    await until(lambda: len(app.engine.traces) == 2)
    states = [(await fetch(app, body["id"]))["status"] for body in bodies[:4]]
    assert states == ["running", "running", "queued", "queued"]
    inline = await app.post("/v1/attributions", **{**EXISTING, "flashtrace": {"mode": "deferred"}})
    assert inline.json()["error"]["code"] == "overloaded"
    app.engine.trace_gate.set()
    for body in bodies[:4]:
        assert (await finished(app, body["id"]))["status"] == "completed"


async def test_delete_stops_a_running_and_a_waiting_one(app):
    app.engine.trace_gate.clear()
    ids = [(await app.post("/v1/attributions", **EXISTING)).json()["id"] for _ in range(3)]
    await until(lambda: len(app.engine.traces) == 2)
    for attribution_id in (ids[2], ids[0]):
        response = await app.client.delete(f"/v1/attributions/{attribution_id}")
        assert response.status_code == 200
        assert response.json()["deleted"] is True
        assert (await app.client.get(f"/v1/attributions/{attribution_id}")).status_code == 404
        assert (await app.client.delete(f"/v1/attributions/{attribution_id}")).status_code == 404
    assert sorted(trace.aborted for trace in app.engine.traces) == [False, True]
    assert pending(app) == 1
    app.engine.trace_gate.set()
    assert (await finished(app, ids[1]))["status"] == "completed"
    assert len(app.engine.traces) == 2


async def test_one_that_another_server_deleted_is_stopped(app):
    app.engine.trace_gate.clear()
    queued = (await app.post("/v1/attributions", **EXISTING)).json()
    await until(lambda: app.engine.traces)
    assert app.app.state.flashtrace.deferred.store.delete(queued["id"])
    await until(lambda: not pending(app))
    assert [trace.aborted for trace in app.engine.traces] == [True]


async def test_a_client_that_leaves_does_not_stop_it(app):
    app.engine.trace_gate.clear()
    request = ChatCompletionRequest(
        model="m",
        messages=[{"role": "user", "content": "Which?"}],
        stream=True,
        flashtrace=DEFERRED,
    )
    handler = app.app.state.openai_serving_chat
    stream = await handler.create_chat_completion(request)
    seen = ""
    async for event in stream:
        seen += event
        if '"queued"' in event:
            break
    await stream.aclose()
    attribution_id = "ft-" + seen.partition('"ft-')[2][:32]
    assert pending(app) == 1
    app.engine.trace_gate.set()
    assert (await finished(app, attribution_id))["status"] == "completed"


@pytest.mark.parametrize("bad", ["x", "ft-0", "ft-" + "0" * 32, "..%2fetc", "ft-" + "g" * 32])
async def test_unknown_ids_are_404(app, bad):
    for ask in (app.client.get, app.client.delete):
        response = await ask(f"/v1/attributions/{bad}")
        assert response.status_code == 404
    assert not app.engine.calls


async def test_there_is_no_list(app):
    assert (await app.client.get("/v1/attributions")).status_code == 405
    assert (await app.client.get("/v1/attributions/")).status_code in (404, 405, 307)


async def test_ids_cannot_be_guessed_from_each_other():
    ids = {new_trace_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert len({one[:10] for one in ids}) > 990


async def test_results_go_when_their_time_is_over(plugins, model_path, monkeypatch, tmp_path):
    monkeypatch.setenv(STORE_ENV, str(tmp_path / "store"))
    monkeypatch.setattr(deferred, "_RENEW_SECONDS", 0.05)
    monkeypatch.setattr(deferred, "_IDLE_SECONDS", 0.05)
    config = json.dumps({"flashtrace": {"stored_ttl_seconds": 0.5}})
    app = await build(model_path, "--additional-config", config)
    queued = (await app.post("/v1/attributions", **EXISTING)).json()
    service = app.app.state.flashtrace
    await until(lambda: service.deferred.store.counts().get("completed"))
    assert "flashtrace_store_entries{" in (await app.client.get("/metrics")).text
    await until(lambda: service.deferred.store.counts() == {})
    assert (await app.client.get(f"/v1/attributions/{queued['id']}")).status_code == 404
    await until(lambda: service.deferred._tender.done())
    again = (await app.post("/v1/attributions", **EXISTING)).json()
    assert again["status"] == "queued"
    await service.close()


async def test_shutdown_ends_what_is_unfinished_and_says_what_was_lost(
    plugins, model_path, monkeypatch, tmp_path, caplog
):
    monkeypatch.setenv(STORE_ENV, str(tmp_path / "store"))
    app = await build(model_path, "--disable-log-stats")
    app.engine.trace_gate.clear()
    async with app.app.router.lifespan_context(app.app):
        queued = (await app.post("/v1/attributions", **EXISTING)).json()
        await until(lambda: app.engine.traces)
        with caplog.at_level(logging.WARNING, logger=deferred.logger.name):
            logging.getLogger(deferred.logger.name).addHandler(caplog.handler)
    logging.getLogger(deferred.logger.name).removeHandler(caplog.handler)
    lost = [line for line in caplog.messages if queued["id"] in line]
    assert any("server stops" in line for line in lost)
    assert [trace.aborted for trace in app.engine.traces] == [True]
    named = [task.get_name() for task in asyncio.all_tasks()]
    assert not [name for name in named if queued["id"] in name]


async def test_a_store_that_cannot_be_used_fails_the_trace_alone(
    plugins, model_path, monkeypatch, tmp_path
):
    folder = tmp_path / "open"
    folder.mkdir(mode=0o755)
    monkeypatch.setenv(STORE_ENV, str(folder))
    app = await build(model_path)
    choice = (await app.chat(flashtrace=DEFERRED)).json()["choices"][0]
    assert choice["message"]["content"] == "The code is 4821."
    assert choice["flashtrace"]["status"] == "failed"
    assert "private" in choice["flashtrace"]["error"]["message"]
    assert not list(Path(folder).iterdir())
