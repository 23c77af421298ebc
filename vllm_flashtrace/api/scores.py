"""Token scores, the balance of their mass, and the attribution object read property by property.

Token scores and the sums over them that a reader asks for.

Invariant: a sum is only ever taken over the scores it is given; whether those are all scores of a
prompt is the caller's question.

The ``flashtrace`` object of a response, read property by property.

Invariant: nothing is derived here. A property is what the server or the engine sent, and reading a
score of a trace that has none raises.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vllm_flashtrace.base.errors import TraceError


@dataclass(frozen=True, slots=True)
class TokenScore:
    """One scored prompt token.

    Attributes:
        index: Position among the tokens of the rendered prompt.
        token: The token's text.
        token_id: The token's id in the model's vocabulary.
        score: Share of the answer's information flow that came from this token, in ``[0, 1]``.
        message: Index of the client's message that holds it, None for template tokens.
        start: First character within that message (or the plain prompt), None for template tokens.
        end: One past the last character.
    """

    index: int
    token: str
    token_id: int
    score: float
    message: int | None = None
    start: int | None = None
    end: int | None = None

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> TokenScore:
        """Reads one entry of ``scores``.

        A plain prompt has no messages; its located tokens count as message 0.
        """
        start = entry.get("start")
        message = entry.get("message")
        return cls(
            index=int(entry["index"]),
            token=str(entry["token"]),
            token_id=int(entry["token_id"]),
            score=float(entry["score"]),
            message=0 if message is None and start is not None else message,
            start=start,
            end=entry.get("end"),
        )


@dataclass(frozen=True, slots=True)
class MassBalance:
    """Where the target's whole attribution mass went; the four parts add up to 1.

    Attributes:
        input: Share on prompt tokens: the sum of all scores.
        reasoning: Share still on tokens that recursion follows, after the last hop.
        target: Share on generated tokens that recursion does not follow, the target among them.
        skipped: Share on tokens skipped on request.
    """

    input: float
    reasoning: float
    target: float
    skipped: float

    @classmethod
    def from_hops(cls, hops: Sequence[Mapping[str, Any]]) -> MassBalance:
        """Adds up the hops, each weighted by what all earlier ones left on reasoning.

        Args:
            hops: ``input_mass``, ``reasoning_mass`` and ``target_mass`` per hop, as shares of that
                hop's total; what they lack to 1 is skipped mass.

        Raises:
            ValueError: There are no hops.
        """
        if not hops:
            raise ValueError("this attribution carries no mass per hop")
        weight, to_input, to_target = 1.0, 0.0, 0.0
        for hop in hops:
            to_input += weight * hop["input_mass"]
            to_target += weight * hop["target_mass"]
            weight *= hop["reasoning_mass"]
        return cls(to_input, weight, to_target, max(0.0, 1.0 - to_input - to_target - weight))


def share_of_span(scores: Sequence[TokenScore], start: int, end: int, message: int) -> float:
    """Part of the scores' sum that lies on characters ``[start, end)`` of one message.

    A token overlapping the span counts in full.

    Raises:
        ValueError: The span is empty or no token overlaps it.
    """
    if not 0 <= start < end:
        raise ValueError(f"the span must satisfy 0 <= start < end, got [{start}, {end})")
    inside = [
        score.score
        for score in scores
        if score.message == message
        and score.start is not None
        and score.end is not None
        and score.start < end
        and score.end > start
    ]
    if not inside:
        raise ValueError(f"no prompt token covers [{start}, {end}) of message {message}")
    total = math.fsum(score.score for score in scores)
    return math.fsum(inside) / total if total else 0.0


def find_once(scores: Sequence[TokenScore], text: str) -> tuple[int, int]:
    """Finds a passage of the client's messages from the located tokens alone.

    Returns:
        Message index and first character.

    Raises:
        ValueError: The passage is empty or does not occur exactly once.
    """
    places = []
    for message, content in _spelled_messages(scores).items():
        start = content.find(text)
        while text and start >= 0:
            places.append((message, start))
            start = content.find(text, start + 1)
    if len(places) != 1:
        raise ValueError(f"{text!r} occurs {len(places)} times in the prompt, not once")
    return places[0]


def _spelled_messages(scores: Sequence[TokenScore]) -> dict[int, str]:
    """The messages as far as located tokens spell them out; gaps become NUL characters."""
    characters: dict[int, dict[int, str]] = {}
    for score in scores:
        if score.message is None or score.start is None or score.end is None:
            continue
        if len(score.token) == score.end - score.start:
            spelled = characters.setdefault(score.message, {})
            spelled.update(enumerate(score.token, score.start))
    return {
        message: "".join(spelled.get(i, "\0") for i in range(max(spelled) + 1))
        for message, spelled in characters.items()
        if spelled
    }


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
