"""What of a request body can be copied, walked and written out."""

from __future__ import annotations

import json

import pytest

from vllm_flashtrace.api.checks import MAX_NESTING, check_messages, check_nesting, check_text
from vllm_flashtrace.base.errors import InvalidRequestError


def nested(depth):
    value = []
    for _ in range(depth - 1):
        value = [value]
    return value


def calling(arguments):
    return [{"role": "assistant", "tool_calls": [{"function": {"arguments": arguments}}]}]


def test_what_is_not_too_deep_passes():
    check_nesting(nested(MAX_NESTING), "messages")
    check_messages(calling(json.dumps(nested(MAX_NESTING))), "messages")
    check_text({"é😀": ["\u0000", 1, None, {"a": True}]}, "messages")


@pytest.mark.parametrize("depth", [MAX_NESTING + 2, 100_000])
def test_what_is_too_deep_is_refused_by_name(depth):
    with pytest.raises(InvalidRequestError) as error:
        check_nesting({"a": nested(depth)}, "messages")
    assert error.value.param == "messages"
    with pytest.raises(InvalidRequestError, match="nested deeper"):
        check_messages(calling("[" * depth + "]" * depth), "messages")


@pytest.mark.parametrize("messages", [calling("{"), calling(5), [{"tool_calls": 5}], [5], []])
def test_what_is_no_tool_call_is_left_to_others(messages):
    check_messages(messages, "messages")


@pytest.mark.parametrize("value", ["a\ud800", {"\udfff": 1}, [{"a": ["\ud800"]}]])
def test_lone_surrogates_are_refused_by_name(value):
    with pytest.raises(InvalidRequestError, match="prompt holds a lone surrogate") as error:
        check_text(value, "prompt")
    error.value.message.encode()
