"""Finds the client's texts in the decoded prompt.

Two ways. Rendering the messages with marks around their texts, which are characters of a
private-use plane, tells where each text went if the rendering without the marks is the prompt.
Where that is not possible, a text is located only if the order of all texts leaves it one place in
the prompt. A place is either certain or absent.
"""

from __future__ import annotations

import copy
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm_flashtrace.base.logs import logger
from vllm_flashtrace.base.records import Span
from vllm_flashtrace.text.tool_calls import call_arguments

_MARK_BASE = 0xF0000
_MARKS = 0xFFFE
_MARK = re.compile(f"[{chr(_MARK_BASE)}-{chr(_MARK_BASE + _MARKS - 1)}]")
_REASONING_FIELDS = ("reasoning_content", "reasoning")
_ROLE_NAMES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})

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


def _with_marks(
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
        opening, closing = chr(_MARK_BASE + 2 * index), chr(_MARK_BASE + 2 * index + 1)
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


def forced_positions(text: str, wanted: Sequence[str]) -> list[int | None]:
    """Finds texts that occur in order.

    The earliest arrangement puts every text as far left as the ones before it allow, the latest as
    far right as the ones after it allow; where they agree, there is no choice. Where no arrangement
    exists, the order is no evidence, and only texts that occur once and are wanted once are placed.

    Args:
        text: Text to search.
        wanted: Non-empty texts, in order.

    Returns:
        For each wanted text the position of its first character, or None.
    """
    earliest = _earliest(text, wanted)
    if earliest is not None:
        mirrored = _earliest(text[::-1], [item[::-1] for item in reversed(wanted)]) or []
        latest = [
            len(text) - at - len(item) for at, item in zip(reversed(mirrored), wanted, strict=True)
        ]
        return [a if a == b else None for a, b in zip(earliest, latest, strict=True)]
    return [
        text.find(item)
        if 0 <= text.find(item) == text.rfind(item) and sum(item in other for other in wanted) == 1
        else None
        for item in wanted
    ]


def _earliest(text: str, wanted: Sequence[str]) -> list[int] | None:
    """Leftmost arrangement, or None if there is none."""
    positions: list[int] = []
    cursor = 0
    for item in wanted:
        at = text.find(item, cursor)
        if at < 0:
            return None
        positions.append(at)
        cursor = at + len(item)
    return positions


@dataclass(frozen=True, slots=True)
class LocatedText:
    """A client's text found in the prompt.

    Attributes:
        source: The text.
        start: First character in the decoded prompt.
        end: One past the last character.
        offset: Where ``start`` lies in the client's text.
        escapes: Where the template writes the text with JSON's escapes: for every character
            written, the client's one.
    """

    source: MessageText
    start: int
    end: int
    offset: int = 0
    escapes: Sequence[int] | None = None

    def original(self, start: int, end: int) -> Span:
        """The client's characters behind ``[start, end)`` of the prompt, as far as placed."""
        start, end = max(start, self.start), min(end, self.end)
        shift = self.offset - self.start
        if self.escapes is None:
            return start + shift, end + shift
        return self.escapes[start + shift], self.escapes[end - 1 + shift] + 1


@dataclass(frozen=True, slots=True)
class LocatedTexts:
    """The texts whose place is known, and the messages that have a text whose place is not."""

    texts: list[LocatedText]
    unlocated: frozenset[int]


def locate_by_marks(
    messages: Sequence[Mapping[str, Any]], prompt: str, render: Render | None
) -> LocatedTexts | None:
    """Locates texts by marks in a rendering; None unless one gives the prompt without them."""
    if render is None or _MARK.search(prompt):
        return None
    plain = message_texts(messages)
    with_tool_calls = message_texts(messages, tool_calls=True)
    # Marks around blanks locate these too, but stop a template from stripping them. Marks in tool
    # calls may disturb a template that takes these apart.
    for sources in (with_tool_calls, plain) if with_tool_calls != plain else (plain,):
        unmarked = {source.message for source in with_tool_calls if source not in sources}
        stripped = any(source.text != source.text.strip() for source in sources)
        for around_blanks in (True, False) if stripped else (True,):
            marked = _with_marks(messages, sources, around_blanks=around_blanks)
            rendered = None if marked is None else _rendered(render, marked)
            found = None if rendered is None else _read_marks(rendered, sources, prompt)
            if found is not None:
                return replace(found, unlocated=found.unlocated | unmarked)
    return None


def _rendered(render: Render, messages: Sequence[Mapping[str, Any]]) -> str | None:
    """The rendering; None where the template, which may be anybody's code, rejects the marks."""
    try:
        return render(messages)
    except Exception as error:
        logger.debug("The chat template does not render marked messages: %s", error)
        return None


def _read_marks(rendered: str, sources: Sequence[MessageText], prompt: str) -> LocatedTexts | None:
    """Locates the texts, if the rendering without marks is the prompt.

    A text that the template left out has no place; one that it took apart or repeated has none that
    is known.
    """
    plain = _MARK.sub("", rendered)
    marks: dict[int, list[int]] = defaultdict(list)
    for earlier, mark in enumerate(_MARK.finditer(rendered)):
        marks[ord(mark.group()) - _MARK_BASE].append(mark.start() - earlier)
    shift = prompt_offset(prompt, plain)
    if shift is None or not marks:
        return None
    located: list[LocatedText] = []
    unlocated: set[int] = set()
    for index, source in enumerate(sources):
        starts, ends = marks[2 * index], marks[2 * index + 1]
        inside = plain[starts[0] : ends[0]] if len(starts) == len(ends) == 1 else ""
        escapes = _escapes(source, inside)
        if (
            escapes
            or inside in (source.text, source.text.strip())
            or (inside and not source.is_content)
        ):
            offset = 0 if escapes else max(0, source.text.find(inside))
            text = LocatedText(source, starts[0] + shift, ends[0] + shift, offset, escapes)
            located.append(clipped(text, len(prompt)))
        elif starts or ends:
            unlocated.add(source.message)
    return LocatedTexts([text for text in located if text.start < text.end], frozenset(unlocated))


def _escapes(source: MessageText, written: str) -> list[int] | None:
    """Origin of every character of a content that is written with JSON's escapes, and only then."""
    if not source.is_content or "\\" not in written:
        return None
    for ensure_ascii in (False, True):
        escaped = [json.dumps(char, ensure_ascii=ensure_ascii)[1:-1] for char in source.text]
        if "".join(escaped) == written:
            return [i for i, characters in enumerate(escaped) for _ in characters]
    return None


def prompt_offset(prompt: str, text: str) -> int | None:
    """Offset of `text` in `prompt` if the prompt is the text behind special tokens.

    The tokenizer may put a token in front or drop leading blanks; a truncated prompt is the end of
    its text, which gives a negative offset.
    """
    bare = text.lstrip(" ")
    for known in (text, bare):
        front = len(prompt) - len(known)
        if known and prompt.endswith(known) and _is_special(prompt[:front]):
            return front - (len(text) - len(known))
    if prompt and text.endswith(prompt):
        return len(prompt) - len(text)
    return None


def _is_special(text: str) -> bool:
    """Whether a text can be what a tokenizer adds in front: nothing, or one bracketed token."""
    text = text.strip()
    return not text or (text[0] in "<[" and text[-1] in ">]" and not any(map(str.isspace, text)))


def clipped(text: LocatedText, length: int) -> LocatedText:
    """The part of a text that lies within the prompt."""
    start, end = max(text.start, 0), min(text.end, length)
    return replace(text, start=start, end=end, offset=text.offset + start - text.start)


def locate_by_order(sources: Sequence[MessageText], prompt: str) -> LocatedTexts:
    """Locates those contents that have one possible place, given their order."""
    wanted: list[LocatedText] = []
    for source in sources:
        if not source.is_content:
            continue
        text = source.text if source.text in prompt else source.text.strip()
        # A role name is likely to be found in the template instead.
        if text.strip() and text in prompt and text.strip() not in _ROLE_NAMES:
            wanted.append(LocatedText(source, 0, len(text), source.text.find(text)))
    contents = [one.source.text[one.offset : one.offset + one.end] for one in wanted]
    positions = forced_positions(prompt, contents)
    located = [
        replace(one, start=at, end=at + one.end)
        for one, at in zip(wanted, positions, strict=True)
        if at is not None and _stands_alone(prompt, at, at + one.end)
    ]
    known = {(one.source.message, one.source.part) for one in located}
    return LocatedTexts(
        located,
        frozenset(
            source.message
            for source in sources
            if source.text.strip()
            and (not source.is_content or (source.message, source.part) not in known)
        ),
    )


def _stands_alone(prompt: str, start: int, end: int) -> bool:
    """Whether a text is not a part of a longer word, where it is likely to be another's."""
    before, after = prompt[max(0, start - 1) : start + 1], prompt[end - 1 : end + 1]
    return not any(len(edge) == 2 and edge.isalnum() for edge in (before, after))
