"""Finds the client's texts in the decoded prompt.

Invariant: a place is either certain or absent. Certain means that rendering the messages with
invisible marks around their texts gives exactly the prompt, or, where that is not possible, that
the order of the messages leaves a text only one place in the prompt.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm_flashtrace.base.records import Span
from vllm_flashtrace.text.marking import (
    MARK,
    MARK_BASE,
    MessageText,
    Render,
    marked_messages,
    message_texts,
)
from vllm_flashtrace.text.ordered_search import forced_positions

logger = logging.getLogger("vllm.flashtrace")

_ROLE_NAMES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})


@dataclass(frozen=True, slots=True)
class Place:
    """A client's text found in the prompt.

    Attributes:
        piece: The text.
        start: First character in the decoded prompt.
        end: One past the last character.
        offset: Where ``start`` lies in the client's text.
        escapes: Where the template writes the text with JSON's escapes: for every character
            written, the client's one.
    """

    piece: MessageText
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
class Found:
    """Outcome of looking for the client's texts: places, and the messages that lack one."""

    places: list[Place]
    unlocated: frozenset[int]


def place_by_marks(
    messages: Sequence[Mapping[str, Any]], prompt: str, render: Render | None
) -> Found | None:
    """Places by marks in a rendering; None unless one gives exactly the prompt without them."""
    if render is None or MARK.search(prompt):
        return None
    plain = message_texts(messages)
    with_tool_calls = message_texts(messages, tool_calls=True)
    # Marks around blanks locate these too, but stop a template from stripping them. Marks in tool
    # calls may disturb a template that takes these apart.
    for pieces in (with_tool_calls, plain) if with_tool_calls != plain else (plain,):
        unmarked = {piece.message for piece in with_tool_calls if piece not in pieces}
        stripped = any(piece.text != piece.text.strip() for piece in pieces)
        for around_blanks in (True, False) if stripped else (True,):
            marked = marked_messages(messages, pieces, around_blanks=around_blanks)
            rendered = None if marked is None else _rendered(render, marked)
            found = None if rendered is None else _read_marks(rendered, pieces, prompt)
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


def _read_marks(rendered: str, pieces: Sequence[MessageText], prompt: str) -> Found | None:
    """Places of the pieces, if the rendering without marks is the prompt.

    A text that the template left out has no place; one that it took apart or repeated has none that
    is known.
    """
    plain = MARK.sub("", rendered)
    marks: dict[int, list[int]] = defaultdict(list)
    for earlier, mark in enumerate(MARK.finditer(rendered)):
        marks[ord(mark.group()) - MARK_BASE].append(mark.start() - earlier)
    shift = prompt_offset(prompt, plain)
    if shift is None or not marks:
        return None
    places: list[Place] = []
    unlocated: set[int] = set()
    for index, piece in enumerate(pieces):
        starts, ends = marks[2 * index], marks[2 * index + 1]
        inside = plain[starts[0] : ends[0]] if len(starts) == len(ends) == 1 else ""
        escapes = _escapes(piece, inside)
        if (
            escapes
            or inside in (piece.text, piece.text.strip())
            or (inside and not piece.is_content)
        ):
            offset = 0 if escapes else max(0, piece.text.find(inside))
            place = Place(piece, starts[0] + shift, ends[0] + shift, offset, escapes)
            places.append(clipped(place, len(prompt)))
        elif starts or ends:
            unlocated.add(piece.message)
    return Found([place for place in places if place.start < place.end], frozenset(unlocated))


def _escapes(piece: MessageText, written: str) -> list[int] | None:
    """Origin of every character of a content that is written with JSON's escapes, and only then."""
    if not piece.is_content or "\\" not in written:
        return None
    for ensure_ascii in (False, True):
        escaped = [json.dumps(char, ensure_ascii=ensure_ascii)[1:-1] for char in piece.text]
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


def clipped(place: Place, length: int) -> Place:
    """The part of a place that lies within the prompt."""
    start, end = max(place.start, 0), min(place.end, length)
    return replace(place, start=start, end=end, offset=place.offset + start - place.start)


def place_by_order(pieces: Sequence[MessageText], prompt: str) -> Found:
    """Places of those contents that have one possible place, given their order."""
    wanted: list[Place] = []
    for piece in pieces:
        if not piece.is_content:
            continue
        text = piece.text if piece.text in prompt else piece.text.strip()
        # A role name is likely to be found in the template instead.
        if text.strip() and text in prompt and text.strip() not in _ROLE_NAMES:
            wanted.append(Place(piece, 0, len(text), piece.text.find(text)))
    texts = [place.piece.text[place.offset : place.offset + place.end] for place in wanted]
    positions = forced_positions(prompt, texts)
    places = [
        replace(place, start=at, end=at + place.end)
        for place, at in zip(wanted, positions, strict=True)
        if at is not None and _stands_alone(prompt, at, at + place.end)
    ]
    placed = {(place.piece.message, place.piece.part) for place in places}
    return Found(
        places,
        frozenset(
            piece.message
            for piece in pieces
            if piece.text.strip()
            and (not piece.is_content or (piece.message, piece.part) not in placed)
        ),
    )


def _stands_alone(prompt: str, start: int, end: int) -> bool:
    """Whether a text is not a part of a longer word, where it is likely to be another's."""
    before, after = prompt[max(0, start - 1) : start + 1], prompt[end - 1 : end + 1]
    return not any(len(edge) == 2 and edge.isalnum() for edge in (before, after))
