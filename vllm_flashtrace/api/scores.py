"""The ``flashtrace`` object of a response, read property by property.

Invariant: nothing is derived here. A property is what the server or the engine sent, and reading a
score of a trace that has none raises.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from vllm_flashtrace.api.token_scores import TokenScore
from vllm_flashtrace.base.errors import TraceError


class AttributionObject:
    """One ``flashtrace`` object, with the texts that it may come without."""

    def __init__(
        self,
        data: Mapping[str, Any],
        *,
        text: str | None = None,
        prompt_tokens: Sequence[str] | None = None,
    ) -> None:
        """Wraps one ``flashtrace`` object.

        Args:
            data: The object as the server sends it. It is copied.
            text: The completion's text, if known.
            prompt_tokens: Text of every prompt token; read from ``data["tokens"]`` if None.

        Raises:
            ValueError: ``data`` is no attribution object.
        """
        if not isinstance(data, Mapping) or "status" not in data:
            raise ValueError("not a flashtrace attribution object: it has no 'status'")
        self._data: dict[str, Any] = copy.deepcopy(dict(data))
        self.text: str | None = text if text is not None else self._data.get("text")
        tokens = prompt_tokens if prompt_tokens is not None else self._data.get("tokens")
        self.prompt_tokens: list[str] | None = None if tokens is None else list(tokens)

    @property
    def id(self) -> str | None:
        """The attribution's id."""
        return self._data.get("id")

    @property
    def status(self) -> str:
        """``completed``, ``queued``, ``failed`` or ``skipped``."""
        return str(self._data["status"])

    @property
    def error(self) -> dict[str, Any] | None:
        """``{"code", "message"}`` of a failed or skipped trace, else None."""
        return self._data.get("error")

    @cached_property
    def scores(self) -> list[TokenScore]:
        """The scores returned, in the order they came.

        Raises:
            TraceError: The trace has no result.
        """
        return [TokenScore.from_dict(entry) for entry in self._result()["scores"]]

    @property
    def remaining_mass(self) -> float:
        """Mass still on reasoning after the last hop, as the tracer reported it.

        Raises:
            TraceError: The trace has no result.
        """
        return float(self._result()["remaining_mass"])

    @property
    def target(self) -> dict[str, Any]:
        """The explained span: ``{"text", "tokens"}``, tokens counted from the first generated one.

        Raises:
            TraceError: The trace has no result.
        """
        return dict(self._result()["target"])

    @property
    def hops(self) -> list[dict[str, Any]]:
        """Mass per hop, each relative to that hop's own total."""
        return list(self._result().get("hops") or [])

    @property
    def segments(self) -> list[dict[str, Any]]:
        """Score per message, if asked for."""
        return list(self._result().get("segments") or [])

    @property
    def sentences(self) -> list[dict[str, Any]]:
        """Score per sentence of the prompt, the highest mean first, if asked for."""
        return list(self._result().get("sentences") or [])

    @property
    def generated(self) -> list[dict[str, Any]]:
        """Scores on generated tokens, if asked for."""
        return list(self._result().get("generated") or [])

    @property
    def usage(self) -> dict[str, Any]:
        """What the trace cost."""
        return dict(self._result().get("usage") or {})

    def to_dict(self) -> dict[str, Any]:
        """The ``flashtrace`` object, with ``text`` and ``tokens`` added where known."""
        data = copy.deepcopy(self._data)
        if self.text is not None:
            data["text"] = self.text
        if self.prompt_tokens is not None:
            data["tokens"] = list(self.prompt_tokens)
        return data

    def _result(self) -> dict[str, Any]:
        """The data of a completed trace."""
        if self.status != "completed":
            code = (self.error or {}).get("code", self.status)
            raise TraceError(str(code), self._no_result_reason())
        return self._data

    def _no_result_reason(self) -> str:
        reason = f"the trace {self.id or ''} is {self.status}".replace("  ", " ")
        if self.error:
            reason += f" ({self.error.get('code')}: {self.error.get('message')})"
        return reason

    def _prompt_length(self) -> int | None:
        if self.prompt_tokens is not None:
            return len(self.prompt_tokens)
        return self._data.get("prompt_tokens")
