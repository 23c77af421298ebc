"""Which message of the client each prompt token belongs to, and where it lies in it.

Invariant: a token is either located by a certain place of its message's text or not at all, and a
message with text that is not placed is named as such.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_flashtrace.postprocess.marking import MessageText, Render, message_texts
from vllm_flashtrace.postprocess.offsets import TokenText
from vllm_flashtrace.postprocess.placing import (
    Found,
    Place,
    clipped,
    place_by_marks,
    place_by_order,
    prompt_offset,
)
from vllm_flashtrace.postprocess.tool_calls import tool_call_range
from vllm_flashtrace.records import Completion, Span


@dataclass(frozen=True, slots=True)
class Located:
    """A prompt token within a client's message.

    Attributes:
        message: Index of the message.
        part: Index of the content part, None where the content is one string.
        start: First character within the content (or the part); None outside the content proper
            (a tool call or earlier reasoning).
        end: One past the last character.
    """

    message: int
    part: int | None
    start: int | None
    end: int | None

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
    for (message, call), (start, end) in _tool_calls(found.places).items():
        following = [place.start for place in found.places if place.start >= end]
        limit = min(following, default=len(prompt.text))
        function = messages[message]["tool_calls"][call]["function"]
        written = tool_call_range(function, prompt.text[:limit], start, end)
        if written is None:
            unlocated.add(message)
            continue
        for token in prompt.within(*written):
            located[token] = located[token] or Located(message, None, None, None)
    roles = [str(message.get("role", "")) for message in messages]
    return PromptMap(located, roles, frozenset(unlocated))


def _located_texts(prompt: TokenText, places: Sequence[Place]) -> list[Located | None]:
    located: list[Located | None] = [None] * len(prompt)
    for place in places:
        piece = place.piece
        for token in prompt.overlapping(place.start, place.end):
            if located[token] is None:
                start = max(prompt.starts[token], place.start) - place.start + place.offset
                end = min(prompt.ends[token], place.end) - place.start + place.offset
                offsets = (start, end) if piece.is_content else (None, None)
                located[token] = Located(piece.message, piece.part, *offsets)
    return located


def _tool_calls(places: Sequence[Place]) -> dict[tuple[int, int], Span]:
    """Range from the first to the last placed text of each call, by message and call."""
    placed: dict[tuple[int, int], list[Place]] = defaultdict(list)
    for place in places:
        if place.piece.path[0] == "tool_calls":
            placed[place.piece.message, int(place.piece.path[1])].append(place)
    return {
        call: (min(place.start for place in texts), max(place.end for place in texts))
        for call, texts in placed.items()
    }
