"""The ``flashtrace`` field of a request: its shape, its defaults and what it may ask for.

Invariant: a :class:`FlashTraceRequest` is well-formed and within the server's limits; anything else
is refused by an :class:`InvalidRequestError` that names the field and the value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from vllm_flashtrace.api.checks import (
    RefusedError,
    as_tuple,
    as_unicode,
    check_integer,
    check_string,
    listed,
    shortened,
    shown,
)
from vllm_flashtrace.api.limits import RequestLimits
from vllm_flashtrace.api.schema_options import (
    REASONING,
    TARGETS,
    Position,
    ReasoningObject,
    StrictModel,
    TargetObject,
    TokensTarget,
    WeightsTarget,
    limits_of,
    word_or_object,
)
from vllm_flashtrace.base.errors import InvalidRequestError

FIELD = "flashtrace"

Include: TypeAlias = Literal["hops", "generated", "segments", "sentences", "layers", "tokens"]

_INCLUDES = get_args(Include)

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {},
    "sources": {"hops": "auto", "skip_tokens": "punctuation", "include": ("sentences",)},
}
"""Defaults by name: ``"paper"`` is one hop of the paper's formula as it is; ``"sources"`` is what
found the most known sources in ``benchmarks/faithfulness``."""


class FlashTraceRequest(StrictModel):
    """Asks which prompt tokens a completion, or a part of it, came from."""

    target: Literal["output", "generated"] | TargetObject = Field(
        default="output",
        description="What to explain: 'output' (the answer after reasoning), 'generated' "
        "(everything generated), or a part of the generated text.",
    )
    hops: Position | Literal["auto"] = Field(
        default=1, description="Number of recursive hops through the reasoning, or 'auto'."
    )
    reasoning: Literal["auto", "none"] | ReasoningObject = Field(
        default="auto",
        description="What counts as reasoning: 'auto' (the server's reasoning parser, else <think> "
        "tags, else everything generated before the first target token), 'none', or a part of "
        "the generated text.",
    )
    recurse_over: Literal["reasoning", "generated", "assistant"] = Field(
        default="reasoning",
        description="Tokens that the hops go through: 'reasoning', 'generated', or 'assistant' "
        "(generated tokens and the prompt's earlier assistant turns and tool calls).",
    )
    skip_tokens: Literal["none", "punctuation"] | tuple[str, ...] = Field(
        default="none",
        description="Tokens that get no score: 'none', 'punctuation', or a list of strings.",
    )
    top_k: Annotated[int, Field(ge=1)] | None = Field(
        default=20, description="How many scored tokens to return; null returns all of them."
    )
    include: tuple[Include, ...] = Field(
        default=(), description="Additional parts of the response."
    )
    preset: Literal["paper", "sources"] = Field(
        default="paper",
        description="Defaults of the other keys: 'paper', as given with each key, or 'sources': "
        "hops 'auto', skip_tokens 'punctuation' and include ['sentences'].",
    )
    mode: Literal["inline", "deferred"] = Field(
        default="inline",
        description="'inline' answers once the attribution is there, 'deferred' at once with its "
        "id, under which GET /v1/attributions/{id} gives it later.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, value: Any) -> Any:
        preset = value.get("preset") if isinstance(value, Mapping) else None
        if isinstance(preset, str) and preset in PRESETS:
            return {**PRESETS[preset], **value}
        return value

    @field_validator("target", mode="before")
    @classmethod
    def _check_target(cls, value: Any, info: ValidationInfo) -> Any:
        return word_or_object(value, ("output", "generated"), TARGETS, info)

    @field_validator("reasoning", mode="before")
    @classmethod
    def _check_reasoning(cls, value: Any, info: ValidationInfo) -> Any:
        return word_or_object(value, ("auto", "none"), REASONING, info)

    @field_validator("hops", mode="before")
    @classmethod
    def _check_hops(cls, value: Any, info: ValidationInfo) -> Any:
        if not (isinstance(value, str) and value == "auto"):
            check_integer(value, 0, limits_of(info).max_hops, alternative=" or 'auto'")
        return value

    @field_validator("skip_tokens", mode="before")
    @classmethod
    def _check_skip_tokens(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str) and value in ("none", "punctuation"):
            return value
        limits = limits_of(info)
        strings = as_tuple(value, limits.max_skip_tokens, "strings, 'none' or 'punctuation'")
        for index, string in enumerate(strings):
            check_string(string, limits.max_text_length, index, string)
        return strings

    @field_validator("top_k", mode="before")
    @classmethod
    def _check_top_k(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None:
            check_integer(value, 1, limits_of(info).max_top_k, alternative=" or null")
        return value

    @field_validator("include", mode="before")
    @classmethod
    def _check_include(cls, value: Any) -> Any:
        names = as_tuple(value, None, f"names out of {listed(_INCLUDES)}")
        for index, name in enumerate(names):
            if not (isinstance(name, str) and name in _INCLUDES):
                raise RefusedError(f"must be {listed(_INCLUDES)}", index, name)
        return tuple(dict.fromkeys(names))


def parse_flashtrace_field(value: Any, limits: RequestLimits) -> FlashTraceRequest | None:
    """Validates the ``flashtrace`` field of a request body.

    Args:
        value: The field as decoded from JSON, or None where the body has none.
        limits: The most a request may ask for.

    Returns:
        The request with its defaults filled in, or None where no attribution is asked for.

    Raises:
        InvalidRequestError: Naming the field and the value that are refused.
    """
    if value is None or value is False:
        return None
    if value is True:
        value = {}
    if not isinstance(value, Mapping):
        raise _refusal((), "must be true, false, null or an object", value)
    try:
        return FlashTraceRequest.model_validate(dict(value), context=limits)
    except ValidationError as error:
        raise _translated(error) from None


def check_against_limit(request: FlashTraceRequest, max_generated_tokens: int) -> None:
    """Refuses token indices that no completion of this length can have.

    Args:
        request: A validated request.
        max_generated_tokens: The most tokens that may be generated.

    Raises:
        InvalidRequestError: Naming the span or index that lies beyond.
    """
    for name, part in (("target", request.target), ("reasoning", request.reasoning)):
        for path, end, value in _positions(part):
            if end > max_generated_tokens:
                phrase = f"goes beyond the {max_generated_tokens} tokens that can be generated"
                raise _refusal((name, *path), phrase, value)


def _positions(part: Any) -> Iterator[tuple[tuple[int | str, ...], int, Any]]:
    """Path, end (exclusive) and value of every range or index of tokens in a target."""
    if isinstance(part, TokensTarget):
        for index, span in enumerate(part.tokens):
            yield ("tokens", index), span[1], list(span)
    elif isinstance(part, WeightsTarget):
        for position in part.weights:
            yield ("weights",), position + 1, position


def _translated(error: ValidationError) -> InvalidRequestError:
    """Says in our words what pydantic found first."""
    first = error.errors(include_url=False)[0]
    path, value, context = first["loc"], first["input"], first.get("ctx", {})
    refused = context.get("error")
    if isinstance(refused, RefusedError):
        path = path if refused.key is None else (*path, refused.key)
        return _refusal(path, str(refused), *(refused.value or (value,)))
    if first["type"] in ("extra_forbidden", "invalid_key"):
        return _refusal(path, "is not a known key", value)
    if first["type"] == "literal_error":
        return _refusal(path, f"must be {context['expected']}", value)
    return _refusal(path, f"is not valid ({first['msg']})", value)


def _refusal(path: tuple[int | str, ...], phrase: str, value: Any) -> InvalidRequestError:
    param = FIELD
    for part in path:
        param += f"[{part}]" if isinstance(part, int) else f".{shortened(as_unicode(part))}"
    return InvalidRequestError(param, f"{param} {phrase}, got {shown(value)}")
