"""Sentences: of the prompt, with their scores, and the pattern that cuts any text into them."""

from __future__ import annotations

import bisect
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from vllm_flashtrace.base.records import Completion, Span
from vllm_flashtrace.text.prompt_map import PromptMap
from vllm_flashtrace.text.prompt_texts import MessageText, message_texts

# Full stops that no letter follows, those of Chinese and Japanese, and ends of lines.
_END = re.compile(
    r"(?:(?<![.!?])[.!?]++[\"'\u2019\u201d)\]]*+(?=\s|\Z)|[\u3002\uff01\uff1f]++|\n)\s*+"
)

Key = tuple[int, int | None]
"""A message and its content part."""


def sentence_spans(text: str) -> list[Span]:
    """Half-open character ranges that partition a text, blanks with the sentence before them.

    A sentence ends with ``.``, ``!`` or ``?`` in front of a blank, with a full stop of Chinese or
    Japanese, or with its line; abbreviations are not known.
    """
    spans: list[Span] = []
    start = 0
    for match in _END.finditer(text):
        if text[start : match.end()].strip():
            spans.append((start, match.end()))
            start = match.end()
    if start < len(text):
        if spans and not text[start:].strip():
            spans[-1] = (spans[-1][0], len(text))
        else:
            spans.append((start, len(text)))
    return spans


def containing(starts: Sequence[int], text: str, start: int, end: int) -> int:
    """Index of the sentence that a token belongs to.

    Args:
        starts: Where each sentence starts, ascending from 0.
        text: The text.
        start: First character of the token.
        end: One past its last.
    """
    blanks = end - start - len(text[start:end].lstrip())
    return bisect.bisect_right(starts, start if blanks == end - start else start + blanks) - 1


def scored_sentences(
    text: str, tokens: Iterable[tuple[int, int, float]], offset: int = 0
) -> list[dict[str, Any]]:
    """One entry per sentence of a text, in the order of the text.

    An entry has ``start`` and ``end`` of the sentence without the blanks around it, its ``text``,
    how many ``tokens`` it has, the ``score`` of all of them, and their ``mean``. Sentences without
    a token of their own are left out.

    Args:
        text: The text.
        tokens: First character, end and score of the tokens in the text.
        offset: What to add to positions in the text.
    """
    spans = sentence_spans(text)
    starts = [start for start, _ in spans]
    of_sentence: dict[int, list[float]] = defaultdict(list)
    for start, end, score in tokens:
        of_sentence[containing(starts, text, start, end)].append(score)
    return [_entry(text, spans[number], own, offset) for number, own in of_sentence.items()]


def sentences(
    prompt_map: PromptMap, completion: Completion, scores: Sequence[float]
) -> list[dict[str, Any]]:
    """The sentences of the located contents in the order of the prompt, as `scored_sentences`.

    An entry also has ``message`` (and ``part``).

    Args:
        prompt_map: The client's messages laid over the prompt.
        completion: Holds the client's messages or prompt.
        scores: Score of each prompt token.
    """
    texts = {(text.message, text.part): text.text for text in contents(completion)}
    tokens: dict[Key, list[tuple[int, int, float]]] = defaultdict(list)
    for located, score in zip(prompt_map.tokens, scores, strict=True):
        if located is None or located.start is None or located.end is None:
            continue
        key = located.message, located.part
        if located.message not in prompt_map.unlocated and key in texts:
            tokens[key].append((located.start, located.end, score))
    return [
        {"message": key[0], **({} if key[1] is None else {"part": key[1]}), **entry}
        for key, own in tokens.items()
        for entry in scored_sentences(texts[key], own)
    ]


def contents(completion: Completion) -> list[MessageText]:
    """The contents of the client's messages, or its prompt; those that are not blank."""
    if completion.messages is not None:
        return [text for text in message_texts(completion.messages) if text.is_content]
    if completion.prompt_text is not None:
        return [MessageText(0, None, completion.prompt_text)]
    return []


def _entry(text: str, span: Span, own: Sequence[float], offset: int) -> dict[str, Any]:
    sentence = text[slice(*span)]
    start = offset + span[0] + len(sentence) - len(sentence.lstrip())
    score = math.fsum(own)
    return {
        "start": start,
        "end": start + len(sentence.strip()),
        "text": sentence.strip(),
        "tokens": len(own),
        "score": score,
        "mean": score / len(own),
    }
