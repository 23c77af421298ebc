"""Checks of parts of a request body that are handed on as they came.

Invariant: what passes can be copied and walked recursively, and written out as UTF-8.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
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
        return  # Whoever needs the value says so.
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
