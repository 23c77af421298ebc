"""The ``flashtrace`` object of a response: the one description of its keys.

The OpenAPI schema and the reference in the documentation are generated from these models,
:class:`~vllm_flashtrace.api.attribution.Attribution` reads scores through them, and the table of
``vllm-flashtrace batch`` takes its columns from them. The server writes the object as plain dicts
(:mod:`vllm_flashtrace.text.result`), which the tests hold against the models; a key that has no
value is absent, never null. Every model keeps keys that it does not know, so that a client can
read what a newer server sends.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

OBJECT = "flashtrace.attribution"

Status: TypeAlias = Literal["queued", "running", "completed", "failed", "skipped"]
_Index: TypeAlias = Annotated[int, Field(ge=0)]
_Share: TypeAlias = Annotated[float, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow")


class TargetFound(_Part):
    """What was explained."""

    text: str = Field(description="Text of the explained tokens.")
    tokens: list[tuple[_Index, _Index]] = Field(
        description="Half-open ranges [start, end) of generated tokens, counted from 0."
    )
    path: str | None = Field(
        default=None,
        description="Of a value in a JSON answer, with targets 'claims': where it stands there, "
        "as $.sources[0].title.",
    )
    tool_call: _Index | None = Field(
        default=None,
        description="Of an argument, with targets 'claims': index of its tool call.",
    )
    argument: str | None = Field(default=None, description="Name of that argument.")


class TokenScore(_Part):
    """One prompt token and its share of the information that went into the target."""

    # Frozen, as a record of a result is; this also makes it hashable.
    model_config = ConfigDict(frozen=True)

    index: _Index = Field(description="Position among the tokens of the rendered prompt.")
    token: str = Field(
        description="Text of the token. The texts of all tokens join to the rendered prompt: a "
        "character that several tokens share is the text of the first of them, and the others "
        "have none."
    )
    token_id: _Index = Field(description="Id of the token in the model's vocabulary.")
    score: _Share = Field(
        description="Share of the target's information flow that came from this token, at most 1; "
        "over all prompt tokens the scores add up to input_mass."
    )
    message: _Index | None = Field(
        default=None,
        description="Index of the client's message that the token lies in, 0 for a plain prompt; "
        "absent for tokens of the template, of tool calls and of earlier reasoning.",
    )
    part: _Index | None = Field(
        default=None,
        description="Index of the content part within the message; only where the content is a "
        "list of parts.",
    )
    start: _Index | None = Field(
        default=None,
        description="First character of the token within the message's content (or its part, or "
        "the plain prompt).",
    )
    end: _Index | None = Field(default=None, description="One past its last character there.")


class HopMass(_Part):
    """Where the mass of one hop went, as shares of this hop's own total, which add up to 1."""

    hop: _Index = Field(description="Number of the hop; 0 explains the target itself.")
    input_mass: _Share = Field(description="On prompt tokens that recursion does not follow.")
    reasoning_mass: _Share = Field(
        description="On tokens that recursion follows; the next hop spreads it further."
    )
    target_mass: _Share = Field(
        description="On generated tokens that recursion does not follow, the target among them."
    )
    skipped_mass: _Share = Field(description="On tokens that the request's skip_tokens names.")
    scores: list[_Share] | None = Field(
        default=None,
        description="One score per prompt token, which add up to input_mass; with include 'hops'.",
    )


class ToolCallScore(_Part):
    """Score of one tool call of an assistant's message; it is part of the message's score."""

    tool_call: _Index = Field(description="Index of the call within the message.")
    id: str | None = Field(default=None, description="The call's id, if the client gave one.")
    name: str | None = Field(default=None, description="Name of the function.")
    score: _Share | None = Field(
        description="Sum of the scores of the call's tokens; null where the chat template leaves "
        "the call out of the prompt."
    )


class SegmentScore(_Part):
    """Score of one message, or of the rest of the prompt, which stands last.

    The scores of all segments add up to the input mass.
    """

    message: _Index | None = Field(
        default=None, description="Index of the message; absent for the rest of the prompt."
    )
    role: str = Field(
        description="Role of the message, or 'prompt' for a plain prompt. Of the rest: 'template', "
        "'prompt' where nothing could be located, or 'unlocated' where it holds messages that "
        "could not be."
    )
    name: str | None = Field(default=None, description="The message's name, if it has one.")
    tool_call_id: str | None = Field(
        default=None, description="Of a tool's message: id of the call that it answers."
    )
    score: _Share = Field(description="Sum of the scores of its tokens.")
    tool_calls: list[ToolCallScore] | None = Field(
        default=None, description="Scores of the calls of an assistant's message that has any."
    )
    unlocated_messages: list[_Index] | None = Field(
        default=None,
        description="With role 'unlocated': indices of the messages whose place in the prompt is "
        "not certain; they have no score of their own.",
    )


class SentenceScore(_Part):
    """One sentence or line of a message and its share."""

    message: _Index = Field(
        description="Index of the message that it stands in, 0 for a plain prompt."
    )
    part: _Index | None = Field(
        default=None,
        description="Index of the content part within the message; only where the content is a "
        "list of parts.",
    )
    start: _Index = Field(description="First character within the content (or its part).")
    end: _Index = Field(description="One past its last character there.")
    text: str = Field(description="The sentence without blanks at either end.")
    tokens: Annotated[int, Field(ge=1)] = Field(description="How many tokens of the prompt it has.")
    score: _Share = Field(description="Sum of the scores of its tokens.")
    mean: _Share = Field(
        description="Mean of the scores of its tokens; sentences are ranked by it."
    )


class GeneratedToken(_Part):
    """One generated token and the mass that passed through it."""

    index: _Index = Field(description="Position among the generated tokens.")
    token: str | None = Field(
        default=None,
        description="Text of the token, such that the texts join to the generated text; absent "
        "for reasoning that the request leaves out of the answer.",
    )
    token_id: _Index | None = Field(
        default=None, description="Id of the token in the model's vocabulary; absent likewise."
    )
    score: _Share = Field(
        description="Mass that passed through the token, each hop counted with its weight; mass "
        "on reasoning counts again wherever it flows next."
    )


class AttentionSums(_Part):
    """How much the target attends to every token, by layer and query head: raw sums, no scores."""

    shape: tuple[_Index, _Index, _Index] = Field(
        description="Layers, query heads, and tokens: all of the prompt's, then the generated ones."
    )
    data: str | None = Field(
        default=None,
        description="A safetensors file in base64, whose tensor 'attention' (float16) is of this "
        "shape: the sum over the target's tokens i of w_i times the attention weight of token i on "
        "token j, where the w_i sum to 1. Absent if deferred: GET "
        "/v1/attributions/{id}/attention gives the file.",
    )


class AttributionUsage(_Part):
    """What the attribution cost."""

    recomputed_tokens: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="Tokens prefilled for it, over all hops. A server gives this number and the "
        "next only with `--enable-prompt-tokens-details`, like vLLM its own: together with the "
        "text they tell what others have sent before.",
    )
    cached_tokens: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="Tokens that came from the prefix cache; absent likewise."
    )
    seconds: dict[str, float] = Field(
        description="Seconds by phase, over all hops: queue, prefill, attribution."
    )
    dropped_target_tokens: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="Target tokens at the end that did not fit the model's context and were left "
        "out of what is explained.",
    )


class AttributionError(_Part):
    """Why there is no attribution."""

    code: str = Field(description="Stable identifier, such as target_not_found.")
    message: str = Field(description="One sentence for a person, with the field and the value.")


class _Head(_Part):
    id: str = Field(pattern="^ft-[0-9a-f]{32}$", description="Id of the attribution.")
    object: Literal["flashtrace.attribution"] = Field(description="Kind of the object.")
    status: Status = Field(
        description="'completed'; 'queued' or 'running' (deferred and not there yet); 'failed'; "
        "or 'skipped' (not tried for lack of room; the same request may succeed later)."
    )
    error: AttributionError | None = Field(
        default=None, description="Only with status 'failed' or 'skipped'."
    )


class TargetResult(_Part):
    """What is said of one target; only of completed attributions."""

    target: TargetFound | None = Field(default=None, description="What was explained.")
    scores: list[TokenScore] | None = Field(
        default=None,
        description="Scores of prompt tokens: the top_k highest above 0, highest first, or with "
        "top_k null all in the order of the prompt.",
    )
    input_mass: _Share | None = Field(
        default=None,
        description="Share of the whole mass on prompt tokens: the sum of all scores, those that "
        "are not returned included. The four masses add up to 1.",
    )
    remaining_mass: _Share | None = Field(
        default=None, description="Share still on the reasoning after the last hop."
    )
    target_mass: _Share | None = Field(
        default=None,
        description="Share on generated tokens that recursion does not follow, the target among "
        "them.",
    )
    skipped_mass: _Share | None = Field(
        default=None, description="Share on tokens that the request's skip_tokens names."
    )
    hops: list[HopMass] | None = Field(
        default=None, description="Masses of each hop, the pass that explains the target first."
    )
    auto_stopped: Literal["threshold", "max_hops"] | None = Field(
        default=None,
        description="Why hops 'auto' ended: 'threshold' (less than the server's auto_threshold is "
        "left on the reasoning) or 'max_hops' (as many hops as the server allows, although more "
        "is left; see remaining_mass). Absent for a number of hops.",
    )
    segments: list[SegmentScore] | None = Field(
        default=None, description="Scores of the messages; with include 'segments'."
    )
    sentences: list[SentenceScore] | None = Field(
        default=None,
        description="Sentences of the messages, the highest mean first, at most top_k; with "
        "include 'sentences'.",
    )
    generated: list[GeneratedToken] | None = Field(
        default=None, description="Every generated token; with include 'generated'."
    )


class AttributionObject(TargetResult, _Head):
    """An attribution: its scores when completed, its error when failed or skipped.

    Where the request asks for several targets, what is said of each is in ``targets``.
    """

    targets: list[TargetResult] | None = Field(
        default=None,
        description="Of each part of the answer what else stands here; only if the request has "
        "targets.",
    )
    prompt_tokens: _Index | None = Field(
        default=None, description="Number of tokens of the rendered prompt."
    )
    layers: list[list[_Share]] | None = Field(
        default=None,
        description="For each layer one score per prompt token; with include 'layers'. Over the "
        "layers they add up to the scores.",
    )
    attention: AttentionSums | None = Field(
        default=None,
        description="Attention of the target by layer and head; with include 'attention'.",
    )
    tokens: list[str] | None = Field(
        default=None,
        description="Text of every prompt token, which join to the rendered prompt; with include "
        "'tokens'.",
    )
    usage: AttributionUsage | None = Field(default=None, description="What it cost.")


class DeletedAttribution(_Part):
    """A deferred attribution that is gone; its trace has been stopped if it was unfinished."""

    id: str = Field(pattern="^ft-[0-9a-f]{32}$", description="Id of the attribution.")
    object: Literal["flashtrace.attribution.deleted"] = Field(description="Kind of the object.")
    deleted: Literal[True] = Field(description="Always true.")
