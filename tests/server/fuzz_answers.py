"""What every answer to a generated request must be, whatever was sent."""

from __future__ import annotations

import json
import math
from typing import Any

import httpx

from tests.server.fuzz_bodies import (
    ATTRIBUTIONS,
    CHAT,
    COMPLETIONS,
    FIELD,
    MESSAGES,
    RESPONSES,
    Sent,
)
from vllm_flashtrace.api.request import RequestLimits, parse_flashtrace_field
from vllm_flashtrace.api.response import AttributionObject
from vllm_flashtrace.base.errors import InvalidRequestError
from vllm_flashtrace.server.session import RESERVED_XARGS

LIMITS = RequestLimits()
UNREADABLE = object()


def body_of(sent: Sent) -> Any:
    """The body as a server reads it, or `UNREADABLE`."""
    try:
        return json.loads(sent.body)
    except (ValueError, RecursionError):
        return UNREADABLE


def verdict(field: Any) -> str:
    """``refused``, ``traced`` or ``plain``, by the schema alone."""
    try:
        return "plain" if parse_flashtrace_field(field, LIMITS) is None else "traced"
    except InvalidRequestError:
        return "refused"


def check(sent: Sent, response: httpx.Response) -> str:
    """Holds an answer against its request.

    Returns:
        ``refused``, ``plain``, or the statuses of the attributions.
    """
    assert response.status_code < 500, response.text
    body = body_of(sent)
    if response.status_code != 200:
        check_refusal(sent, response)
        return "refused"
    # An answer shows that all of this was good.
    assert isinstance(body, dict)
    reserved = RESERVED_XARGS.intersection(body.get("vllm_xargs") or ())
    assert not reserved, "a forged spec was taken"
    field = body.get(FIELD)
    if field is None and sent.route == ATTRIBUTIONS:
        field = True
    expected = verdict(field)
    assert expected != "refused", response.text
    choices = attributions(sent, body, response)
    if expected == "plain":
        assert not any(choices)
        return "plain"
    assert len(choices) == number_of_choices(body)
    for found in choices:
        assert len(found) == 1, "not exactly one attribution for a choice"
        check_attribution(found[0], field)
    return " ".join(sorted({found[0]["status"] for found in choices}))


def number_of_choices(body: dict[str, Any]) -> int:
    """How many completions were asked for."""
    prompt = body.get("prompt")
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    return int(body.get("n", 1)) * (len(prompt) if several and prompt else 1)


def check_refusal(sent: Sent, response: httpx.Response) -> None:
    """An error in the form of the route's API, that names what is wrong where we refuse it."""
    assert response.status_code in (400, 404, 413, 415, 422), response.status_code
    body = body_of(sent)
    answer = response.json()
    if body is UNREADABLE and set(answer) == {"detail"}:
        return  # The web framework's own answer to bytes that it cannot read.
    error = answer["error"]
    text = f"{error.get('param')} {error['message']}"
    assert error["message"]
    assert len(response.content) < 20_000, "an error that repeats its request"
    if not isinstance(body, dict) or response.status_code == 404:
        return
    ours = FIELD in text or "vllm_xargs" in text
    if sent.route == MESSAGES and ours and "validation error" not in text:
        assert answer["type"] == "error"
        assert set(error) == {"type", "message"}
    else:
        assert set(error) <= {"message", "type", "param", "code"}
    # Of a request that is good but for the field, nothing else may be blamed.
    known = {*body, "body", "prompt", "completion"} if sent.blamable is None else sent.blamable
    # Media type and a model's name that is no Unicode are refused by vLLM, which names no field.
    if sent.headers.get("content-type") is None and body.get("model") == "m":
        assert any(name in text for name in known), text


def attributions(sent: Sent, body: dict[str, Any], response: httpx.Response) -> list[list[Any]]:
    """The attribution objects of each choice."""
    if body.get("stream"):
        return _streamed(sent.route, response.text)
    answer = json.loads(response.text, parse_constant=_refuse_constant)
    if sent.route == ATTRIBUTIONS:
        return [[answer]]
    if sent.route == MESSAGES:
        return [_held(answer)]
    if sent.route == RESPONSES:
        return [[found for part in (answer, *answer["output"]) for found in _held(part)]]
    return [_held(choice) for choice in answer["choices"]]


def check_attribution(found: dict[str, Any], field: Any) -> None:
    """A final or queued object that is what the schema says and adds up."""
    described = AttributionObject.model_validate(found)
    deferred = isinstance(field, dict) and field.get("mode") == "deferred"
    assert described.status in (
        ("queued", "skipped") if deferred else ("completed", "failed", "skipped")
    )
    if described.status in ("failed", "skipped"):
        assert described.error is not None
        assert described.error.message
        assert described.error.code != "internal_error", described.error.message
    if described.status == "completed":
        several = isinstance(field, dict) and _has_targets(field)
        assert several == (described.targets is not None)
        for result in described.targets or [described]:
            scores = [score.score for score in result.scores or ()]
            assert all(math.isfinite(score) for score in scores)
            assert sum(scores) <= 1 + 1e-4
            assert result.target is not None
            assert result.target.tokens
            for start, end in result.target.tokens:
                assert 0 <= start < end


def _held(part: dict[str, Any]) -> list[Any]:
    return [part[FIELD]] if FIELD in part else []


def _streamed(route: str, text: str) -> list[list[Any]]:
    """Objects per choice in a stream, which has to be whole and free of errors."""
    lines = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    events = [
        json.loads(line, parse_constant=_refuse_constant) for line in lines if line != "[DONE]"
    ]
    assert not any("error" in event for event in events), text
    if route == MESSAGES:
        assert events[-1]["type"] == "message_stop"
        return [[event[FIELD] for event in events if event["type"] == FIELD]]
    if route == RESPONSES:
        [last] = [event["response"] for event in events if event["type"] == "response.completed"]
        return [[found for part in (last, *last["output"]) for found in _held(part)]]
    assert route in (CHAT, COMPLETIONS)
    assert lines[-1] == "[DONE]"
    found: dict[int, list[Any]] = {}
    for event in events:
        for choice in event["choices"]:
            held = found.setdefault(choice["index"], [])
            held += _held(choice.get("delta") or {}) + _held(choice)
    return list(found.values())


def _refuse_constant(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")


def _has_targets(field: dict[str, Any]) -> bool:
    """Whether several parts are explained: citations and the guard ask for it by themselves."""
    if "targets" in field:
        return field["targets"] is not None
    asked = any(field.get(name) not in (None, False) for name in ("citations", "guard"))
    return asked and "target" not in field
