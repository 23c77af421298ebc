"""The object a client works with: one completion and where it came from.

Finds the ``flashtrace`` object in whatever an OpenAI client returned.

Invariant: exactly one attribution is found or a ``ValueError`` says why not; nothing is guessed
when a response holds several.

Invariant: nothing here computes scores. An ``Attribution`` is a read-only view of the
``flashtrace`` object a server or an engine produced; what it derives from the scores are sums.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_flashtrace.api.scores import (
    AttributionObject,
    MassBalance,
    TokenScore,
    find_once,
    share_of_span,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

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


__all__ = ["Attribution", "MassBalance", "TokenScore"]

_COMPLETE_TOLERANCE = 1e-4
# Half of a character outside the basic plane, which a token or a truncated text may end in. UTF-8
# has no form for it.
_SURROGATE = re.compile("[\ud800-\udfff]")


class Attribution(AttributionObject):
    """One completion and the prompt tokens it came from."""

    @classmethod
    def from_response(cls, response: Any) -> Attribution:
        """Finds the attribution in what an OpenAI client returned.

        Args:
            response: A choice, a final or accumulated stream message, a delta, a whole response
                with one choice or one output text, the ``flashtrace`` object itself, or any of
                these as a plain dict.

        Returns:
            The attribution. A failed, skipped or queued one is returned too (see ``status``);
            reading its scores raises.

        Raises:
            ValueError: There is no attribution in ``response``, or there are several.
        """
        data, text = find_attribution(response)
        return cls(data, text=text)

    @cached_property
    def mass(self) -> MassBalance:
        """Where all of the mass went, over all hops.

        Raises:
            TraceError: The trace has no result.
        """
        return MassBalance.from_hops(self.hops)

    @property
    def input_mass(self) -> float:
        """Share of the mass on prompt tokens: the sum of the scores of all of them.

        Raises:
            TraceError: The trace has no result.
        """
        if self._prompt_length() == len(self.scores):
            return math.fsum(score.score for score in self.scores)
        return self.mass.input

    @property
    def is_complete(self) -> bool:
        """Whether ``scores`` carry the whole input mass (``top_k: null``, or nothing cut off).

        Raises:
            TraceError: The trace has no result.
        """
        length = self._prompt_length()
        if length is not None and length == len(self.scores):
            return True
        total = math.fsum(score.score for score in self.scores)
        return abs(total - self.mass.input) <= _COMPLETE_TOLERANCE * max(total, 1e-9)

    def top(self, k: int = 10) -> list[TokenScore]:
        """The ``k`` highest-scored tokens, highest first, ties in prompt order.

        Raises:
            TraceError: The trace has no result.
            ValueError: ``k`` is negative.
        """
        if k < 0:
            raise ValueError(f"k must not be negative, got {k}")
        return sorted(self.scores, key=lambda score: (-score.score, score.index))[:k]

    def share(self, start: int, end: int, message: int = 0) -> float:
        """Part of the input mass on a character span of the prompt.

        Args:
            start: First character within the message (or the plain prompt).
            end: One past the last character. A token overlapping the span counts in full.
            message: Index of the client's message; 0 for a plain prompt.

        Returns:
            A number in ``[0, 1]``; 0 if the whole input mass is 0.

        Raises:
            TraceError: The trace has no result.
            ValueError: The span is empty or covers no token, or the scores are only the top k.
        """
        self._require_complete()
        return share_of_span(self.scores, start, end, message)

    def share_of_text(self, text: str) -> float:
        """Part of the input mass on a passage that occurs once in the client's messages.

        Raises:
            TraceError: The trace has no result.
            ValueError: The passage is empty, does not occur, occurs more than once, or the scores
                are only the top k.
        """
        self._require_complete()
        message, start = find_once(self.scores, text)
        return share_of_span(self.scores, start, start + len(text), message)

    def to_json(self, path: str | Path | None = None) -> str:
        """``to_dict`` as JSON text, also written to ``path`` if one is given.

        ``Attribution.from_response(json.loads(text))`` reads it back.
        """
        document = json.dumps(self.to_dict(), ensure_ascii=False, indent=2) + "\n"
        document = _SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", document)
        if path is not None:
            Path(path).write_text(document, "utf-8")
        return document

    def to_html(self, path: str | Path | None = None) -> str:
        """A self-contained page with the heat-map, also written to ``path`` if one is given."""
        from vllm_flashtrace.api.html import render_page

        page = render_page(self)
        if path is not None:
            Path(path).write_text(page, "utf-8")
        return page

    def _repr_html_(self) -> str:
        from vllm_flashtrace.api.html import render_fragment

        return render_fragment(self)

    def __rich__(self) -> RenderableType:
        from vllm_flashtrace.api.terminal import render_terminal

        return render_terminal(self)

    def __str__(self) -> str:
        if self.status != "completed":
            return f"Attribution({self._no_result_reason()})"
        top = ", ".join(f"{score.token!r} {score.score:.3f}" for score in self.top(3))
        return f"Attribution(target={self.target['text']!r}, input {self.input_mass:.1%}: {top})"

    __repr__ = __str__

    def _require_complete(self) -> None:
        if not self.is_complete:
            raise ValueError(
                f"only {len(self.scores)} scores were returned; ask for all of them with "
                "flashtrace={'top_k': None}"
            )
