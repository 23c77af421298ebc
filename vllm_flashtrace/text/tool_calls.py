"""Tool calls of earlier assistant turns, as a chat template writes them.

Invariant: a range given for a call holds its name and all its arguments.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_flashtrace.base.records import Span


def call_arguments(arguments: Any) -> Mapping[str, Any]:
    """Arguments of a tool call, which clients send as JSON text."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return {}
    return arguments if isinstance(arguments, Mapping) else {}


def tool_call_range(
    function: Mapping[str, Any],
    prompt: str,
    start: int,
    end: int,
    *,
    in_front: Span | None = None,
) -> Span | None:
    """Extends the range of a call's name and text arguments over its other arguments.

    Args:
        function: Name and arguments of the call.
        prompt: The decoded prompt, up to the next text of the client.
        start: Where the first of the call's texts begins.
        end: Where the last of them ends.
        in_front: Where the arguments lie if the template writes them in front of the name: between
            the last text before the call, and the name.

    Returns:
        None where numbers, lists or other values are written in a form that is not known.
    """
    if not has_other_values(function):
        return start, end
    arguments = function.get("arguments")
    for form in _forms(arguments, call_arguments(arguments)):
        if in_front is not None:
            at = prompt.rfind(form, *in_front)
            if at >= 0:
                return min(start, at), end
            continue
        at = prompt.find(form, start)
        # Arguments end behind the texts in them; a form that ends earlier is part of the name.
        while 0 <= at <= end - len(form):
            at = prompt.find(form, at + 1)
        if at >= 0:
            return start, at + len(form)
    return None


def has_other_values(function: Mapping[str, Any]) -> bool:
    """Whether a call has arguments that are not texts, or none that can be read."""
    arguments = function.get("arguments")
    values = call_arguments(arguments)
    is_opaque = not values and isinstance(arguments, str) and arguments.strip() not in ("", "{}")
    return is_opaque or not all(isinstance(value, str) for value in values.values())


def holds_arguments_of(function: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether a call's arguments, as written, may hold another one's."""
    arguments = other.get("arguments")
    wanted = list(_forms(arguments, call_arguments(arguments)))
    arguments = function.get("arguments")
    written = list(_forms(arguments, call_arguments(arguments)))
    return any(form in text for form in wanted for text in written)


def _forms(arguments: Any, values: Mapping[str, Any]) -> Iterator[str]:
    """Usual ways to write arguments: as sent, and as JSON with and without blanks."""
    if isinstance(arguments, str):
        yield arguments
    if values:
        for separators in (None, (",", ":")):
            yield json.dumps(values, ensure_ascii=False, separators=separators)
