"""Marks around the client's texts, to find these again in a rendered prompt.

Invariant: every mark is one character of a private-use plane that names its text, and taking the
marks out gives the client's messages back unchanged.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_flashtrace.text.tool_calls import call_arguments

MARK_BASE = 0xF0000
_MARKS = 0xFFFE
MARK = re.compile(f"[{chr(MARK_BASE)}-{chr(MARK_BASE + _MARKS - 1)}]")
_REASONING_FIELDS = ("reasoning_content", "reasoning")

Render = Callable[[Sequence[Mapping[str, Any]]], str | None]


@dataclass(frozen=True, slots=True)
class MessageText:
    """One text of a message.

    Attributes:
        message: Index of the message.
        part: Index of the content part, None where the content is one string.
        text: The text.
        path: Where it stands in the message.
        is_content: Whether it belongs to ``content``, not to a tool call or earlier reasoning.
    """

    message: int
    part: int | None
    text: str
    path: tuple[str | int, ...] = ("content",)
    is_content: bool = True

    @property
    def tool_call(self) -> int | None:
        """Index of the tool call that it belongs to, if any."""
        return int(self.path[1]) if self.path[0] == "tool_calls" else None


def message_texts(
    messages: Sequence[Mapping[str, Any]], *, tool_calls: bool = False
) -> list[MessageText]:
    """The texts of a conversation that are not blank, in order.

    Args:
        messages: Chat messages in OpenAI's form.
        tool_calls: Also the function names and string arguments of tool calls.
    """
    texts: list[MessageText] = []
    for index, message in enumerate(messages):
        for name in _REASONING_FIELDS:
            if isinstance(text := message.get(name), str):
                texts.append(MessageText(index, None, text, (name,), is_content=False))
        content = message.get("content")
        if isinstance(content, str):
            texts.append(MessageText(index, None, content))
        elif isinstance(content, Sequence):
            for part, item in enumerate(content):
                if isinstance(item, Mapping) and isinstance(text := item.get("text"), str):
                    texts.append(MessageText(index, part, text, ("content", part, "text")))
        if tool_calls:
            texts += _tool_call_texts(index, message)
    return [text for text in texts if text.text.strip()]


def marked_messages(
    messages: Sequence[Mapping[str, Any]], texts: Sequence[MessageText], *, around_blanks: bool
) -> list[dict[str, Any]] | None:
    """A copy of the messages with two marks around each text; None if there are too many texts.

    Args:
        messages: The messages.
        texts: Their texts; text number ``i`` gets marks ``2i`` and ``2i + 1``.
        around_blanks: Whether the marks include leading and trailing blanks of the text.
    """
    if 2 * len(texts) > _MARKS:
        return None
    marked = [copy.deepcopy(dict(message)) for message in messages]
    for index, text in enumerate(texts):
        inner = text.text if around_blanks else text.text.strip()
        before, after = text.text.split(inner, 1)
        opening, closing = chr(MARK_BASE + 2 * index), chr(MARK_BASE + 2 * index + 1)
        _replace(marked[text.message], text.path, f"{before}{opening}{inner}{closing}{after}")
    return marked


def _tool_call_texts(index: int, message: Mapping[str, Any]) -> Iterator[MessageText]:
    calls = message.get("tool_calls")
    for number, call in enumerate(calls if isinstance(calls, Sequence) else ()):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            continue
        path = ("tool_calls", number, "function")
        if isinstance(name := function.get("name"), str):
            yield MessageText(index, None, name, (*path, "name"), is_content=False)
        for key, value in call_arguments(function.get("arguments")).items():
            if isinstance(value, str):
                yield MessageText(index, None, value, (*path, "arguments", key), is_content=False)


def _replace(message: dict[str, Any], path: tuple[str | int, ...], text: str) -> None:
    """Sets the text at a path."""
    node: Any = message
    for step, key in enumerate(path[:-1]):
        if key == "arguments" and isinstance(node[key], str):
            arguments = json.loads(node[key])
            arguments[path[step + 1]] = text
            node[key] = json.dumps(arguments, ensure_ascii=False)
            return
        node = node[key]
    node[path[-1]] = text
