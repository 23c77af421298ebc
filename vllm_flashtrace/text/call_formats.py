"""The forms in which models write tool calls, read with the place of every part.

A reader takes the text and the character at which reading begins. It accounts for every call that
its form has in the text, or gives None; what it read counts only where the server's own parser
read the same (:func:`~vllm_flashtrace.text.tool_calls.locate_calls`). Python calls are parsed and
never evaluated. Readers are linear in the text but for the bare form, whose failed attempts are
counted.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from vllm_flashtrace.base.records import Span


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

_MAX_FAILURES = 256
_TAG = "<tool_call>"
_BOT = "[TOOL_CALLS]"
_ARGS = "[ARGS]"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_PYTHON, _PYTHON_END = "<|python_start|>", "<|python_end|>"

_DECODER = json.JSONDecoder()
_BLANKS = " \t\n\r"
_NAME_KEY = "name"
_ARGUMENT_KEYS = ("arguments", "parameters")
_OBJECT = re.compile(r"\{|\[\s*\{")

# The lines that Python counts; str.splitlines knows more line breaks.
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n|\Z)")
_STRING = re.compile(r"([rRuU]?)('''|\"\"\"|'|\")(.*)\2", re.DOTALL)
_JSON_NAMES = {"null": None, "true": True, "false": False}


def read_tagged(text: str, begin: int) -> list[WrittenCall] | None:
    """Objects with a name and arguments, each behind ``<tool_call>`` (Hermes, Qwen)."""
    calls: list[WrittenCall] = []
    at = text.find(_TAG, begin)
    while at >= 0:
        start = _skip_blanks(text, at + len(_TAG))
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
        name_at = _skip_blanks(text, at + len(_BOT))
        brace = text.find("{", name_at)
        if brace < 0:
            return None
        name = text[name_at:brace].rstrip()
        arguments, end = _json_value(text, brace)
        if end < 0:
            return None
        calls.append(
            WrittenCall(
                name.removesuffix(_ARGS).strip(),
                (name_at, end),
                arguments,
                _argument_spans(text, brace, arguments),
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
    """A list of Python calls with literals as arguments, and nothing else (Llama 3.2 and 4)."""
    start = begin + len(text[begin:]) - len(text[begin:].lstrip())
    if text.startswith(_PYTHON, start):
        start += len(_PYTHON)
    if not text.startswith("[", start):
        return None
    closing = text.find(_PYTHON_END, start)
    source = text[start : closing if closing >= 0 else len(text)]
    try:
        body = ast.parse(source).body
        value = body[0].value if len(body) == 1 and isinstance(body[0], ast.Expr) else None
        if not isinstance(value, ast.List):
            return None
        place = _PythonPlaces(source, start)
        return [_python_call(node, place) for node in value.elts]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def read_arguments(text: str, begin: int, name: str) -> list[WrittenCall] | None:
    """Arguments alone, where the request named the function to call."""
    start = _skip_blanks(text, begin)
    arguments, end = _json_value(text, start)
    if end < 0 or text[end:].strip():
        return None
    return [WrittenCall(name, (start, end), arguments, _argument_spans(text, start, arguments))]


READERS: tuple[Reader, ...] = (read_tagged, read_bare, read_named, read_xml, read_python)


def _json_value(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at `start` and its end; an end of -1 where there is none."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None, -1
    return value, int(end)


def _skip_blanks(text: str, start: int) -> int:
    """The first character from `start` on that JSON does not ignore between values."""
    while start < len(text) and text[start] in _BLANKS:
        start += 1
    return start


def _json_members(text: str, start: int) -> dict[str, Span]:
    """Spans of an object's values by key; the last one where a key occurs again.

    Args:
        text: Text with a valid object in it.
        start: Where the object's brace stands.
    """
    spans: dict[str, Span] = {}
    at = _skip_blanks(text, start + 1)
    while text[at] != "}":
        key, at = _DECODER.raw_decode(text, at)
        value_at = _skip_blanks(text, _skip_blanks(text, at) + 1)
        _, end = _DECODER.raw_decode(text, value_at)
        spans[key] = (value_at, end)
        at = _next_json_item(text, end)
    return spans


def _json_elements(text: str, start: int) -> Iterator[tuple[Any, Span]]:
    """Values and spans of a valid array whose bracket stands at `start`."""
    at = _skip_blanks(text, start + 1)
    while text[at] != "]":
        value, end = _DECODER.raw_decode(text, at)
        yield value, (at, end)
        at = _next_json_item(text, end)


def _without_quotes(text: str, span: Span) -> Span:
    """The span of a string's characters without its quotes; any other value as it is.

    An empty string keeps its quotes, since nothing else of it was written.
    """
    start, end = span
    if text[start] == '"' and end - start > 2:
        return start + 1, end - 1
    return span


def _next_json_item(text: str, end: int) -> int:
    at = _skip_blanks(text, end)
    return _skip_blanks(text, at + 1) if text[at] == "," else at


def _calls_at(text: str, start: int) -> tuple[list[WrittenCall], int] | None:
    """The calls in the JSON value at `start` and its end; None if it holds anything else."""
    if text[start] == "{":
        call = _object_call(text, start)
        return None if call is None else ([call], call.span[1])
    value, end = _json_value(text, start)
    if end < 0 or not all(_is_call(item) for item in value):
        return None
    calls = [_written(text, span[0], span[1], item) for item, span in _json_elements(text, start)]
    return calls, end


def _object_call(text: str, start: int) -> WrittenCall | None:
    value, end = _json_value(text, start)
    return _written(text, start, end, value) if _is_call(value) else None


def _is_call(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get(_NAME_KEY), str)
        and any(key in value for key in _ARGUMENT_KEYS)
    )


def _written(text: str, start: int, end: int, value: dict[str, Any]) -> WrittenCall:
    key = next(key for key in _ARGUMENT_KEYS if key in value)
    at, _ = _json_members(text, start)[key]
    return WrittenCall(
        value[_NAME_KEY], (start, end), value[key], _argument_spans(text, at, value[key])
    )


def _argument_spans(text: str, start: int, arguments: Any) -> dict[str, Span]:
    if not isinstance(arguments, dict):
        return {}
    return {key: _without_quotes(text, span) for key, span in _json_members(text, start).items()}


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


class _PythonPlaces:
    """Turns Python's lines, and its columns in bytes, into characters of the whole text."""

    def __init__(self, source: str, offset: int) -> None:
        self._lines = [(match.start(), match.group()) for match in _LINE.finditer(source)]
        self._source = source
        self._offset = offset

    def span(self, node: ast.expr) -> Span:
        start = self._at(node.lineno, node.col_offset)
        return start, self._at(node.end_lineno or 0, node.end_col_offset or 0)

    def value(self, node: ast.expr) -> Span:
        """The span of a value; of a text, only what stands between its quotes."""
        start, end = self.span(node)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            written = self._source[start - self._offset : end - self._offset]
            quoted = _STRING.fullmatch(written)
            # Adjacent literals are one value: then there is more than one pair of quotes.
            if quoted and quoted.group(3) and quoted.group(2) not in quoted.group(3):
                return start + quoted.start(3), start + quoted.end(3)
        return start, end

    def _at(self, line: int, column: int) -> int:
        begin, content = self._lines[line - 1]
        return self._offset + begin + len(content.encode()[:column].decode())


def _python_call(node: ast.expr, places: _PythonPlaces) -> WrittenCall:
    if not isinstance(node, ast.Call):
        raise ValueError("not a call")
    arguments: dict[str, Any] = {}
    values: dict[str, Span] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError("arguments that are unpacked have no names")
        arguments[keyword.arg] = _literal(keyword.value)
        values[keyword.arg] = places.value(keyword.value)
    return WrittenCall(ast.unparse(node.func), places.span(node), arguments, values)


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id in _JSON_NAMES:
        return _JSON_NAMES[node.id]
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {
            _literal(key) if key is not None else None: _literal(value)
            for key, value in zip(node.keys, node.values, strict=True)
        }
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _literal(node.operand)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return -value if isinstance(node.op, ast.USub) else value
    raise ValueError("not a literal")
