"""Hand-made attributions for tests of everything that only reads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from vllm_flashtrace.api.attribution import Attribution
from vllm_flashtrace.api.response import AttributionObject

PREFIX = ["<|start|>", "user", "\n"]
SUFFIX = ["\n", "assistant"]


def response(
    own: list[tuple[str, float]], *, top_k: int | None = None, tokens: bool = True, **extra: Any
) -> dict[str, Any]:
    """A ``flashtrace`` object for a one-message prompt.

    Args:
        own: Text and unnormalised score of the user's tokens; the template adds a start token
            worth 2 and others worth 0. Scores are scaled to an input mass of 0.8.
        top_k: Return the highest scores only.
        tokens: Add the prompt's token texts.
        **extra: Overrides.
    """
    rows: list[dict[str, Any]] = []
    position = 0
    weighted = [(text, 2.0 if text == "<|start|>" else 0.0, True) for text in PREFIX]
    weighted += [(text, score, False) for text, score in own]
    weighted += [(text, 0.0, True) for text in SUFFIX]
    total = sum(score for _, score, _ in weighted)
    for index, (text, score, template) in enumerate(weighted):
        row = {"index": index, "token": text, "token_id": 100 + index, "score": 0.8 * score / total}
        if not template:
            row |= {"message": 0, "start": position, "end": position + len(text)}
            position += len(text)
        rows.append(row)
    data: dict[str, Any] = {
        "id": "ft-1",
        "object": "flashtrace.attribution",
        "status": "completed",
        "target": {"text": "7306", "tokens": [[3, 7]]},
        "scores": sorted(rows, key=lambda row: -row["score"])[:top_k] if top_k else rows,
        "remaining_mass": 0.05,
        "hops": [
            {"hop": 0, "input_mass": 0.6, "reasoning_mass": 0.25, "target_mass": 0.15},
            {"hop": 1, "input_mass": 0.8, "reasoning_mass": 0.2, "target_mass": 0.0},
        ],
        "usage": {"recomputed_tokens": 9, "cached_tokens": 16, "seconds": {"prefill": 0.5}},
    }
    if tokens:
        data["tokens"] = [row["token"] for row in rows]
    return data | extra


def sample(own: list[tuple[str, float]], text: str = "It is 7306.", **options: Any) -> Attribution:
    """The attribution of :func:`response` with a completion text."""
    return Attribution(response(own, **options), text=text)


def check_described(data: dict[str, Any]) -> AttributionObject:
    """Holds an object as it is sent against its description: every key is there, none is null."""
    described = AttributionObject.model_validate(data, strict=False)
    for part in _parts(described):
        assert not part.model_extra, f"{type(part).__name__} does not describe {part.model_extra}"
        assert None not in [getattr(part, name) for name in part.model_fields_set]
    return described


def _parts(value: Any) -> Iterator[BaseModel]:
    if isinstance(value, BaseModel):
        yield value
        value = list(vars(value).values())
    for item in value if isinstance(value, list) else ():
        yield from _parts(item)


def haystack(before: int = 200, after: int = 200) -> list[tuple[str, float]]:
    """Filler with a hot fact inside."""
    filler = [(word, 0.001) for word in (" grass", " is", " green", ".")]
    fact = [(" The", 0.3), (" code", 1.0), (" is", 0.4), (" ", 0.3), ("7306", 4.0), (".", 0.5)]
    return filler * (before // 4) + fact + filler * (after // 4)
