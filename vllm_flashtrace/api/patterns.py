"""Regular expressions sent by clients: checked before use, and searched against a clock.

A pattern may well be one that a backtracking matcher needs exponential time for, ``(a+)+$`` say:
the clock ends the search. What the clock cannot end is compiling, so that is bounded beforehand.
"""

from __future__ import annotations

import re
import re._parser as sre_parser  # type: ignore[import-not-found]
import time
import warnings
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import regex

from vllm_flashtrace.base.records import Span

# The `regex` module reads "{e<=1}" as approximate matching, the standard library as plain text.
_OPAQUE = r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]"  # Escapes and character classes.
_APPROXIMATE = re.compile(_OPAQUE + r"|\{\d*,?\d*\}|(\{[\sidse\d+<=,]+(?::[^}]*)?\})", re.DOTALL)
# It also reads "[[:alpha:]]" as a class of letters, the standard library as "[", ":", "a", ...
_NAMED_CLASS = re.compile(r"\[:\^?\w+:\]")
# Compiling takes 0.3 to 1.2 us and 100 to 300 bytes for each character once repeats are written
# out: 60 ms and 15 MB at most, measured with regex 2026.11. The pattern's own length is limited by
# `RequestLimits.max_regex_length`.
_MAX_WRITTEN_OUT = 50_000


class PatternError(ValueError):
    """A pattern that is refused; the text completes the sentence "the pattern …"."""


@lru_cache(maxsize=256)  # Remembers the accepted ones; a refusal is raised, not stored.
def check_pattern(pattern: str) -> None:
    """Refuses a pattern that is malformed, matches only ``""`` or is too large to compile.

    Raises:
        PatternError: Saying which.
    """
    if any(found.group(1) for found in _APPROXIMATE.finditer(pattern)):
        raise PatternError("has a '{' that is not a repeat count; write '\\{'")
    if _NAMED_CLASS.search(pattern):
        raise PatternError("has a class such as '[:alpha:]', which is not supported")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Notices about syntax of future versions.
            # The syntax is the standard library's; the `regex` module knows more. Only parsed: the
            # library's compiler takes 10 ms for each class like [!-\uffff] that ignores case.
            parsed = sre_parser.parse(pattern)
            if parsed.getwidth()[1] == 0:
                raise PatternError("matches only the empty string")
            if len(pattern) * _most_copies(parsed) > _MAX_WRITTEN_OUT:
                raise PatternError("repeats too many times")
            _compiled(pattern)
    except RecursionError:
        raise PatternError("is nested too deeply") from None
    except (re.error, regex.error, OverflowError) as error:
        raise PatternError(f"is not valid: {error}") from None


def last_match(pattern: str, text: str, *, seconds: float) -> Span | None:
    """Finds the last non-empty match, or its group's range if the pattern has exactly one group.

    Args:
        pattern: A pattern that passed :func:`check_pattern`.
        text: Text to search.
        seconds: Time limit for the whole search; within one match it counts the CPU time of the
            process.

    Raises:
        TimeoutError: The limit passed.
    """
    group = 1 if _compiled(pattern).groups == 1 else 0
    found: Span | None = None
    for match in all_matches(pattern, text, seconds=seconds):
        start, end = match.span(group)
        if start < end:
            found = (start, end)
    return found


def all_matches(pattern: str, text: str, *, seconds: float) -> Iterator[regex.Match[str]]:
    """Finds the non-empty matches in order; arguments and errors as for :func:`last_match`."""
    deadline = time.monotonic() + seconds
    for match in _compiled(pattern).finditer(text, timeout=seconds):
        if match.start() < match.end():
            yield match
        if time.monotonic() > deadline:
            raise TimeoutError


@lru_cache(maxsize=32)
def _compiled(pattern: str) -> Any:
    # The module's own cache would keep 500 patterns of up to 15 MB.
    return regex.compile(pattern, cache_pattern=False)


def _most_copies(items: Any) -> int:
    """How often the compiler writes out the part of a parsed pattern that it repeats the most.

    It copies what must occur, and once more what may go on: ``x{3}`` three times, ``x+`` twice.
    """
    most = 1
    for op, value in items:
        inside = max((_most_copies(part) for part in _parts(value)), default=1)
        if str(op).endswith("REPEAT"):
            low, high, _ = value
            inside *= max(1, low + (low < high))
        most = max(most, inside)
    return most


def _parts(value: Any) -> list[Any]:
    """The patterns that a parsed item is made of."""
    if isinstance(value, sre_parser.SubPattern):
        return [value]
    nested = value if isinstance(value, (list, tuple)) else ()
    return [part for item in nested for part in _parts(item)]
