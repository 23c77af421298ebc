"""The heat scale and the tokens to draw, shared by the HTML and the terminal rendering.

A token whose score was not returned is not the same as a token of score 0: its score is None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_flashtrace.api.attribution import Attribution
from vllm_flashtrace.api.response import TokenScore

LEVELS = 8


@dataclass(frozen=True, slots=True)
class HeatToken:
    """One token of a heat-map.

    Attributes:
        index: Position in the prompt (or among the generated tokens).
        text: The token's text.
        score: Its score, None if none was returned.
        level: 0 (no background) to ``LEVELS``.
        is_template: Whether the chat template, not the client, wrote the token.
    """

    index: int
    text: str
    score: float | None
    level: int
    is_template: bool = False


def heat_scale(scores: Sequence[TokenScore]) -> float:
    """The score drawn at full heat.

    The highest score on the client's own text, so that a template token that soaks up attention
    (it is then drawn at full heat) does not wash out the rest; the highest score of all if no token
    is located.
    """
    own = [score.score for score in scores if score.message is not None]
    return max(own or [score.score for score in scores], default=0.0)


def heat_level(score: float, scale: float) -> int:
    """Level of a score: proportional to its square root, since scores span orders of magnitude.

    Rounded down, so that the many scores under 1/64 of the scale stay uncoloured.
    """
    if scale <= 0.0 or score <= 0.0:
        return 0
    return math.floor(min(LEVELS, LEVELS * math.sqrt(score / scale)))


def level_floor(level: int, scale: float) -> float:
    """Lowest score drawn at ``level``."""
    return scale * (level / LEVELS) ** 2


def prompt_heat(attribution: Attribution) -> list[HeatToken] | None:
    """All tokens of the prompt, or None if their texts were not returned."""
    by_index = {score.index: score for score in attribution.scores}
    texts = attribution.prompt_tokens
    if texts is None:
        if not by_index or sorted(by_index) != list(range(len(by_index))):
            return None
        if not attribution.is_complete:
            return None
        texts = [by_index[i].token for i in range(len(by_index))]
    scale = heat_scale(attribution.scores)
    located = any(score.message is not None for score in attribution.scores)
    tokens = []
    for index, text in enumerate(texts):
        score = by_index.get(index)
        template = located and score is not None and score.message is None
        value = None if score is None else score.score
        tokens.append(HeatToken(index, text, value, heat_level(value or 0.0, scale), template))
    return tokens


def completion_parts(attribution: Attribution) -> list[tuple[str, bool]]:
    """The completion's text in pieces, each with whether it is part of the target.

    The target is found as the last occurrence of its text; where the text does not hold it (parsed
    away, a tool call) the completion stays one unmarked piece.
    """
    text = attribution.text or ""
    target = str(attribution.target.get("text") or "")
    start = text.rfind(target) if target else -1
    if start < 0:
        return [(text, False)] if text else []
    end = start + len(target)
    pieces = [(text[:start], False), (text[start:end], True), (text[end:], False)]
    return [piece for piece in pieces if piece[0]]


def name_of(score: TokenScore) -> str:
    """A token for tables: its text made visible, or which part of which image it stands for."""
    if score.image is None:
        return visible(score.token)
    place = "" if score.row is None else f", row {score.row}, column {score.column}"
    return f"image {score.image}{place}"


def visible(token: str) -> str:
    """A token with its blanks, or that it has no text of its own, made visible, for tables."""
    if not token:
        return "∅"
    shown = token.replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍")
    return shown.replace(" ", "␣") if shown != shown.strip(" ") or not shown.strip() else shown
