"""Where the parts of a JSON text lie.

Invariant: a span is what the standard library's decoder read as that value, so reading it again
gives the same value.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from vllm_flashtrace.base.records import Span

_DECODER = json.JSONDecoder()
_BLANKS = " \t\n\r"


def read_value(text: str, start: int) -> tuple[Any, int]:
    """Reads one JSON value that begins at `start`; returns it and its end.

    Raises:
        ValueError: There is none, or it is nested too deeply.
    """
    try:
        value, end = _DECODER.raw_decode(text, start)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value, int(end)


def skip_blanks(text: str, start: int) -> int:
    """The first character from `start` on that JSON does not ignore between values."""
    while start < len(text) and text[start] in _BLANKS:
        start += 1
    return start


def members(text: str, start: int) -> dict[str, Span]:
    """Spans of an object's values by key; the last one where a key occurs again.

    Args:
        text: Text with a valid object in it.
        start: Where the object's brace stands.
    """
    spans: dict[str, Span] = {}
    at = skip_blanks(text, start + 1)
    while text[at] != "}":
        key, at = read_value(text, at)
        value_at = skip_blanks(text, skip_blanks(text, at) + 1)
        _, end = read_value(text, value_at)
        spans[key] = (value_at, end)
        at = _next_item(text, end)
    return spans


def elements(text: str, start: int) -> Iterator[tuple[Any, Span]]:
    """Values and spans of a valid array whose bracket stands at `start`."""
    at = skip_blanks(text, start + 1)
    while text[at] != "]":
        value, end = read_value(text, at)
        yield value, (at, end)
        at = _next_item(text, end)


def inner_span(text: str, span: Span) -> Span:
    """The span of a string's characters without its quotes; any other value as it is.

    An empty string keeps its quotes, since nothing else of it was written.
    """
    start, end = span
    if text[start] == '"' and end - start > 2:
        return start + 1, end - 1
    return span


def _next_item(text: str, end: int) -> int:
    at = skip_blanks(text, end)
    return skip_blanks(text, at + 1) if text[at] == "," else at
