"""What vLLM accepts is accepted with the field too, and what it refuses is refused in its words."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytestmark = pytest.mark.asyncio(loop_scope="module")

TEXT = {"type": "text", "text": "The code is 4821."}
CONTENTS: list[Any] = [
    [],
    [TEXT],
    [TEXT, TEXT],
    [TEXT, {"type": "text", "text": ""}],
    [{"type": "text"}],
    [{"type": "text", "text": 1}],
    [{"type": "text", "text": None}],
    [{"type": "nonsense"}],
    [{"text": "no type"}],
    [{}],
    [[]],
    ["text"],
    [1],
    [None],
    {},
    {"type": "text", "text": "not a list"},
    "",
    None,
    7,
    [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}}],
    [{"type": "image_url"}],
    [{"type": "refusal", "refusal": "No."}],
    [{"type": "thinking", "thinking": "Hm."}],
    [{"type": "input_text", "text": "a"}],
    [TEXT, {"type": "nonsense"}],
]
ROLES = ("user", "system", "developer", "assistant", "tool", "function", "nobody")
USER = {"role": "user", "content": "Which code?"}


def masked(response: Any) -> tuple[int, Any]:
    """Status, and what an error says; of an answer only that there is one."""
    return response.status_code, response.json() if response.status_code != 200 else None


async def side_by_side(app: Any, path: str, body: dict[str, Any]) -> int:
    """Sends the body with and without the field; the status that both have."""
    stock = await app.post(path, **body)
    traced = await app.post(path, **body, flashtrace={"hops": 0})
    assert masked(traced) == masked(stock), json.dumps(body)
    return int(stock.status_code)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("first", [False, True])
async def test_content_parts_of_a_chat(app: Any, role: str, first: bool) -> None:
    statuses = set()
    for content in CONTENTS:
        message: dict[str, Any] = {"role": role, "content": content}
        if role == "tool":
            message["tool_call_id"] = "c1"
        messages = [message, USER] if first else [USER, message]
        statuses.add(await side_by_side(app, "/v1/chat/completions", {"messages": messages}))
    assert 200 in statuses and 400 in statuses


async def test_parts_of_other_routes(app: Any) -> None:
    statuses = set()
    for content in CONTENTS:
        turn = {"role": "user", "content": content}
        body = {"messages": [turn], "max_tokens": 8}
        statuses.add(await side_by_side(app, "/v1/messages", body))
        statuses.add(await side_by_side(app, "/v1/responses", {"input": [turn]}))
    assert {200, 400} <= statuses


async def test_empty_parts_are_traced(app: Any) -> None:
    messages = [{"role": "system", "content": []}, USER]
    response = await app.post("/v1/chat/completions", messages=messages, flashtrace=True)
    [choice] = response.json()["choices"]
    assert choice["flashtrace"]["status"] == "completed", choice
    located = [score for score in choice["flashtrace"]["scores"] if "message" in score]
    assert {score["message"] for score in located} == {1}
