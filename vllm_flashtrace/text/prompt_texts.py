"""Finds the client's texts in the prompt.

Two ways. Rendering the messages with marks around their texts, which are characters of a
private-use plane, tells where each text went if the rendering without the marks is what the prompt
was made from. Where that is not possible, a text is located only if the order of all texts leaves
it one place in the prompt. A place is either certain or absent.
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
from vllm_flashtrace.text.normal_forms import as_written, last_at
from vllm_flashtrace.text.offsets import TokenText
from vllm_flashtrace.text.tool_calls import call_arguments

# The private-use planes; fonts with icons have theirs in the first.
_MARK_BASES = (0x100000, 0xF0000)
_MARKS = 0xFFFE
_REASONING_FIELDS = ("reasoning_content", "reasoning")
_ROLE_NAMES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})

Render = Callable[[Sequence[Mapping[str, Any]]], str | None]
Layout = Callable[[str], tuple[TokenText, int] | None]
"""Lays the prompt's tokens over a text that they may have been made from; see `made_from`."""


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
    messages: Sequence[Mapping[str, Any]],
    texts: Sequence[MessageText],
    base: int,
    *,
    around_blanks: bool,
) -> list[dict[str, Any]] | None:
    """A copy of the messages with two marks around each text; None if there are too many texts.

    Args:
        messages: The messages.
        texts: Their texts; text number ``i`` gets marks ``2i`` and ``2i + 1``.
        base: Code point of the first mark.
        around_blanks: Whether the marks include leading and trailing blanks of the text.
    """
    if 2 * len(texts) > _MARKS:
        return None
    marked = [copy.deepcopy(dict(message)) for message in messages]
    for index, text in enumerate(texts):
        inner = text.text if around_blanks else text.text.strip()
        before, after = text.text.split(inner, 1)
        opening, closing = chr(base + 2 * index), chr(base + 2 * index + 1)
        _replace(marked[text.message], text.path, f"{before}{opening}{inner}{closing}{after}")
    return marked


def replaced_texts(
    messages: Sequence[Mapping[str, Any]], changes: Mapping[MessageText, str]
) -> list[Mapping[str, Any]]:
    """The messages with other texts in the place of some of theirs.

    Args:
        messages: The messages; those that change are copied.
        changes: What takes the place of each text.
    """
    changed: dict[int, dict[str, Any]] = {}
    for source, text in changes.items():
        message = changed.get(source.message)
        if message is None:
            message = changed[source.message] = copy.deepcopy(dict(messages[source.message]))
        _replace(message, source.path, text)
    return [changed.get(index, message) for index, message in enumerate(messages)]


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
        at
        if 0 <= (at := text.find(item)) == last_at(text, item)
        and sum(item in other for other in wanted) == 1
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
        start: First character in the prompt's text.
        end: One past the last character.
        offset: Where ``start`` lies in the client's text.
        origins: Where the prompt has the text in another form (with JSON's escapes, or normalised):
            for every character written, the client's ones.
    """

    source: MessageText
    start: int
    end: int
    offset: int = 0
    origins: Sequence[Span] | None = None

    def original(self, start: int, end: int) -> Span:
        """The client's characters behind ``[start, end)`` of the prompt, as far as placed."""
        start, end = max(start, self.start), min(end, self.end)
        shift = self.offset - self.start
        if self.origins is None:
            return start + shift, end + shift
        behind = self.origins[start + shift : end + shift]
        return min(first for first, _ in behind), max(last for _, last in behind)


@dataclass(frozen=True, slots=True)
class LocatedTexts:
    """What was found.

    Attributes:
        texts: The texts whose place is known.
        unlocated: The messages that have a text whose place is not.
        prompt: The prompt tokens over the text that the places are in.
    """

    texts: list[LocatedText]
    unlocated: frozenset[int]
    prompt: TokenText


def locate_by_marks(
    messages: Sequence[Mapping[str, Any]], render: Render, lay_over: Layout
) -> LocatedTexts | None:
    """Locates texts by marks in a rendering; None unless one without them is the prompt.

    Args:
        messages: Chat messages in OpenAI's form.
        render: Renders other messages exactly as these were rendered.
        lay_over: Lays the prompt's tokens over a rendering.
    """
    plain = message_texts(messages)
    with_tool_calls = message_texts(messages, tool_calls=True)
    base = _free_marks([source.text for source in with_tool_calls])
    if base is None:
        return None
    # Marks around blanks locate these too, but stop a template from stripping them. Marks in tool
    # calls may disturb a template that takes these apart.
    for sources in (with_tool_calls, plain) if with_tool_calls != plain else (plain,):
        unmarked = {source.message for source in with_tool_calls if source not in sources}
        stripped = any(source.text != source.text.strip() for source in sources)
        for around_blanks in (True, False) if stripped else (True,):
            marked = _with_marks(messages, sources, base, around_blanks=around_blanks)
            marked_prompt = None if marked is None else rendered(render, marked)
            if marked_prompt is None:
                continue
            found = _read_marks(marked_prompt, sources, base, lay_over)
            if found is not None:
                return replace(found, unlocated=found.unlocated | unmarked)
    return None


def _free_marks(texts: Sequence[str]) -> int | None:
    """The first code point of a plane of marks that the texts do not use."""
    for base in _MARK_BASES:
        if not any(_marks_from(base).search(text) for text in texts):
            return base
    return None


def _marks_from(base: int) -> re.Pattern[str]:
    return re.compile(f"[{chr(base)}-{chr(base + _MARKS - 1)}]")


def rendered(render: Render, messages: Sequence[Mapping[str, Any]]) -> str | None:
    """The rendering; None where the template, which may be anybody's code, rejects the messages."""
    try:
        return render(messages)
    except Exception as error:
        logger.debug("The chat template does not render the messages: %s", error)
        return None


def _read_marks(
    marked_prompt: str, sources: Sequence[MessageText], base: int, lay_over: Layout
) -> LocatedTexts | None:
    """Locates the texts, if the rendering without marks is the prompt.

    A text that the template left out has no place; one that it took apart or repeated has none that
    is known.
    """
    mark_pattern = _marks_from(base)
    plain = mark_pattern.sub("", marked_prompt)
    marks: dict[int, list[int]] = defaultdict(list)
    for earlier, mark in enumerate(mark_pattern.finditer(marked_prompt)):
        marks[ord(mark.group()) - base].append(mark.start() - earlier)
    laid = lay_over(plain) if marks else None
    if laid is None:
        return None
    prompt, shift = laid
    located: list[LocatedText] = []
    unlocated: set[int] = set()
    for index, source in enumerate(sources):
        starts, ends = marks[2 * index], marks[2 * index + 1]
        inside = plain[starts[0] : ends[0]] if len(starts) == len(ends) == 1 else ""
        origins = escapes(source, inside)
        if (
            origins
            or inside in (source.text, source.text.strip())
            or (inside and not source.is_content)
        ):
            offset = 0 if origins else max(0, source.text.find(inside))
            text = LocatedText(source, starts[0] + shift, ends[0] + shift, offset, origins)
            located.append(clipped(text, len(prompt.text)))
        elif starts or ends:
            unlocated.add(source.message)
    shown = [text for text in located if text.start < text.end]
    return LocatedTexts(shown, frozenset(unlocated), prompt)


def escapes(source: MessageText, written: str) -> list[Span] | None:
    """Origin of every character of a content that is written with JSON's escapes, and only then."""
    if not source.is_content or "\\" not in written:
        return None
    for ensure_ascii in (False, True):
        escaped = [json.dumps(char, ensure_ascii=ensure_ascii)[1:-1] for char in source.text]
        if "".join(escaped) == written:
            return [(i, i + 1) for i, characters in enumerate(escaped) for _ in characters]
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


def locate_by_order(
    sources: Sequence[MessageText], prompt: TokenText, tokenizer: Any = None
) -> LocatedTexts:
    """Locates those contents that have one possible place, given their order.

    Args:
        sources: The client's texts.
        prompt: The prompt tokens.
        tokenizer: The tokenizer, if the prompt's text is what the tokens decode to.
    """
    wanted: list[tuple[LocatedText, str]] = []
    for source in sources:
        if not source.is_content:
            continue
        text, offset, origins = _as_in(prompt.text, source.text, tokenizer)
        # A role name is likely to be found in the template instead.
        if text.strip() and text in prompt.text and text.strip() not in _ROLE_NAMES:
            wanted.append((LocatedText(source, 0, len(text), offset, origins), text))
    positions = forced_positions(prompt.text, [text for _, text in wanted])
    located = [
        replace(one, start=at, end=at + one.end)
        for (one, _), at in zip(wanted, positions, strict=True)
        if at is not None and _stands_alone(prompt.text, at, at + one.end)
    ]
    known = {(one.source.message, one.source.part) for one in located}
    unlocated = frozenset(
        source.message
        for source in sources
        if source.text.strip()
        and (not source.is_content or (source.message, source.part) not in known)
    )
    return LocatedTexts(located, unlocated, prompt)


def _as_in(prompt: str, text: str, tokenizer: Any) -> tuple[str, int, Sequence[Span] | None]:
    """The form in which a prompt may hold a text, where it begins, and what it stands for."""
    if text in prompt:
        return text, 0, None
    bare = text.strip()
    if bare not in prompt and tokenizer is not None:
        written = as_written(tokenizer, text)
        if written is not None:
            form = written[0].strip()
            return form, written[0].find(form), written[1]
    return bare, text.find(bare), None


def _stands_alone(prompt: str, start: int, end: int) -> bool:
    """Whether a text is not a part of a longer word, where it is likely to be another's."""
    before, after = prompt[max(0, start - 1) : start + 1], prompt[end - 1 : end + 1]
    return not any(len(edge) == 2 and edge.isalnum() for edge in (before, after))
