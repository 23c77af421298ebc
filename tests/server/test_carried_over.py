"""What a trace request must share with the completion it explains, on every route."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = {"messages": [{"role": "user", "content": "Which?"}]}
ROUTES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "Which?"},
    "/v1/responses": {"input": "Which?"},
    "/v1/messages": {**CHAT, "max_tokens": 64},
    "/v1/attributions": {"prompt": "Which?", "completion": "The code is 4821."},
}
HEADERS = {
    "X-Vllm-Priority": "-3",
    "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    "tracestate": "vendor=1",
}


@pytest.mark.parametrize("mode", ["inline", "deferred"])
@pytest.mark.parametrize("route", ROUTES)
async def test_salt_priority_and_trace_headers(app, route, mode):
    body = {
        "model": "m",
        **ROUTES[route],
        "cache_salt": "pepper",
        "flashtrace": {"hops": 0, "mode": mode},
    }
    response = await app.client.post(route, json=body, headers=HEADERS)
    assert response.status_code == 200, response.text
    deferred = app.app.state.flashtrace.deferred
    for task in list(deferred._tasks.values()):
        await task
    [trace] = app.engine.traces
    assert trace.prompt["cache_salt"] == "pepper"
    assert trace.kwargs["priority"] == -3
    assert trace.kwargs["trace_headers"]["traceparent"] == HEADERS["traceparent"]
    for generation in app.engine.generations:
        assert generation.prompt["cache_salt"] == "pepper"
        assert generation.kwargs["priority"] == -3


@pytest.mark.parametrize("route", ROUTES)
async def test_without_a_salt_there_is_none(app, route):
    await app.post(route, **ROUTES[route], flashtrace={"hops": 0})
    [trace] = app.engine.traces
    assert trace.prompt.get("cache_salt") is None
