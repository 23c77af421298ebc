"""Checks of single values of a request body, and how a refused value is shown.

Two kinds: checks of parts that are handed on as they came (messages, prompts), after which these
can be copied, walked recursively and written out as UTF-8; and checks of values of the
``flashtrace`` field, which accept exactly the type asked for (no ``"1"`` or ``True`` for 1) and
otherwise raise a :class:`RefusedError` whose text completes the sentence "the field …".
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from vllm_flashtrace.base.errors import InvalidRequestError

# Copying takes two Python frames a level, and the interpreter allows about 1,000 in all.
MAX_NESTING = 128


def check_nesting(value: Any, param: str) -> None:
    """Refuses JSON that is nested deeper than `MAX_NESTING` levels.

    Args:
        value: JSON as decoded; other objects count as leaves.
        param: Path of the value in the request body.

    Raises:
        InvalidRequestError: Naming ``param``.
    """
    for _ in _texts(value, param):
        pass


def check_messages(messages: Sequence[Any], param: str) -> None:
    """Refuses chat messages that `check_nesting` refuses, or whose tool calls' arguments it does.

    Args:
        messages: Chat messages; arguments are JSON text, which vLLM decodes to render them.
        param: Path of the messages in the request body.

    Raises:
        InvalidRequestError: Naming ``param``.
    """
    check_nesting(messages, param)
    for message in messages:
        calls = message.get("tool_calls") if isinstance(message, Mapping) else None
        for call in calls if isinstance(calls, (list, tuple)) else ():
            function = call.get("function") if isinstance(call, Mapping) else None
            arguments = function.get("arguments") if isinstance(function, Mapping) else None
            if isinstance(arguments, str):
                _check_encoded(arguments, param)


def check_text(value: Any, param: str) -> None:
    """Refuses what `check_nesting` refuses, and text that holds lone surrogates.

    Args:
        value: JSON as decoded; other objects count as leaves.
        param: Path of the value in the request body.

    Raises:
        InvalidRequestError: Naming ``param``.
    """
    for text in _texts(value, param):
        if not is_unicode(text):
            raise InvalidRequestError(param, f"{param} holds a lone surrogate, {text!a:.80}")


def is_unicode(text: str) -> bool:
    """Whether the text can be written as UTF-8; JSON escapes can make lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_encoded(text: str, param: str) -> None:
    try:
        value = json.loads(text)
    except ValueError:
        return  # vLLM refuses it where it renders the message.
    except RecursionError:
        raise _too_deep(param) from None
    check_nesting(value, param)


def _too_deep(param: str) -> InvalidRequestError:
    return InvalidRequestError(param, f"{param} is nested deeper than {MAX_NESTING} levels")


def _texts(value: Any, param: str) -> Iterator[str]:
    """All strings in ``value``, keys included, without recursion."""
    pending = [(value, 1)]
    while pending:
        node, depth = pending.pop()
        if isinstance(node, str):
            yield node
            continue
        parts: Any = ()
        if isinstance(node, Mapping):
            parts = (*node.keys(), *node.values())
        elif isinstance(node, (list, tuple)):
            parts = node
        if depth > MAX_NESTING and parts:
            raise _too_deep(param)
        pending += [(part, depth + 1) for part in parts]


_INDEX = re.compile(r"0|[1-9][0-9]{0,17}")
_SHOWN_LENGTH = 80
_MAX_WEIGHT = 1e30  # Sums of weights up to this, and its inverse, are normal numbers in float32.


class RefusedError(ValueError):
    """What is wrong with a value ("must not be empty"), or with a part of it.

    Attributes:
        key: Key or index of the part; None where the whole value, or a key itself, is wrong.
        value: The value to show; absent where it is the whole value.
    """

    def __init__(self, phrase: str, key: int | str | None = None, *value: Any) -> None:
        super().__init__(phrase)
        self.key = key
        self.value = value


def check_string(value: Any, max_length: int, *part: Any) -> None:
    """Refuses what is not a non-empty string; `part` is its key and value within a list."""
    if not isinstance(value, str):
        raise RefusedError("must be a string", *part)
    if not value:
        raise RefusedError("must not be empty", *part)
    if len(value) > max_length:
        raise RefusedError(f"must have at most {max_length} characters", *part)
    if not is_unicode(value):
        raise RefusedError("must not hold lone surrogates", *part)


def check_integer(value: Any, low: int, high: int, *, alternative: str) -> None:
    """Refuses what is not an integer in ``[low, high]``; `alternative` ends the message."""
    if not _is_integer(value) or value < low:
        raise RefusedError(f"must be an integer of at least {low}{alternative}")
    if value > high:
        raise RefusedError(f"must be at most {high}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def as_tuple(value: Any, max_length: int | None, items: str) -> tuple[Any, ...]:
    """Takes a JSON array; `items` says in a message what it should hold."""
    if not isinstance(value, (list, tuple)):
        raise RefusedError(f"must be a list of {items}")
    if max_length is not None and len(value) > max_length:
        raise RefusedError(f"must have at most {max_length} entries, has {len(value)}")
    return tuple(value)


def as_range(value: Any, *part: Any) -> tuple[int, int]:
    """Takes a half-open range that holds at least one position; `part` as in `check_string`."""
    if (
        not isinstance(value, (list, tuple))
        or len(value) != 2
        or not all(_is_integer(position) for position in value)
    ):
        raise RefusedError("must be a [start, end) pair of integers", *part)
    start, end = value
    if start < 0:
        raise RefusedError("must not start below 0", *part)
    if start >= end:
        raise RefusedError("must end after it starts", *part)
    return start, end


def as_span(index: int, value: Any) -> tuple[int, int]:
    """Takes a half-open range, entry `index` of a list."""
    return as_range(value, index, value)


def as_weights(value: Any, max_length: int) -> dict[int, float]:
    """Takes weights by token index; JSON writes the indices as decimal strings."""
    if not isinstance(value, dict):
        raise RefusedError("must be an object of weights by token index")
    if not value:
        raise RefusedError("must not be empty")
    if len(value) > max_length:
        raise RefusedError(f"must have at most {max_length} entries, has {len(value)}")
    weights: dict[int, float] = {}
    for key, weight in value.items():
        index = int(key) if isinstance(key, str) and _INDEX.fullmatch(key) else key
        if not _is_integer(index) or index < 0:
            raise RefusedError(
                "must have token indices, integers of at least 0, as keys", None, key
            )
        if index in weights:
            raise RefusedError("has the same index twice", None, key)
        weights[index] = _weight(key, weight)
    if sum(weights.values()) < 1 / _MAX_WEIGHT:
        raise RefusedError("must not all be 0")
    return weights


def _weight(key: Any, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise RefusedError("must be a number", str(key), value)
    if not 0 <= value <= _MAX_WEIGHT:  # Refuses NaN, too.
        raise RefusedError(f"must be a number from 0 to {_MAX_WEIGHT:g}", str(key), value)
    return float(value)


class _ShortJson(reprlib.Repr):
    """JSON that stays short and never fails, however large or deep the value."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = _SHOWN_LENGTH

    def repr_str(self, value: str, level: int) -> str:
        return as_unicode(json.dumps(value[:_SHOWN_LENGTH], ensure_ascii=False))

    def repr_bool(self, value: bool, level: int) -> str:
        return json.dumps(value)

    def repr_NoneType(self, value: None, level: int) -> str:
        return json.dumps(value)

    def repr_float(self, value: float, level: int) -> str:
        return json.dumps(value)

    def repr_tuple(self, value: tuple[Any, ...], level: int) -> str:
        return self.repr_list(list(value), level)

    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to write out integers of thousands of digits.
        if value.bit_length() > 1024:
            return f"<an integer of {value.bit_length()} bits>"
        return super().repr_int(value, level)


def shown(value: Any) -> str:
    """A value as a message shows it: as JSON, in at most 80 characters."""
    return shortened(_ShortJson().repr(value))


def as_unicode(text: str) -> str:
    """The text with its lone surrogates escaped."""
    return text.encode(errors="backslashreplace").decode()


def shortened(text: str) -> str:
    """The text, cut to at most 80 characters."""
    return text if len(text) <= _SHOWN_LENGTH else text[: _SHOWN_LENGTH - 1] + "…"


def listed(words: Iterable[str]) -> str:
    """The words quoted, as in ``'a', 'b' or 'c'``."""
    *head, tail = (repr(word) for word in words)
    return f"{', '.join(head)} or {tail}" if head else tail
