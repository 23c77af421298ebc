"""The ``flashtrace`` field of a request: its shape, its defaults and the most it may ask for.

A :class:`FlashTraceRequest` that :func:`parse_flashtrace_field` returns is well-formed and within
the server's limits; anything else is refused by an :class:`InvalidRequestError` that names the
field and the value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from vllm_flashtrace.api.checks import (
    RefusedError,
    as_range,
    as_span,
    as_tuple,
    as_unicode,
    as_weights,
    check_integer,
    check_string,
    listed,
    shortened,
    shown,
)
from vllm_flashtrace.api.patterns import PatternError, check_pattern
from vllm_flashtrace.base.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """The most one request may ask for; lengths are in characters.

    Attributes:
        heads: Whether the server has weights of attention heads.
    """

    max_hops: int = 8
    max_top_k: int = 100_000
    max_spans: int = 256
    max_skip_tokens: int = 256
    max_regex_length: int = 512
    max_text_length: int = 65_536
    max_weights: int = 65_536
    max_targets: int = 64
    max_verify: int = 8
    max_verify_requests: int = 128
    max_sources: int = 256
    max_id_length: int = 256
    max_tool_call_index: int = 65_535
    heads: bool = False


GUARD_RATIO = 3.0
"""The default of the guard's ratio; the documentation has the measurements."""

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
        min_length=1,
        description="Text to look for; its last occurrence in the generated text that the client "
        "sees. A token that overlaps it counts in full.",
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
        description="Regular expression in the syntax of Python's re; its last match that is not "
        "empty, or what its group matched if it has exactly one capturing group. A search that "
        "takes too long ends the attribution with the error regex_timeout.",
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
        description="Half-open ranges [start, end) of generated tokens, counted from 0; special "
        "tokens and cut-off stop text count too.",
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

    tool_call: Position = Field(
        description="Index of the tool call among those in the answer, counted from 0. The server "
        "needs a tool call parser."
    )
    argument: str | None = Field(
        default=None,
        description="Name of the argument whose value is explained, a string without its quotes; "
        "without it, the whole call.",
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


class MarkedSource(StrictModel):
    """A source that the client marks: by its text, or by its place in the messages."""

    id: str = Field(min_length=1, description="Name of the source, unlike those of the others.")
    title: str | None = Field(default=None, description="Title, handed on to citations.")
    url: str | None = Field(default=None, description="URL, handed on to citations.")
    text: str | None = Field(
        default=None,
        description="Its text as it stands in the messages or the prompt. A text that stands there "
        "several times needs its message, or its span in place of the text.",
    )
    message: Position | None = Field(
        default=None,
        description="Index of the message that it stands in, 0 for a plain prompt. Without text "
        "and span, the whole message is the source.",
    )
    part: Position | None = Field(
        default=None, description="Index of the content part, where the content is a list of them."
    )
    span: _TokenSpan | None = Field(
        default=None, description="Half-open range [start, end) of characters of the content."
    )

    @field_validator("id", "title", "url", "text", mode="before")
    @classmethod
    def _check_strings(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None or info.field_name == "id":
            limits = limits_of(info)
            longest = limits.max_id_length if info.field_name == "id" else limits.max_text_length
            check_string(value, longest)
        return value

    @field_validator("span", mode="before")
    @classmethod
    def _check_span(cls, value: Any) -> Any:
        return None if value is None else as_range(value)

    @model_validator(mode="after")
    def _check_together(self) -> MarkedSource:
        if self.text is not None and self.span is not None:
            raise RefusedError("cannot be combined with text", "span", list(self.span))
        if self.text is None and self.message is None:
            raise RefusedError("must have a text or a message")
        if self.part is not None and self.message is None:
            raise RefusedError("needs the message", "part", self.part)
        return self


class SeparatedSources(StrictModel):
    """Sources in one text, with something between them that a pattern matches."""

    separator: str = Field(
        min_length=1,
        description="Regular expression in the syntax of Python's re. What stands between its "
        "matches are the sources. A pattern with a group named id matches the heading of a source, "
        "from which the group takes the id (and a group named title the title); what stands before "
        "the first heading is then no source.",
    )
    message: Position | None = Field(
        default=None, description="Index of the message; by default the last one of the user."
    )
    part: Position | None = Field(
        default=None, description="Index of the content part, where the content is a list of them."
    )

    @field_validator("separator", mode="before")
    @classmethod
    def _check(cls, value: Any, info: ValidationInfo) -> Any:
        return RegexTarget.model_validate({"regex": value}, context=info.context).regex


class CitationOptions(StrictModel):
    """How citations are written."""

    format: Literal["auto", "cohere"] = Field(
        default="auto",
        description="'auto' is the form of the route: OpenAI's annotations, Anthropic's citations. "
        "'cohere' puts citations in Cohere's form on the message of a chat completion.",
    )


class GuardOptions(StrictModel):
    """When the guard flags an argument of a tool call."""

    ratio: Annotated[float, Field(gt=0.0, le=1e6)] = Field(
        default=GUARD_RATIO,
        description="An argument is flagged if the share of one tool result, or of another "
        "source, is more than this many times that of the system's and the user's messages "
        "together.",
    )

    @field_validator("ratio", mode="before")
    @classmethod
    def _check(cls, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1e6:
            raise RefusedError("must be a number above 0 and at most 1000000")
        return float(value)


TargetObject: TypeAlias = TextTarget | RegexTarget | TokensTarget | WeightsTarget | ToolCallTarget
ReasoningObject: TypeAlias = TokensTarget | TextTarget

Target: TypeAlias = Literal["output", "generated"] | TargetObject
Parts: TypeAlias = Literal["sentences", "lines", "claims"]
_PARTS = get_args(Parts)
_WHOLE = ("output", "generated")

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


def _read_target(value: Any, info: ValidationInfo) -> Any:
    return word_or_object(value, _WHOLE, TARGETS, info)


_SOURCE_LIST = TypeAdapter(tuple[MarkedSource, ...])
_TARGET_LIST = TypeAdapter(tuple[Annotated[Target, BeforeValidator(_read_target)], ...])

FIELD = "flashtrace"

Include: TypeAlias = Literal[
    "hops", "generated", "segments", "sentences", "layers", "attention", "tokens"
]

_INCLUDES = get_args(Include)

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "sources": {},
    "paper": {
        "hops": 1,
        "rows": "target",
        "skip_tokens": "none",
        "scope": "prompt",
        "include": (),
    },
}
"""What a preset changes in the defaults: those of the keys themselves found the most sources of
answers that models gave themselves (``benchmarks/faithfulness``); ``"paper"`` is one hop of the
paper's formula as it is."""


class FlashTraceRequest(StrictModel):
    """Asks which prompt tokens a completion, or a part of it, came from."""

    target: Target = Field(
        default="output",
        description="What to explain: 'output' (the answer after the reasoning, without blank "
        "tokens such as line breaks at either end), 'generated' (everything generated that the "
        "client sees, blanks included), or an object that names a part of the generated text.",
    )
    targets: Parts | tuple[Target, ...] | None = Field(
        default=None,
        description="Explains several parts of the answer one by one, in place of target: a list "
        "of such targets, 'sentences', 'lines', or 'claims' (the values of a JSON answer, the "
        "items of lists, sentences elsewhere, and the arguments of tool calls). The response then "
        "has its results in targets, one for each.",
    )
    sources: Literal["auto"] | SeparatedSources | tuple[MarkedSource, ...] | None = Field(
        default=None,
        description="What the answer may have been taken from; the response then has the score of "
        "each source. 'auto' (the request's documents, and the results of tools), a list of "
        "sources, or an object with a separator that stands between them.",
    )
    citations: CitationOptions | None = Field(
        default=None,
        description="true, or an object with a format: adds to the answer which sources its parts "
        "came from, in the form that clients of the route read. It explains targets 'claims' from "
        "sources 'auto' and skips 'punctuation' where the request says nothing else, with preset "
        "'paper', too.",
    )
    guard: GuardOptions | None = Field(
        default=None,
        description="true, or an object with a ratio: says of each argument of the answer's tool "
        "calls whether it owes more to a tool result, or another source, than to the system's and "
        "the user's messages. It explains targets 'claims', and goes through the assistant's "
        "earlier turns (recurse_over 'assistant') unless the request says otherwise.",
    )
    hops: Position | Literal["auto"] = Field(
        default="auto",
        description="Number of recursive hops through the reasoning after the pass that explains "
        "the target itself; 0 for that pass alone. 'auto' goes on until less of the mass than the "
        "server's auto_threshold is left on the reasoning, at most max_hops hops; the response's "
        "auto_stopped says which of the two it was.",
    )
    reasoning: Literal["auto", "none"] | ReasoningObject = Field(
        default="auto",
        description="What counts as reasoning: 'auto' (what the server's reasoning parser found, "
        "else what stands in <think> tags, else everything generated before the first target "
        "token), 'none', or an object that names a part of the generated text.",
    )
    recurse_over: Literal["reasoning", "generated", "assistant"] = Field(
        default="reasoning",
        description="Tokens that the hops go through: 'reasoning', 'generated' (all generated "
        "tokens), or 'assistant' (generated tokens and the prompt's earlier assistant turns and "
        "tool calls).",
    )
    rows: Literal["target", "predicting"] = Field(
        default="predicting",
        description="Rows of the model that explain the target: 'target' (those of its tokens, as "
        "in the paper: what the model read once a token was there) or 'predicting' (for each token "
        "the one before it: what the model read when it chose the token).",
    )
    heads: bool = Field(
        default=False,
        description="Whether a token's score is the attention on it, the heads weighted as the "
        "server's file of learned weights says, in place of its proximity. Needs a server with the "
        "option heads.",
    )
    weighting: Literal["equal", "surprise"] = Field(
        default="equal",
        description="How much each token of the target counts: 'equal', or 'surprise' (by the "
        "negative logarithm of the probability that the model gave it, so that filler words count "
        "little; takes one short request more).",
    )
    skip_tokens: Literal["none", "punctuation"] | tuple[str, ...] = Field(
        default="punctuation",
        description="Tokens that are neither explained nor given a score; their share is "
        "skipped_mass. 'none', 'punctuation' (every token that consists of blanks and punctuation "
        "characters alone, by their Unicode category: . , ... ! ? : ; brackets, quotes, dashes; a "
        "target of nothing else is explained all the same), or a list of strings (every token that "
        "equals one of them, blanks at either end aside).",
    )
    top_k: Annotated[int, Field(ge=1)] | None = Field(
        default=20,
        description="How many scored prompt tokens to return, the highest scores above 0 first; "
        "null returns all tokens of the scope in order. It limits the sentences as well.",
    )
    scope: Literal["prompt", "content"] = Field(
        default="content",
        description="Tokens that scores lists: 'content' (those of the client's messages that are "
        "not blank; what lies on the chat template, line breaks and other blanks is unlisted_mass) "
        "or 'prompt' (all of the prompt's, the default with top_k null). No score changes by it.",
    )
    include: tuple[Include, ...] = Field(
        default=("sentences",),
        description="Additional parts of the response: 'hops' (scores of each hop), 'generated' "
        "(scores of generated tokens), 'segments' (scores of messages), 'sentences' (scores of "
        "sentences), 'layers' (scores by layer), 'attention' (the target's attention to every "
        "token by layer and head), 'tokens' (texts of the prompt's tokens).",
    )
    verify: Position = Field(
        default=0,
        description="How many of the best sources, or of the sentences with the highest mean where "
        "the request has no sources, are verified: each is taken out of the prompt in turn, and "
        "all of them together, and the response's verification says by how much the target's "
        "log-probability falls. 0 verifies nothing.",
    )
    preset: Literal["sources", "paper"] = Field(
        default="sources",
        description="Defaults of the other keys: 'sources', as given with each key, or 'paper' "
        "(the paper's formula as it is): hops 1, rows 'target', skip_tokens 'none', scope "
        "'prompt' and include [].",
    )
    mode: Literal["inline", "deferred"] = Field(
        default="inline",
        description="'inline' answers once the attribution is there, 'deferred' at once with its "
        "id, under which GET /v1/attributions/{id} gives it later.",
    )

    @property
    def citation_form(self) -> str:
        """The form of the citations that are asked for."""
        return "auto" if self.citations is None else self.citations.format

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        # All tokens are asked for, and no share of them can be told without those in between.
        filled: dict[str, Any] = {"scope": "prompt"} if value.get("top_k", ...) is None else {}
        preset = value.get("preset")
        if isinstance(preset, str):
            filled |= PRESETS.get(preset, {})
        if value.get("citations") not in (None, False):
            filled |= {"sources": "auto", "skip_tokens": "punctuation"}
        if value.get("guard") not in (None, False):
            filled |= {"recurse_over": "assistant"}
        switched = any(value.get(key) not in (None, False) for key in ("citations", "guard"))
        if switched and "target" not in value:
            filled |= {"targets": "claims"}
        return {**filled, **value}

    @field_validator("target", mode="before")
    @classmethod
    def _check_target(cls, value: Any, info: ValidationInfo) -> Any:
        return _read_target(value, info)

    @field_validator("targets", mode="before")
    @classmethod
    def _check_targets(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None or (isinstance(value, str) and value in _PARTS):
            return value
        if isinstance(value, str):
            raise RefusedError(f"must be {listed(_PARTS)}, or a list of targets")
        expected = f"targets, or one of {listed(_PARTS)}"
        entries = as_tuple(value, limits_of(info).max_targets, expected)
        if not entries:
            raise RefusedError("must hold at least one target")
        return _TARGET_LIST.validate_python(entries, context=info.context)

    @field_validator("sources", mode="before")
    @classmethod
    def _check_sources(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None or value == "auto":
            return value
        if isinstance(value, dict):
            return SeparatedSources.model_validate(value, context=info.context)
        expected = "sources, an object with a separator, or 'auto'"
        entries = as_tuple(value, limits_of(info).max_sources, expected)
        if not entries:
            raise RefusedError("must hold at least one source")
        sources = _SOURCE_LIST.validate_python(entries, context=info.context)
        known: set[str] = set()
        for index, source in enumerate(sources):
            if source.id in known:
                raise RefusedError("has an id that an earlier source has", index, source.id)
            known.add(source.id)
        return sources

    @field_validator("citations", "guard", mode="before")
    @classmethod
    def _check_switch(cls, value: Any) -> Any:
        if value is None or value is False:
            return None
        if not (value is True or isinstance(value, (dict, StrictModel))):
            raise RefusedError("must be true, false, null or an object")
        return {} if value is True else value

    @model_validator(mode="after")
    def _check_verified_targets(self, info: ValidationInfo) -> FlashTraceRequest:
        if self.verify and isinstance(self.targets, tuple):
            most = limits_of(info).max_verify_requests
            # Each target as it is at once, then without each sentence, and without all.
            requests = 1 + len(self.targets) * (self.verify + (self.verify > 1))
            if requests > most:
                raise RefusedError(
                    f"may take {requests} requests with {len(self.targets)} targets, the server "
                    f"allows {most} (max_verify_requests)",
                    "verify",
                    self.verify,
                )
        return self

    @model_validator(mode="after")
    def _check_together(self) -> FlashTraceRequest:
        if self.guard is not None and self.targets != "claims":
            raise RefusedError("needs targets 'claims'", "guard", True)
        if self.citations is not None and self.sources is None:
            raise RefusedError("needs sources", "citations", True)
        if self.targets is not None and "target" in self.model_fields_set:
            raise RefusedError("cannot be combined with targets", "target", self.target)
        for name in ("citations", "guard"):
            # What they take for evidence was measured on proximities.
            if self.heads and getattr(self, name) is not None:
                raise RefusedError(f"cannot be combined with {name}", "heads", True)
        if self.weighting != "equal":
            several = self.targets if isinstance(self.targets, tuple) else (self.target,)
            if any(isinstance(target, WeightsTarget) for target in several):
                phrase = "cannot be combined with a target of weights"
                raise RefusedError(phrase, "weighting", self.weighting)
        for name in ("layers", "attention"):
            if self.targets is not None and name in self.include:
                phrase = f"cannot hold '{name}' with targets"
                raise RefusedError(phrase, "include", list(self.include))
        return self

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

    @field_validator("heads", mode="before")
    @classmethod
    def _check_heads(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, bool):
            raise RefusedError("must be true or false")
        if value and not limits_of(info).heads:
            phrase = "needs a server with the option heads, a file that fit-heads has written"
            raise RefusedError(phrase)
        return value

    @field_validator("verify", mode="before")
    @classmethod
    def _check_verify(cls, value: Any, info: ValidationInfo) -> Any:
        check_integer(value, 0, limits_of(info).max_verify, alternative="")
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


def refuse_citations(request: FlashTraceRequest, route: str, *, forms: bool = False) -> None:
    """Refuses citations where a route has no place for them.

    Args:
        request: A validated request.
        route: The route, as the message names it.
        forms: Whether the route has a form of its own, and only those of others are refused.

    Raises:
        InvalidRequestError: Naming ``citations``, or its format.
    """
    if forms and request.citation_form != "auto":
        raise _refusal(("citations", "format"), f"is not available on {route}", "cohere")
    if not forms and request.citations is not None:
        raise _refusal(("citations",), f"is not available on {route}", True)


def check_against_limit(request: FlashTraceRequest, max_generated_tokens: int) -> None:
    """Refuses token indices that no completion of this length can have.

    Args:
        request: A validated request.
        max_generated_tokens: The most tokens that may be generated.

    Raises:
        InvalidRequestError: Naming the span or index that lies beyond.
    """
    targets = request.targets if isinstance(request.targets, tuple) else ()
    parts: list[tuple[tuple[int | str, ...], Any]] = [
        (("target",), request.target),
        (("reasoning",), request.reasoning),
        *((("targets", index), target) for index, target in enumerate(targets)),
    ]
    for name, part in parts:
        for path, end, value in _positions(part):
            if end > max_generated_tokens:
                phrase = f"goes beyond the {max_generated_tokens} tokens that can be generated"
                raise _refusal((*name, *path), phrase, value)


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
