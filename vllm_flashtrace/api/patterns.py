"""Regular expressions sent by clients: checked before use, and searched against a clock.

Invariant: a pattern that is accepted has no exponentially ambiguous loop, and a search ends soon
after its time limit whatever the pattern and the text.
"""

from __future__ import annotations

import re
import re._parser as sre_parser  # type: ignore[import-not-found]
import time
import warnings
from functools import lru_cache
from typing import Any

import regex

from vllm_flashtrace.api.ambiguity import TooComplexError, is_ambiguous
from vllm_flashtrace.base.records import Span

# The `regex` module reads "{e<=1}" as approximate matching, the standard library as plain text.
_OPAQUE = r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]"  # Escapes and character classes.
_APPROXIMATE = re.compile(_OPAQUE + r"|\{\d*,?\d*\}|(\{[\sidse\d+<=,]+(?::[^}]*)?\})", re.DOTALL)
# It also reads "[[:alpha:]]" as a class of letters, the standard library as "[", ":", "a", ...
_NAMED_CLASS = re.compile(r"\[:\^?\w+:\]")
_ALTERNATIVE = re.compile(_OPAQUE + r"|(\|)", re.DOTALL)
_IGNORE_CASE_GROUP = re.compile(r"\(\?[a-zA-Z]*i")


class PatternError(ValueError):
    """A pattern that is refused; the text completes the sentence "the pattern …"."""


@lru_cache(maxsize=256)  # Remembers the accepted ones; a refusal is raised, not stored.
def check_pattern(pattern: str) -> None:
    """Refuses a pattern that is malformed, matches only ``""`` or may take exponential time.

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
            if sre_parser.parse(pattern).getwidth()[1] == 0:
                raise PatternError("matches only the empty string")
            # The standard parser merges alternatives ("a|a" into "a"), but the engine that runs
            # the pattern does not; an empty lookahead in front of each keeps them apart.
            parsed = sre_parser.parse(_ALTERNATIVE.sub(_keep_apart, pattern))
            ignore_case = _IGNORE_CASE_GROUP.search(pattern) is not None
            if is_ambiguous(parsed, ignore_case=ignore_case):
                raise PatternError(
                    "repeats parts that can match the same text in several ways, "
                    "which can take exponential time"
                )
            _compiled(pattern)
    except RecursionError:
        raise PatternError("is nested too deeply") from None
    except TooComplexError as error:
        raise PatternError(str(error)) from None
    except (re.error, regex.error, OverflowError) as error:
        raise PatternError(f"is not valid: {error}") from None


def last_match(pattern: str, text: str, *, seconds: float) -> Span | None:
    """Finds the last non-empty match, or its group's range if the pattern has exactly one group.

    Args:
        pattern: A pattern that passed :func:`check_pattern`.
        text: Text to search.
        seconds: Time limit for the whole search.

    Raises:
        TimeoutError: The limit passed.
    """
    compiled = _compiled(pattern)
    group = 1 if compiled.groups == 1 else 0
    deadline = time.monotonic() + seconds
    found: Span | None = None
    for match in compiled.finditer(text, timeout=seconds):
        start, end = match.span(group)
        if start < end:
            found = (start, end)
        if time.monotonic() > deadline:
            raise TimeoutError
    return found


@lru_cache(maxsize=64)
def _compiled(pattern: str) -> Any:
    return regex.compile(pattern)


def _keep_apart(found: re.Match[str]) -> str:
    return "|(?=)" if found.group(1) else found.group()
