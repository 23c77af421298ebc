"""The forms in which models write tool calls, read with the place of every part.

Invariant: a reader either accounts for every call that its form has in the text or gives None, and
it never decides alone: what it read counts only where the server's own parser read the same.

Each reader takes the text and the character at which the reading begins. They are linear in the
text but for the bare form, whose failed attempts are counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from vllm_flashtrace.base.records import Span
from vllm_flashtrace.text.json_spans import (
    elements,
    inner_span,
    members,
    read_value,
    skip_blanks,
)
from vllm_flashtrace.text.pythonic_calls import PythonicCall, read_pythonic

_MAX_FAILURES = 256
_TAG = "<tool_call>"
_BOT = "[TOOL_CALLS]"
_ARGS = "[ARGS]"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_NAME_KEY = "name"
_ARGUMENT_KEYS = ("arguments", "parameters")
_OBJECT = re.compile(r"\{|\[\s*\{")


@dataclass(frozen=True, slots=True)
class WrittenCall:
    """One tool call as it stands in the text.

    Attributes:
        name: The function's name.
        span: The whole call, from its name or the brace around it to the end of its arguments;
            the markers that a format puts around calls are left out.
        arguments: The arguments as read.
        values: Where each argument's value lies; a text without its quotes.
    """

    name: str
    span: Span
    arguments: Any
    values: dict[str, Span] = field(default_factory=dict)


Reader = Callable[[str, int], list[WrittenCall] | None]


def read_tagged(text: str, begin: int) -> list[WrittenCall] | None:
    """Objects with a name and arguments, each behind ``<tool_call>`` (Hermes, Qwen)."""
    calls: list[WrittenCall] = []
    at = text.find(_TAG, begin)
    while at >= 0:
        start = skip_blanks(text, at + len(_TAG))
        call = _object_call(text, start)
        if call is None:
            return None
        calls.append(call)
        at = text.find(_TAG, call.span[1])
    return calls


def read_bare(text: str, begin: int) -> list[WrittenCall] | None:
    """Objects with a name and arguments, bare or in an array (Llama, older Mistral, required)."""
    calls: list[WrittenCall] = []
    failures = 0
    found = _OBJECT.search(text, begin)
    while found is not None:
        read = _calls_at(text, found.start())
        if read is None:
            failures += 1
            if failures > _MAX_FAILURES:
                return None
            end = found.start() + 1
        else:
            in_value, end = read
            calls += in_value
        found = _OBJECT.search(text, end)
    return calls


def read_named(text: str, begin: int) -> list[WrittenCall] | None:
    """A name and an object of arguments behind ``[TOOL_CALLS]`` (Mistral)."""
    calls: list[WrittenCall] = []
    at = text.find(_BOT, begin)
    while at >= 0:
        name_at = skip_blanks(text, at + len(_BOT))
        brace = text.find("{", name_at)
        if brace < 0:
            return None
        name = text[name_at:brace].rstrip()
        arguments, end = _value_or_none(text, brace)
        if end < 0:
            return None
        calls.append(
            WrittenCall(
                name.removesuffix(_ARGS).strip(),
                (name_at, end),
                arguments,
                _values(text, brace, arguments),
            )
        )
        at = text.find(_BOT, end)
    return calls


def read_xml(text: str, begin: int) -> list[WrittenCall] | None:
    """``<function=…>`` elements with one ``<parameter=…>`` each argument (Qwen3 Coder)."""
    calls: list[WrittenCall] = []
    at = text.find(_FUNCTION, begin)
    while at >= 0:
        name_end = text.find(">", at)
        end = text.find(_FUNCTION_END, name_end)
        if name_end < 0 or end < 0:
            return None
        values = dict(_parameters(text, name_end + 1, end))
        calls.append(
            WrittenCall(
                text[at + len(_FUNCTION) : name_end].strip(),
                (at, end + len(_FUNCTION_END)),
                {key: text[slice(*span)] for key, span in values.items()},
                values,
            )
        )
        at = text.find(_FUNCTION, end)
    return calls


def read_python(text: str, begin: int) -> list[WrittenCall] | None:
    """A list of Python calls (Llama 3.2 and 4)."""
    calls = read_pythonic(text, begin)
    return None if calls is None else [_from_python(call) for call in calls]


def read_arguments(text: str, begin: int, name: str) -> list[WrittenCall] | None:
    """Arguments alone, where the request named the function to call."""
    start = skip_blanks(text, begin)
    arguments, end = _value_or_none(text, start)
    if end < 0 or text[end:].strip():
        return None
    return [WrittenCall(name, (start, end), arguments, _values(text, start, arguments))]


READERS: tuple[Reader, ...] = (read_tagged, read_bare, read_named, read_xml, read_python)


def _value_or_none(text: str, start: int) -> tuple[Any, int]:
    """A JSON value and its end; an end of -1 where there is none."""
    try:
        return read_value(text, start)
    except ValueError:
        return None, -1


def _calls_at(text: str, start: int) -> tuple[list[WrittenCall], int] | None:
    """The calls in the JSON value at `start` and its end; None if it holds anything else."""
    if text[start] == "{":
        call = _object_call(text, start)
        return None if call is None else ([call], call.span[1])
    value, end = _value_or_none(text, start)
    if end < 0 or not all(_is_call(item) for item in value):
        return None
    calls = [_written(text, span[0], span[1], item) for item, span in elements(text, start)]
    return calls, end


def _object_call(text: str, start: int) -> WrittenCall | None:
    value, end = _value_or_none(text, start)
    return _written(text, start, end, value) if _is_call(value) else None


def _is_call(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get(_NAME_KEY), str)
        and any(key in value for key in _ARGUMENT_KEYS)
    )


def _written(text: str, start: int, end: int, value: dict[str, Any]) -> WrittenCall:
    key = next(key for key in _ARGUMENT_KEYS if key in value)
    at, _ = members(text, start)[key]
    return WrittenCall(value[_NAME_KEY], (start, end), value[key], _values(text, at, value[key]))


def _values(text: str, start: int, arguments: Any) -> dict[str, Span]:
    if not isinstance(arguments, dict):
        return {}
    return {key: inner_span(text, span) for key, span in members(text, start).items()}


def _parameters(text: str, start: int, end: int) -> Iterator[tuple[str, Span]]:
    """Names and values of the parameters; one line break at either end belongs to the markup."""
    at = text.find(_PARAMETER, start, end)
    while at >= 0:
        value_at = text.find(">", at, end) + 1
        if value_at == 0:
            return
        following = text.find(_PARAMETER, value_at, end)
        closing = text.find(_PARAMETER_END, value_at, end)
        ends = [position for position in (following, closing) if position >= 0]
        if not ends:
            return
        name = text[at + len(_PARAMETER) : value_at - 1]
        yield name, _without_line_breaks(text, value_at, min(ends))
        at = following


def _without_line_breaks(text: str, start: int, end: int) -> Span:
    if start < end and text[start] == "\n":
        start += 1
    if start < end and text[end - 1] == "\n":
        end -= 1
    return start, end


def _from_python(call: PythonicCall) -> WrittenCall:
    return WrittenCall(call.name, call.span, call.arguments, call.values)
