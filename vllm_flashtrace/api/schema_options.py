"""The parts of a completion that a request may point at: text, tokens, weights or a tool call.

Invariant: an option object has exactly one key that names its kind (a tool call may have an
argument beside it), and a value of exactly that kind's type and within the limits; anything else
raises a ``RefusedError``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from vllm_flashtrace.api.checks import (
    RefusedError,
    as_span,
    as_tuple,
    as_weights,
    check_integer,
    check_string,
    listed,
)
from vllm_flashtrace.api.limits import RequestLimits
from vllm_flashtrace.api.patterns import PatternError, check_pattern

Position: TypeAlias = Annotated[int, Field(ge=0)]
_TokenSpan: TypeAlias = tuple[Position, Position]


class StrictModel(BaseModel):
    """A part of the field: its keys are known, its types exact, and it never changes."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        validate_default=True,  # A server's limits may be below a default.
    )


class TextTarget(StrictModel):
    """The last occurrence of a text among the generated tokens."""

    text: str = Field(
        min_length=1, description="Text to look for; its last occurrence in the generated text."
    )

    @field_validator("text", mode="before")
    @classmethod
    def _check(cls, value: Any, info: ValidationInfo) -> Any:
        check_string(value, limits_of(info).max_text_length)
        return value


class RegexTarget(StrictModel):
    """The last match of a regular expression in the generated text."""

    regex: str = Field(
        min_length=1,
        description="Regular expression; its last match in the generated text, or what its group "
        "matched if it has exactly one capturing group.",
    )

    @field_validator("regex", mode="before")
    @classmethod
    def _check(cls, value: Any, info: ValidationInfo) -> Any:
        check_string(value, limits_of(info).max_regex_length)
        try:
            check_pattern(value)
        except PatternError as error:
            raise RefusedError(f"is refused: the pattern {error}") from None
        return value


class TokensTarget(StrictModel):
    """Ranges of generated tokens, as given: they may overlap and come in any order."""

    tokens: tuple[_TokenSpan, ...] = Field(
        min_length=1,
        description="Half-open ranges [start, end) of generated tokens, counted from 0.",
    )

    @field_validator("tokens", mode="before")
    @classmethod
    def _check(cls, value: Any, info: ValidationInfo) -> Any:
        spans = as_tuple(value, limits_of(info).max_spans, "[start, end) pairs")
        if not spans:
            raise RefusedError("must hold at least one [start, end) pair")
        return tuple(as_span(index, span) for index, span in enumerate(spans))


class WeightsTarget(StrictModel):
    """A weight for every generated token that matters, as given: not normalised, in any order."""

    weights: dict[Position, Annotated[float, Field(ge=0.0)]] = Field(
        min_length=1,
        description="Weight of each generated token by its index, counted from 0. Weights are "
        "finite, not negative and not all 0; only their proportions matter.",
    )

    @field_validator("weights", mode="before")
    @classmethod
    def _check(cls, value: Any, info: ValidationInfo) -> Any:
        return as_weights(value, limits_of(info).max_weights)


class ToolCallTarget(StrictModel):
    """A generated tool call, or the value of one of its arguments."""

    tool_call: Position = Field(description="Index of the tool call among those generated.")
    argument: str | None = Field(
        default=None,
        description="Name of the argument whose value is explained; without it, the whole call.",
    )

    @field_validator("tool_call", mode="before")
    @classmethod
    def _check_index(cls, value: Any, info: ValidationInfo) -> Any:
        check_integer(value, 0, limits_of(info).max_tool_call_index, alternative="")
        return value

    @field_validator("argument", mode="before")
    @classmethod
    def _check_argument(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None:
            check_string(value, limits_of(info).max_text_length)
        return value


TargetObject: TypeAlias = TextTarget | RegexTarget | TokensTarget | WeightsTarget | ToolCallTarget
ReasoningObject: TypeAlias = TokensTarget | TextTarget

TARGETS: dict[str, type[StrictModel]] = {
    "text": TextTarget,
    "regex": RegexTarget,
    "tokens": TokensTarget,
    "weights": WeightsTarget,
    "tool_call": ToolCallTarget,
}
REASONING: dict[str, type[StrictModel]] = {"tokens": TokensTarget, "text": TextTarget}


def limits_of(info: ValidationInfo) -> RequestLimits:
    """The limits that validation was started with, or the defaults."""
    return info.context if isinstance(info.context, RequestLimits) else RequestLimits()


def word_or_object(
    value: Any,
    words: tuple[str, ...],
    models: Mapping[str, type[StrictModel]],
    info: ValidationInfo,
) -> Any:
    """Takes one of the words, or an object read by the model that its one key names."""
    if isinstance(value, StrictModel) or (isinstance(value, str) and value in words):
        return value
    expected = f"{listed(words)}, or an object with exactly one key out of {listed(models)}"
    if not isinstance(value, dict):
        raise RefusedError(f"must be {expected}")
    kinds = [key for key in value if key in models]
    model = models[kinds[0]] if len(kinds) == 1 else None
    # A key that goes with another kind is known, but it is none of this one's.
    known = {*models, *(name for kind in models.values() for name in kind.model_fields)}
    for key in value:
        if key not in (known if model is None else {*models, *model.model_fields}):
            raise RefusedError("is not a known key", str(key), value[key])
    if model is None:
        raise RefusedError(f"must be {expected}")
    return model.model_validate(value, context=info.context)
