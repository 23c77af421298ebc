"""Cuts an answer into the parts that are explained one by one.

A part is a range of the visible text. ``"sentences"`` and ``"lines"`` partition the answer.
``"claims"`` are what a reader would check one by one: the values of a JSON answer, the items of a
list and sentences elsewhere, and the arguments of the tool calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from vllm_flashtrace.base.records import Span
from vllm_flashtrace.text.call_formats import WrittenCall
from vllm_flashtrace.text.sentences import sentence_spans


@dataclass(frozen=True, slots=True)
class AnswerPart:
    """A part of the visible text.

    Attributes:
        span: Its characters, without blanks at either end.
        path: Where its value stands in a JSON answer, as ``$.sources[0].title``.
        tool_call: Index of the tool call that it is an argument of.
        argument: Name of that argument.
    """

    span: Span
    path: str | None = None
    tool_call: int | None = None
    argument: str | None = None


def answer_parts(
    kind: str, text: str, answer: Span, calls: list[WrittenCall] | None = None
) -> list[AnswerPart]:
    """The parts of an answer, in the order of the text.

    Args:
        kind: ``"sentences"``, ``"lines"`` or ``"claims"``.
        text: The visible text.
        answer: Its characters that are the answer: for ``"claims"`` without tool calls.
        calls: The tool calls that the client gets; for ``"claims"``.
    """
    if kind == "lines":
        return [AnswerPart(span) for span in _lines(text, answer)]
    if kind == "sentences":
        return [AnswerPart(span) for span in _sentences(text, answer)]
    parts = _json_values(text, answer)
    if parts is None:
        parts = [AnswerPart(span) for span in _claims(text, answer)]
    for index, call in enumerate(calls or ()):
        for name, span in call.values.items():
            if trimmed := _trimmed(text, span):
                parts.append(AnswerPart(trimmed, tool_call=index, argument=name))
    return parts


def _sentences(text: str, span: Span) -> list[Span]:
    start, end = span
    found = [(start + first, start + last) for first, last in sentence_spans(text[start:end])]
    return [trimmed for each in found if (trimmed := _trimmed(text, each))]


def _lines(text: str, span: Span) -> list[Span]:
    start, end = span
    ends = [match.end() for match in re.finditer(r"\n", text[start:end])]
    edges = [start, *(start + at for at in ends), end]
    return [trimmed for each in pairwise(edges) if (trimmed := _trimmed(text, each))]


_ITEM = re.compile(r"(?:[-*+\u2022\u2013]|\(?\d{1,3}[.)]|\(?[a-zA-Z][.)])\s+")
_FENCE = re.compile(r"(?:```|~~~)[^\n]*")
# Letters or digits of any script: rules, brackets and fences alone claim nothing.
_SAYS = re.compile(r"\w")


def _claims(text: str, span: Span) -> Iterator[Span]:
    """Items of lists without their markers, blocks of code as a whole, and sentences elsewhere."""
    fence: str | None = None
    block: Span | None = None
    for start, end in _lines(text, span):
        line = text[start:end]
        opening = _FENCE.match(line)
        if fence is not None:
            if line.startswith(fence):
                fence = None
                if block is not None:
                    yield block
                block = None
            else:
                block = (start if block is None else block[0], end)
        elif opening is not None:
            fence = line[:3]
        elif (item := _ITEM.match(line)) is not None:
            if _SAYS.search(line, item.end()):
                yield start + item.end(), end
        else:
            yield from (s for s in _sentences(text, (start, end)) if _SAYS.search(text, *s))
    if block is not None:
        yield block


_CODE_BLOCK = re.compile(r"\s*```(?:json)?\s*\n(.*?)\n\s*```\s*", re.DOTALL | re.IGNORECASE)
_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+')


def _json_values(text: str, span: Span) -> list[AnswerPart] | None:
    """The values of an answer that is a JSON object or list; None if it is not."""
    start, end = span
    block = _CODE_BLOCK.fullmatch(text, start, end)
    if block is not None:
        start, end = block.span(1)
    try:
        document = json.loads(text[start:end])
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, (dict, list)):
        return None
    parts: list[AnswerPart] = []
    # The text is known to be JSON, so a string in front of a colon is a key.
    path: list[Any] = []
    tokens = list(_JSON_TOKEN.finditer(text, start, end))
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        written = token.group()
        if written in "{[":
            path.append(0 if written == "[" else None)
        elif written in "}]":
            path.pop()
        elif written == ",":
            if isinstance(path[-1], int):
                path[-1] += 1
        elif written == ":":
            continue
        elif following is not None and following.group() == ":":
            path[-1] = json.loads(written)
        elif len(value := written.strip('"')) and _SAYS.search(value):
            quoted = written.startswith('"')
            inside = (token.start() + quoted, token.end() - quoted)
            parts.append(AnswerPart(_trimmed(text, inside) or inside, path=_json_path(path)))
    return parts


def _json_path(path: list[Any]) -> str:
    names = [
        f"[{key}]" if isinstance(key, int)
        else f".{key}" if re.fullmatch(r"[A-Za-z_]\w*", key)
        else f"[{json.dumps(key, ensure_ascii=False)}]"
        for key in path
    ]  # fmt: skip
    return "$" + "".join(names)


def _trimmed(text: str, span: Span) -> Span | None:
    """The range without blanks at either end; None if nothing is left."""
    part = text[slice(*span)]
    inner = part.strip()
    start = span[0] + len(part) - len(part.lstrip())
    return (start, start + len(inner)) if inner else None
