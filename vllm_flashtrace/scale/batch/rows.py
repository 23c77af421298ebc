"""Rows of a batch: what a reader makes of one line or record, before any engine sees it.

Invariant: a row is either a request that the server routes take, or an error that says which field
is at fault; nothing that a client wrote is dropped silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_flashtrace.api.json_checks import check_messages, check_text, is_unicode
from vllm_flashtrace.base.errors import FlashTraceError, InvalidRequestError

CHAT, COMPLETIONS, ATTRIBUTIONS = "/v1/chat/completions", "/v1/completions", "/v1/attributions"
ROUTES = (CHAT, COMPLETIONS, ATTRIBUTIONS)
_BATCH_KEYS = frozenset({"custom_id", "method", "url", "body"})
_ROW_KEYS = frozenset({"custom_id", "messages", "prompt", "completion"})
_LONGEST_ID = 512


class RowError(FlashTraceError):
    """A row that no engine can answer."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """What rows get that say nothing themselves.

    Attributes:
        flashtrace: The ``flashtrace`` field.
        max_tokens: Most tokens to generate; None leaves vLLM's own default.
    """

    flashtrace: Any = True
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One request to a route of the server."""

    url: str
    body: dict[str, Any]


def custom_id_of(value: Any) -> str | None:
    """The row's own id; None where it has none, or none that can be used."""
    custom_id = value.get("custom_id") if isinstance(value, Mapping) else None
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _LONGEST_ID:
        return None
    return custom_id if is_unicode(custom_id) else None


def request_of(value: Any, defaults: Defaults) -> Request:
    """The request in one decoded row.

    Args:
        value: An OpenAI batch row (``custom_id``, ``method``, ``url``, ``body``), or a plain row
            with ``messages`` or ``prompt``, perhaps ``completion`` (text to explain), and any field
            of the route's body.
        defaults: What the row gets where it says nothing.

    Raises:
        RowError: Naming the field at fault.
    """
    if not isinstance(value, Mapping):
        raise RowError("invalid_row", f"a row is a JSON object, got {type(value).__name__}")
    if value.get("custom_id") is not None and custom_id_of(value) is None:
        raise _bad("custom_id", f"must be a text of 1 to {_LONGEST_ID} characters")
    request = _batch_request(value) if _BATCH_KEYS & {*value} - {"custom_id"} else _plain(value)
    _check_body(request)
    return _with_defaults(request, defaults)


def _batch_request(value: Mapping[str, Any]) -> Request:
    for name in sorted({*value} - _BATCH_KEYS):
        raise _bad(name, f"is no field of a batch row ({', '.join(sorted(_BATCH_KEYS))})")
    if value.get("method", "POST") != "POST":
        raise _bad("method", "must be POST")
    url, body = value.get("url"), value.get("body")
    if url not in ROUTES:
        raise _bad("url", f"must be one of {', '.join(ROUTES)}")
    if not isinstance(body, Mapping):
        raise _bad("body", "must be an object")
    return Request(str(url), dict(body))


def _plain(value: Mapping[str, Any]) -> Request:
    options = {name: option for name, option in value.items() if name not in _ROW_KEYS}
    messages, prompt, completion = (value.get(k) for k in ("messages", "prompt", "completion"))
    if (messages is None) == (prompt is None):
        raise _bad("messages", "or prompt is needed, and not both")
    if messages is None:
        if completion is None:
            return Request(COMPLETIONS, {"prompt": prompt, **options})
        return Request(ATTRIBUTIONS, {"prompt": prompt, "completion": completion, **options})
    if not isinstance(messages, list):
        raise _bad("messages", "must be a list")
    if completion is None:
        return Request(CHAT, {"messages": messages, **options})
    if not isinstance(completion, str):
        raise _bad("completion", "of messages must be a text")
    answered = [*messages, {"role": "assistant", "content": completion}]
    return Request(ATTRIBUTIONS, {"messages": answered, **options})


def _check_body(request: Request) -> None:
    body = request.body
    for name in ("stream", "stream_options"):
        if body.get(name):
            raise _bad(name, "has no place in a batch")
    field = body.get("flashtrace")
    if isinstance(field, Mapping) and field.get("mode", "inline") != "inline":
        raise _bad("flashtrace.mode", "must be inline in a batch")
    try:
        check_text(body, "body")
        messages = body.get("messages")
        check_messages(messages if isinstance(messages, list) else (), "messages")
    except InvalidRequestError as error:
        raise RowError("invalid_row", error.message) from None


def _with_defaults(request: Request, defaults: Defaults) -> Request:
    body = dict(request.body)
    if body.get("flashtrace") is None:
        body["flashtrace"] = defaults.flashtrace
    sized = any(body.get(name) is not None for name in ("max_tokens", "max_completion_tokens"))
    if request.url != ATTRIBUTIONS and defaults.max_tokens is not None and not sized:
        body["max_tokens"] = defaults.max_tokens
    return Request(request.url, body)


def _bad(field: str, phrase: str) -> RowError:
    return RowError("invalid_row", f"{field} {phrase}")
