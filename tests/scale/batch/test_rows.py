from __future__ import annotations

from typing import Any

import pytest

from vllm_flashtrace.scale.batch.inputs import (
    ATTRIBUTIONS,
    CHAT,
    COMPLETIONS,
    Defaults,
    RowError,
    custom_id_of,
    request_of,
)

USER = {"role": "user", "content": "Code?"}


def batch_row(**changes: Any) -> dict[str, Any]:
    row = {
        "custom_id": "a",
        "method": "POST",
        "url": CHAT,
        "body": {"messages": [USER], "max_tokens": 3},
    }
    return {**row, **changes}


def test_openai_row() -> None:
    request = request_of(batch_row(), Defaults())
    assert request.url == CHAT
    assert request.body == {"messages": [USER], "max_tokens": 3, "flashtrace": True}


@pytest.mark.parametrize(
    ("row", "url", "body"),
    [
        ({"messages": [USER], "seed": 1}, CHAT, {"messages": [USER], "seed": 1}),
        ({"prompt": "x", "n": 2}, COMPLETIONS, {"prompt": "x", "n": 2}),
        ({"prompt": "x", "completion": "y"}, ATTRIBUTIONS, {"prompt": "x", "completion": "y"}),
        (
            {"messages": [USER], "completion": "y"},
            ATTRIBUTIONS,
            {"messages": [USER, {"role": "assistant", "content": "y"}]},
        ),
    ],
)
def test_plain_rows(row: dict[str, Any], url: str, body: dict[str, Any]) -> None:
    request = request_of(row, Defaults(flashtrace={"hops": 0}))
    assert (request.url, request.body) == (url, {**body, "flashtrace": {"hops": 0}})


def test_defaults_give_way() -> None:
    defaults = Defaults(flashtrace={"hops": 0}, max_tokens=9)
    assert request_of({"prompt": "x"}, defaults).body["max_tokens"] == 9
    own = {"messages": [USER], "max_completion_tokens": 2, "flashtrace": False}
    assert request_of(own, defaults).body == own
    assert "max_tokens" not in request_of({"prompt": "x", "completion": "y"}, defaults).body


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ([], r"object, got \[\]"),
        ("text", 'object, got "text"'),
        (None, "object, got null"),
        ({}, "messages"),
        ({"messages": [USER], "prompt": "x"}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"messages": [USER], "completion": 3}, "completion"),
        ({"prompt": "x", "custom_id": 3}, "custom_id"),
        ({"prompt": "x", "custom_id": ""}, "custom_id"),
        ({"prompt": "x", "custom_id": "\ud800"}, "custom_id"),
        ({"prompt": "x", "stream": True}, "stream"),
        ({"prompt": "\udfff"}, "surrogate"),
        ({"prompt": "x", "flashtrace": {"mode": "deferred"}}, "flashtrace.mode"),
        (batch_row(method="GET"), "method"),
        (batch_row(url="/v1/embeddings"), "url"),
        (batch_row(url=["/v1/completions"]), "url"),
        (batch_row(body=[]), "body"),
        (batch_row(model="m"), "model"),
        (batch_row(body={"messages": [USER], "stream": True}), "stream"),
    ],
)
def test_refusals_name_the_field(row: Any, field: str) -> None:
    with pytest.raises(RowError, match=field):
        request_of(row, Defaults())


def test_deep_nesting_is_refused() -> None:
    deep: Any = "x"
    for _ in range(300):
        deep = [deep]
    with pytest.raises(RowError, match="nested"):
        request_of({"prompt": "x", "logit_bias": deep}, Defaults())


def test_ids() -> None:
    assert custom_id_of({"custom_id": "a"}) == "a"
    assert custom_id_of({"custom_id": 3}) is None
    assert custom_id_of([]) is None
