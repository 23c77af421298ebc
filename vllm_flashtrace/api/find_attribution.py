"""Finds the ``flashtrace`` object in whatever an OpenAI client returned.

Invariant: exactly one attribution is found or a ``ValueError`` says why not; nothing is guessed
when a response holds several.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_FIELD = "flashtrace"
_OBJECT = "flashtrace.attribution"


def find_attribution(response: Any) -> tuple[dict[str, Any], str | None]:
    """Finds the one attribution in a response, choice, message, delta, output item or itself.

    Args:
        response: A mapping, or an object with pydantic's ``model_dump`` (the OpenAI client's).

    Returns:
        The ``flashtrace`` object, and the completion's text where the response has it.

    Raises:
        ValueError: There is none, or there are several.
    """
    node = _as_dict(response)
    if node is None:
        raise ValueError(f"cannot look for an attribution in a {type(response).__name__}")
    if node.get("object") == _OBJECT:
        return node, node.get("text")
    found = _search(node)
    if not found:
        raise ValueError(
            "no attribution in this response; was the request sent with a 'flashtrace' field "
            "to a server with the plugin on?"
        )
    if len(found) > 1:
        raise ValueError(f"{len(found)} attributions in this response; pass one choice or item")
    return found[0]


def _search(node: dict[str, Any]) -> list[tuple[dict[str, Any], str | None]]:
    """All attributions in a whole response (``choices``/``output``) or in one part of it."""
    parts = node.get("choices") or node.get("output")
    if isinstance(parts, list):
        return [hit for part in parts if isinstance(part, Mapping) for hit in _search(dict(part))]
    holders = [node, node.get("message"), node.get("delta")]
    for holder in holders:
        if isinstance(holder, Mapping) and isinstance(holder.get(_FIELD), Mapping):
            return [(dict(holder[_FIELD]), _text(node))]
    return []


def _text(node: Mapping[str, Any]) -> str | None:
    """The text a choice, message, delta or output item carries."""
    for holder in (node.get("message"), node.get("delta"), node):
        if not isinstance(holder, Mapping):
            continue
        for key in ("content", "text"):
            value = holder.get(key)
            if isinstance(value, str):
                return value
            if isinstance(value, list):
                texts = [part.get("text") for part in value if isinstance(part, Mapping)]
                return "".join(text for text in texts if isinstance(text, str))
    return None


def _as_dict(response: Any) -> dict[str, Any] | None:
    if isinstance(response, Mapping):
        return dict(response)
    if hasattr(response, "model_dump"):
        dumped = response.model_dump()
        return dumped if isinstance(dumped, dict) else None
    return None
