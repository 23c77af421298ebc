"""Tool calls written as a list of Python calls, with the place of every argument.

Invariant: only literals are read, nothing is evaluated, and every position counts characters of
the given text although Python's own count bytes of a line.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import Any

from vllm_flashtrace.base.records import Span

_OPENING, _CLOSING = "<|python_start|>", "<|python_end|>"
# The lines that Python counts; str.splitlines knows more line breaks.
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n|\Z)")
_STRING = re.compile(r"([rRuU]?)('''|\"\"\"|'|\")(.*)\2", re.DOTALL)
_JSON_NAMES = {"null": None, "true": True, "false": False}


@dataclass(frozen=True, slots=True)
class PythonicCall:
    """One call: its name, its span, the values of its keyword arguments and where they lie."""

    name: str
    span: Span
    arguments: dict[str, Any]
    values: dict[str, Span]


def read_pythonic(text: str, begin: int) -> list[PythonicCall] | None:
    """Reads a list of calls that the text from `begin` on consists of.

    Returns:
        None where the text is anything else, or an argument is no literal.
    """
    start = begin + len(text[begin:]) - len(text[begin:].lstrip())
    if text.startswith(_OPENING, start):
        start += len(_OPENING)
    if not text.startswith("[", start):
        return None
    closing = text.find(_CLOSING, start)
    source = text[start : closing if closing >= 0 else len(text)]
    try:
        body = ast.parse(source).body
        value = body[0].value if len(body) == 1 and isinstance(body[0], ast.Expr) else None
        if not isinstance(value, ast.List):
            return None
        place = _Places(source, start)
        return [_call(node, place) for node in value.elts]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


class _Places:
    """Turns Python's lines and byte columns into characters of the whole text."""

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


def _call(node: ast.expr, places: _Places) -> PythonicCall:
    if not isinstance(node, ast.Call):
        raise ValueError("not a call")
    arguments: dict[str, Any] = {}
    values: dict[str, Span] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError("arguments that are unpacked have no names")
        arguments[keyword.arg] = _literal(keyword.value)
        values[keyword.arg] = places.value(keyword.value)
    return PythonicCall(ast.unparse(node.func), places.span(node), arguments, values)


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
