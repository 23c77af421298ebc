"""Prompts of a wanted length: facts that must be there, spread over filler.

Invariant: every fact stands in the prompt once and word by word, and the gold spans are exactly
the marked parts of the facts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.faithfulness.example import Span

TOLERANCE = 0.1
"""By how much of the asked length a prompt may miss it."""


@dataclass(frozen=True)
class Fact:
    """A sentence that must be in the prompt, and which part of it is gold.

    Attributes:
        text: The sentence.
        gold: The part of ``text`` that the answer rests on; "" where it is a distractor.
    """

    text: str
    gold: str = ""


@dataclass(frozen=True)
class Draft:
    """An example before its context has a length.

    Attributes:
        variant: Short name, e.g. ``"q4"``.
        head: Start of the prompt.
        facts: What stands between head and tail.
        filler: Makes a sentence to put around the facts.
        tail: End of the prompt.
        reasoning: Chain of thought.
        output: The answer.
        shuffled: Whether facts may stand in any order.
        per_paragraph: Sentences to a paragraph.
    """

    variant: str
    head: str
    facts: Sequence[Fact]
    filler: Callable[[random.Random], str]
    tail: str
    reasoning: str
    output: str
    shuffled: bool = True
    per_paragraph: int = 6


def compose(
    draft: Draft, length: int, source: random.Random, tokenizer: Any
) -> tuple[str, tuple[Span, ...]]:
    """The prompt with as much filler as brings it nearest to ``length``, and its gold spans.

    Args:
        draft: What must be in it.
        length: Tokens, with the chat template.
        source: Of filler, order and places.
        tokenizer: Counts the tokens.

    Raises:
        ValueError: Without filler the prompt is already too long.
    """
    facts = list(draft.facts)
    if draft.shuffled:
        source.shuffle(facts)
    places = sorted(source.random() for _ in facts)
    filler: list[str] = []

    def build(size: int) -> tuple[str, tuple[Span, ...]]:
        while len(filler) < size:
            filler.append(draft.filler(source))
        return _join(draft, facts, places, filler[:size])

    def tokens(size: int) -> int:
        return count_tokens(build(size)[0], tokenizer)

    low, high = 0, 1
    while tokens(high) < length:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if tokens(middle) < length else (low, middle)
    size = min((low, high), key=lambda size: abs(tokens(size) - length))
    if abs(tokens(size) - length) > TOLERANCE * length:
        raise ValueError(
            f"{draft.variant}: a context of {length} tokens was asked for, "
            f"the nearest possible is {tokens(size)}"
        )
    return build(size)


def count_tokens(prompt: str, tokenizer: Any) -> int:
    """Tokens of a user's message with the chat template around it."""
    messages = [{"role": "user", "content": prompt}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return len(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def _join(
    draft: Draft, facts: Sequence[Fact], places: Sequence[float], filler: Sequence[str]
) -> tuple[str, tuple[Span, ...]]:
    """Facts at their relative places among the filler."""
    body = [Fact(text) for text in filler]
    for done, (fact, place) in enumerate(zip(facts, places, strict=True)):
        body.insert(done + int(place * (len(filler) + 1)), fact)
    text = draft.head
    gold: list[Span] = []
    for i, sentence in enumerate(body):
        text += "\n" if i % draft.per_paragraph == 0 else " "
        if sentence.gold:
            start = len(text) + sentence.text.index(sentence.gold)
            gold.append((start, start + len(sentence.gold)))
        text += sentence.text
    return f"{text}\n{draft.tail}", tuple(gold)
