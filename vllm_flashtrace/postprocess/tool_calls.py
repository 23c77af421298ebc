"""Tool calls of earlier assistant turns, as a chat template writes them.

Invariant: a range given for a call holds its name and all its arguments.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_flashtrace.records import Span


def call_arguments(arguments: Any) -> Mapping[str, Any]:
    """Arguments of a tool call, which clients send as JSON text."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return {}
    return arguments if isinstance(arguments, Mapping) else {}


def tool_call_range(function: Mapping[str, Any], prompt: str, start: int, end: int) -> Span | None:
    """Extends the range of a call's name and text arguments over its other arguments.

    Args:
        function: Name and arguments of the call.
        prompt: The decoded prompt, up to the next text of the client.
        start: Where the first of the call's texts begins.
        end: Where the last of them ends.

    Returns:
        None where numbers, lists or other values are written in a form that is not known.
    """
    arguments = function.get("arguments")
    values = call_arguments(arguments)
    is_opaque = not values and isinstance(arguments, str) and arguments.strip() not in ("", "{}")
    if not is_opaque and all(isinstance(value, str) for value in values.values()):
        return start, end
    for form in _forms(arguments, values):
        at = prompt.find(form, start)
        # Arguments end behind the texts in them; a form that ends earlier is part of the name.
        while 0 <= at <= end - len(form):
            at = prompt.find(form, at + 1)
        if at >= 0:
            return start, at + len(form)
    return None


def _forms(arguments: Any, values: Mapping[str, Any]) -> Iterator[str]:
    """Usual ways to write arguments: as sent, and as JSON with and without blanks."""
    if isinstance(arguments, str):
        yield arguments
    if values:
        for separators in (None, (",", ":")):
            yield json.dumps(values, ensure_ascii=False, separators=separators)
