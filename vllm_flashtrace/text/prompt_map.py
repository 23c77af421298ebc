"""Which message of the client each prompt token belongs to, and where it lies in it.

Invariant: a token is either located by a certain place of its message's text or not at all, and a
message with text that is not placed is named as such.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_flashtrace.base.records import Completion, Span
from vllm_flashtrace.text.offsets import TokenText
from vllm_flashtrace.text.prompt_texts import (
    Found,
    MessageText,
    Place,
    Render,
    clipped,
    message_texts,
    place_by_marks,
    place_by_order,
    prompt_offset,
)
from vllm_flashtrace.text.tool_calls import (
    has_other_values,
    holds_arguments_of,
    tool_call_range,
)


@dataclass(frozen=True, slots=True)
class Located:
    """A prompt token within a client's message.

    Attributes:
        message: Index of the message.
        part: Index of the content part, None where the content is one string.
        start: First character within the content (or the part); None outside the content proper
            (a tool call or earlier reasoning).
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
    """

    tokens: list[Located | None]
    roles: list[str]
    unlocated: frozenset[int] = frozenset()

    def of_role(self, role: str) -> list[int]:
        """Prompt tokens of all messages of a role, ascending."""
        return [
            i
            for i, located in enumerate(self.tokens)
            if located is not None and self.roles[located.message] == role
        ]


def locate_prompt(
    completion: Completion, prompt: TokenText, render: Render | None = None
) -> PromptMap:
    """Finds the client's texts among the prompt tokens.

    Args:
        completion: Its ``messages`` or ``prompt_text`` are located; with neither, nothing is.
        prompt: The decoded prompt tokens.
        render: Renders other messages exactly as these were rendered; None if impossible.
    """
    if completion.messages is not None:
        return _located_chat(completion, prompt, render)
    if completion.prompt_text is None:
        return PromptMap([None] * len(prompt), [])
    whole = MessageText(0, None, completion.prompt_text)
    offset = prompt_offset(prompt.text, whole.text)
    if offset is None:
        found = place_by_order([whole], prompt.text)
    else:
        place = clipped(Place(whole, offset, offset + len(whole.text)), len(prompt.text))
        found = Found([place], frozenset())
    return PromptMap(_located_texts(prompt, found.places), ["prompt"], found.unlocated)


def _located_chat(completion: Completion, prompt: TokenText, render: Render | None) -> PromptMap:
    messages = completion.messages or ()
    found = place_by_marks(messages, prompt.text, render)
    if found is None:
        found = place_by_order(message_texts(messages, tool_calls=True), prompt.text)
    located = _located_texts(prompt, found.places)
    unlocated = set(found.unlocated)
    calls = _tool_calls(found.places)
    in_front = _writes_arguments_in_front(calls, found.places, messages, prompt.text)
    for (message, call), texts in calls.items():
        start, end = texts[0].start, max(place.end for place in texts)
        limit = min((p.start for p in found.places if p.start >= end), default=len(prompt.text))
        written = tool_call_range(
            _function(messages, message, call),
            prompt.text[:limit],
            start,
            end,
            in_front=_in_front(texts, found.places) if in_front else None,
        )
        if written is None:
            unlocated.add(message)
            continue
        for token in prompt.within(*written):
            located[token] = located[token] or Located(message, None, None, None, call)
    roles = [str(message.get("role", "")) for message in messages]
    return PromptMap(located, roles, frozenset(unlocated))


def _located_texts(prompt: TokenText, places: Sequence[Place]) -> list[Located | None]:
    located: list[Located | None] = [None] * len(prompt)
    for place in places:
        for token in prompt.overlapping(place.start, place.end):
            if located[token] is None:
                located[token] = _within(place, prompt.starts[token], prompt.ends[token])
    return located


def _within(place: Place, start: int, end: int) -> Located:
    """What a token from character `start` to `end` of the prompt holds of a placed text."""
    piece = place.piece
    if not piece.is_content:
        return Located(piece.message, piece.part, None, None, piece.tool_call)
    return Located(piece.message, piece.part, *place.original(start, end))


def _tool_calls(places: Sequence[Place]) -> dict[tuple[int, int], list[Place]]:
    """Placed texts of each call in the order of the prompt, by message and call."""
    placed: dict[tuple[int, int], list[Place]] = defaultdict(list)
    for place in sorted(places, key=lambda place: place.start):
        if place.piece.tool_call is not None:
            placed[place.piece.message, place.piece.tool_call].append(place)
    return placed


def _writes_arguments_in_front(
    calls: Mapping[tuple[int, int], list[Place]],
    places: Sequence[Place],
    messages: Sequence[Mapping[str, Any]],
    prompt: str,
) -> bool:
    """Whether the template writes the arguments of calls in front of their names.

    The first call that tells decides. In front of a call behind another one of its message may be
    that one's arguments, so the two have to differ.
    """
    for (message, call), texts in calls.items():
        names = [place.start for place in texts if _is_name(place)]
        if names and len(texts) > 1:
            return texts[0].start < names[0]
        function = _function(messages, message, call)
        earlier = _function(messages, message, call - 1) if call else {}
        if has_other_values(function) and not holds_arguments_of(earlier, function):
            start, end = texts[0].start, texts[-1].end
            around = _in_front(texts, places)
            return tool_call_range(function, prompt, start, end, in_front=around) is not None
    return False


def _in_front(texts: Sequence[Place], places: Sequence[Place]) -> Span:
    """From the last text before a call to the call's name."""
    start = texts[0].start
    floor = max((place.end for place in places if place.end <= start), default=0)
    return floor, next((p.start for p in texts if _is_name(p)), start)


def _function(messages: Sequence[Mapping[str, Any]], message: int, call: int) -> Mapping[str, Any]:
    function: Mapping[str, Any] = messages[message]["tool_calls"][call]["function"]
    return function


def _is_name(place: Place) -> bool:
    return place.piece.path[3] == "name"
