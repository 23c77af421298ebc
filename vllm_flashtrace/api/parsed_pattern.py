"""Reading what the standard library's regular expression parser returns.

Invariant: every kind of item is handled by name, and an unknown one is refused, never skipped.
"""

from __future__ import annotations

import re
import re._constants as sre  # type: ignore[import-not-found]
from collections.abc import Iterator
from typing import Any

REPEATS = (sre.MAX_REPEAT, sre.MIN_REPEAT, sre.POSSESSIVE_REPEAT)
_CATEGORIES = {
    sre.CATEGORY_DIGIT: r"\d",
    sre.CATEGORY_NOT_DIGIT: r"\D",
    sre.CATEGORY_SPACE: r"\s",
    sre.CATEGORY_NOT_SPACE: r"\S",
    sre.CATEGORY_WORD: r"\w",
    sre.CATEGORY_NOT_WORD: r"\W",
}


class TooComplexError(ValueError):
    """A pattern too large, too unusual or too costly to analyse."""


def accepts(op: Any, value: Any, character: str) -> bool:
    """Whether one parsed character item accepts a character."""
    if op is sre.ANY:
        return True
    if op is sre.LITERAL:
        return ord(character) == value
    if op is sre.NOT_LITERAL:
        return ord(character) != value
    if op is sre.RANGE:
        return bool(value[0] <= ord(character) <= value[1])
    if op is sre.CATEGORY:
        if value not in _CATEGORIES:
            raise TooComplexError(f"uses {value}, which is not supported")
        return re.match(_CATEGORIES[value], character) is not None
    negated = bool(value) and value[0][0] is sre.NEGATE
    members = value[1:] if negated else value
    return negated != any(accepts(member, inner, character) for member, inner in members)


def sample_alphabet(parsed: Any) -> str:
    """Characters among which any two items of the pattern that overlap share at least one."""
    points = set(range(128)) | {ord(c) for c in "\xa0éÉ中٣€😀"}
    for point in _literals(parsed):
        points |= {point - 1, point, point + 1}
    return "".join(chr(p) for p in sorted(points) if 0 <= p < 0x110000)


def _literals(items: Any) -> Iterator[int]:
    """Every code point, range ends included, that a parsed pattern names."""
    for op, value in items:
        if op in (sre.LITERAL, sre.NOT_LITERAL):
            yield value
        elif op is sre.RANGE:
            yield from value
        elif op is sre.IN:
            yield from _literals(value)
        else:
            parts = [value[-1]] if op in REPEATS else _parts(op, value)
            for part in parts:
                yield from _literals(part)


def expanded_size(items: Any) -> int:
    """Number of items once every counted repeat is written out."""
    size = 0
    for op, value in items:
        if op in REPEATS:
            low, high, body = value
            times = low if high == sre.MAXREPEAT else high
            size += expanded_size(body) * max(1, times)
        else:
            size += 1 + sum(expanded_size(part) for part in _parts(op, value))
    return size


def _parts(op: Any, value: Any) -> list[Any]:
    """Sub-patterns of a parsed item that is not a repeat."""
    if op is sre.BRANCH:
        return list(value[1])
    if op is sre.SUBPATTERN:
        return [value[-1]]
    if op is sre.ATOMIC_GROUP:
        return [value]
    if op in (sre.ASSERT, sre.ASSERT_NOT):
        return [value[1]]
    if op is sre.GROUPREF_EXISTS:
        return [branch for branch in value[1:] if branch is not None]
    return []
