"""Which message of the client each prompt token belongs to, and where it lies in it.

A token is located by a certain place of its message's text, or not at all; a message with text
whose place is not known is named in ``PromptMap.unlocated``. Tool calls of earlier assistant turns
are located from their name to their last argument.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from vllm_flashtrace.base.records import Completion, Span
from vllm_flashtrace.text.normal_forms import last_at, made_from
from vllm_flashtrace.text.offsets import TokenText
from vllm_flashtrace.text.prompt_images import image_places
from vllm_flashtrace.text.prompt_texts import (
    Layout,
    LocatedText,
    LocatedTexts,
    MessageText,
    Render,
    clipped,
    locate_by_marks,
    locate_by_order,
    message_texts,
    prompt_offset,
    rendered,
)
from vllm_flashtrace.text.tool_calls import call_arguments


@dataclass(frozen=True, slots=True)
class LocatedToken:
    """A prompt token within a client's message.

    Attributes:
        message: Index of the message.
        part: Index of the content part, None where the content is one string.
        start: First character within the content (or the part); None outside the content proper
            (a tool call or earlier reasoning), and for an image.
        end: One past the last character.
        tool_call: Index of the message's tool call that it belongs to, if any.
    """

    message: int
    part: int | None
    start: int | None
    end: int | None
    tool_call: int | None = None

    def to_dict(self) -> dict[str, int]:
        """The fields of an entry of ``scores``; none where there are no offsets."""
        if self.start is None or self.end is None:
            return {}
        part = {} if self.part is None else {"part": self.part}
        return {"message": self.message, **part, "start": self.start, "end": self.end}


@dataclass(frozen=True, slots=True)
class PromptMap:
    """The client's messages laid over the prompt tokens.

    Attributes:
        tokens: One entry per prompt token, None for tokens of the template.
        roles: Role of each message; ``"prompt"`` for a plain prompt.
        unlocated: Messages that the prompt holds, or may hold, at a place that is not known.
        images: Message and content part of each of the prompt's images; None where they are not
            known, or there are none.
    """

    tokens: list[LocatedToken | None]
    roles: list[str]
    unlocated: frozenset[int] = frozenset()
    images: list[tuple[int, int]] | None = None

    def of_role(self, role: str) -> list[int]:
        """Prompt tokens of all messages of a role, ascending."""
        return [
            i
            for i, located in enumerate(self.tokens)
            if located is not None and self.roles[located.message] == role
        ]


def locate_prompt(
    completion: Completion,
    prompt: TokenText,
    render: Render | None = None,
    tokenizer: Any = None,
) -> PromptMap:
    """Finds the client's texts among the prompt tokens.

    Args:
        completion: Its ``messages`` or ``prompt_text`` are located; with neither, nothing is.
        prompt: The decoded prompt tokens; an image's have the text that the template writes in its
            place.
        render: Renders other messages exactly as these were rendered; None if impossible.
        tokenizer: The model's tokenizer; without it, only text that tokens decode to is found.
    """

    @cache
    def lay_over(text: str) -> tuple[TokenText, int] | None:
        return _laid_over(text, prompt, completion.prompt_token_ids, tokenizer)

    if completion.messages is not None:
        found = _find_messages(completion.messages, prompt, render, lay_over, tokenizer)
        return _with_images(_locate_chat(completion.messages, found), completion)
    if completion.prompt_text is None:
        return PromptMap([None] * len(prompt), [])
    whole = MessageText(0, None, completion.prompt_text)
    laid = lay_over(whole.text)
    if laid is None:
        found = locate_by_order([whole], prompt, tokenizer)
    else:
        view, offset = laid
        text = clipped(LocatedText(whole, offset, offset + len(whole.text)), len(view.text))
        found = LocatedTexts([text], frozenset(), view)
    return PromptMap(_locate_tokens(found), ["prompt"], found.unlocated)


def _with_images(prompt_map: PromptMap, completion: Completion) -> PromptMap:
    """Locates the tokens of the images, too."""
    places = image_places(completion.messages, len(completion.images))
    if not completion.images or places is None:
        return prompt_map
    tokens = [*prompt_map.tokens]
    for image, (message, part) in zip(completion.images, places, strict=True):
        for token in image.tokens:
            tokens[token] = LocatedToken(message, part, None, None)
    return replace(prompt_map, tokens=tokens, images=places)


def _laid_over(
    text: str, prompt: TokenText, token_ids: Sequence[int], tokenizer: Any
) -> tuple[TokenText, int] | None:
    """The prompt's tokens over the text that they were made from, and where it begins in there."""
    offset = prompt_offset(prompt.text, text)
    if offset is not None and offset >= 0 and prompt.text[offset:] == text:
        return prompt, offset
    made = None if tokenizer is None else made_from(tokenizer, text, token_ids)
    if made is not None:
        return made
    return None if offset is None else (prompt, offset)


def _find_messages(
    messages: Sequence[Mapping[str, Any]],
    prompt: TokenText,
    render: Render | None,
    lay_over: Layout,
    tokenizer: Any,
) -> LocatedTexts:
    texts = message_texts(messages, tool_calls=True)
    if render is not None:
        found = locate_by_marks(messages, render, lay_over)
        if found is not None:
            return found
        # The template may do without marks only.
        plain = rendered(render, messages)
        laid = None if plain is None else lay_over(plain)
        if laid is not None:
            return locate_by_order(texts, laid[0])
    return locate_by_order(texts, prompt, tokenizer)


def _locate_chat(messages: Sequence[Mapping[str, Any]], found: LocatedTexts) -> PromptMap:
    prompt = found.prompt
    located = _locate_tokens(found)
    unlocated = set(found.unlocated)
    calls = _texts_by_call(found.texts)
    in_front = _writes_arguments_in_front(calls, found.texts, messages, prompt.text)
    for (message, call), own in calls.items():
        start, end = own[0].start, max(text.end for text in own)
        later = (text.start for text in found.texts if text.start >= end)
        limit = min(later, default=len(prompt.text))
        written = prompt_call_span(
            _function(messages, message, call),
            prompt.text[:limit],
            start,
            end,
            in_front=_in_front(own, found.texts) if in_front else None,
        )
        if written is None:
            unlocated.add(message)
            continue
        for token in prompt.within(*written):
            located[token] = located[token] or LocatedToken(message, None, None, None, call)
    roles = [str(message.get("role", "")) for message in messages]
    return PromptMap(located, roles, frozenset(unlocated))


def _locate_tokens(found: LocatedTexts) -> list[LocatedToken | None]:
    located: list[LocatedToken | None] = [None] * len(found.prompt)
    for text in found.texts:
        for token, span in found.prompt.covering(text.start, text.end):
            if located[token] is None:
                located[token] = _within(text, *span)
    return located


def _within(text: LocatedText, start: int, end: int) -> LocatedToken:
    """What a token from character `start` to `end` of the prompt holds of a located text."""
    source = text.source
    if not source.is_content:
        return LocatedToken(source.message, source.part, None, None, source.tool_call)
    return LocatedToken(source.message, source.part, *text.original(start, end))


def _texts_by_call(texts: Sequence[LocatedText]) -> dict[tuple[int, int], list[LocatedText]]:
    """Located texts of each call in the order of the prompt, by message and call."""
    by_call: dict[tuple[int, int], list[LocatedText]] = defaultdict(list)
    for text in sorted(texts, key=lambda text: text.start):
        if text.source.tool_call is not None:
            by_call[text.source.message, text.source.tool_call].append(text)
    return by_call


def _writes_arguments_in_front(
    calls: Mapping[tuple[int, int], list[LocatedText]],
    texts: Sequence[LocatedText],
    messages: Sequence[Mapping[str, Any]],
    prompt: str,
) -> bool:
    """Whether the template writes the arguments of calls in front of their names.

    The first call that tells decides. In front of a call behind another one of its message may be
    that one's arguments, so the two have to differ.
    """
    for (message, call), own in calls.items():
        names = [text.start for text in own if _is_name(text)]
        if names and len(own) > 1:
            return own[0].start < names[0]
        function = _function(messages, message, call)
        earlier = _function(messages, message, call - 1) if call else {}
        if _has_other_values(function) and not _holds_arguments_of(earlier, function):
            start, end = own[0].start, own[-1].end
            around = _in_front(own, texts)
            return prompt_call_span(function, prompt, start, end, in_front=around) is not None
    return False


def _in_front(own: Sequence[LocatedText], texts: Sequence[LocatedText]) -> Span:
    """From the last text before a call to the call's name.

    Args:
        own: The call's texts in the order of the prompt.
        texts: All texts of the prompt.
    """
    start = own[0].start
    floor = max((text.end for text in texts if text.end <= start), default=0)
    return floor, next((text.start for text in own if _is_name(text)), start)


def _function(messages: Sequence[Mapping[str, Any]], message: int, call: int) -> Mapping[str, Any]:
    function: Mapping[str, Any] = messages[message]["tool_calls"][call]["function"]
    return function


def _is_name(text: LocatedText) -> bool:
    return text.source.path[3] == "name"


def prompt_call_span(
    function: Mapping[str, Any],
    prompt: str,
    start: int,
    end: int,
    *,
    in_front: Span | None = None,
) -> Span | None:
    """Extends the span of a call's name and text arguments over its other arguments.

    Args:
        function: Name and arguments of the call.
        prompt: The decoded prompt, up to the next text of the client.
        start: Where the first of the call's texts begins.
        end: Where the last of them ends.
        in_front: Where the arguments lie if the template writes them in front of the name: between
            the last text before the call, and the name.

    Returns:
        None where numbers, lists or other values are written in a form that is not known.
    """
    if not _has_other_values(function):
        return start, end
    for form in _forms(function):
        if in_front is not None:
            at = last_at(prompt[slice(*in_front)], form)
            if at >= 0:
                return min(start, in_front[0] + at), end
            continue
        at = prompt.find(form, start)
        # Arguments end behind the texts in them; a form that ends earlier is part of the name.
        while 0 <= at <= end - len(form):
            at = prompt.find(form, at + 1)
        if at >= 0:
            return start, at + len(form)
    return None


def _has_other_values(function: Mapping[str, Any]) -> bool:
    """Whether a call has arguments that are not texts, or none that can be read."""
    arguments = function.get("arguments")
    values = call_arguments(arguments)
    is_opaque = not values and isinstance(arguments, str) and arguments.strip() not in ("", "{}")
    return is_opaque or not all(isinstance(value, str) for value in values.values())


def _holds_arguments_of(function: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether a call's arguments, as written, may hold another one's."""
    written = list(_forms(function))
    return any(form in text for form in _forms(other) for text in written)


def _forms(function: Mapping[str, Any]) -> Iterator[str]:
    """Usual ways to write a call's arguments: as sent, and as JSON with and without blanks."""
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        yield arguments
    if values := call_arguments(arguments):
        for separators in (None, (",", ":")):
            yield json.dumps(values, ensure_ascii=False, separators=separators)
