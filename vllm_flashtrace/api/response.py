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

Verdict: TypeAlias = Literal["supported", "weak", "unsupported"]
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
    start: _Index | None = Field(
        default=None,
        description="First character of the target in the content of the answer; absent where the "
        "target is in no one place of it: in reasoning or in a tool call.",
    )
    end: _Index | None = Field(default=None, description="One past its last character there.")
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
        "have none. A token of an image has none."
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
    image: _Index | None = Field(
        default=None,
        description="Index of the image that the token stands for a part of; such a token has no "
        "text, start or end.",
    )
    row: _Index | None = Field(
        default=None,
        description="Row of the image's grid; absent where the model's grid is not known.",
    )
    column: _Index | None = Field(default=None, description="Column of that grid; absent likewise.")


class ImageScore(_Part):
    """Score of one image of the prompt, and of each of its parts."""

    index: _Index = Field(
        description="Number of the image among the prompt's, as the client gave them."
    )
    message: _Index | None = Field(
        default=None,
        description="Index of the message that it stands in; absent where this is not certain.",
    )
    part: _Index | None = Field(
        default=None, description="Index of its content part within the message; absent likewise."
    )
    tokens: _Index = Field(description="How many tokens of the prompt stand for its parts.")
    rows: _Index | None = Field(
        default=None,
        description="Rows of its grid of parts; absent where the model's grid is not known.",
    )
    columns: _Index | None = Field(
        default=None, description="Columns of that grid; absent likewise."
    )
    score: _Share = Field(description="Sum of the scores of its tokens.")
    scores: list[_Share] = Field(description="Score of each of its parts, row by row.")


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


class _Scored(_Part):
    start: _Index = Field(description="First character within the content (or its part).")
    end: _Index = Field(description="One past its last character there.")
    text: str = Field(description="The sentence without blanks at either end.")
    tokens: Annotated[int, Field(ge=1)] = Field(description="How many tokens of the prompt it has.")
    score: _Share = Field(description="Sum of the scores of its tokens.")
    mean: _Share = Field(
        description="Mean of the scores of its tokens; sentences are ranked by it."
    )


class SourceSentence(_Scored):
    """One sentence or line of a source and its share.

    Positions count within the message's content (or its part) that the source stands in, or within
    the document's text.
    """


class SourceScore(_Part):
    """Score of one source."""

    index: _Index = Field(description="Number of the source.")
    id: str = Field(description="Its name.")
    kind: Literal["marked", "document", "search_result", "tool"] = Field(
        description="What it is: a text that the request's sources marks, a document that came "
        "with the request, a search result of Anthropic's form, or what a tool returned."
    )
    title: str | None = Field(default=None, description="Its title, if it has one.")
    url: str | None = Field(default=None, description="Its URL, if it has one.")
    message: _Index | None = Field(
        default=None,
        description="Index of the message that it stands in, 0 for a plain prompt; absent for a "
        "document that the chat template writes.",
    )
    part: _Index | None = Field(
        default=None,
        description="Index of the content part within the message; only where the content is a "
        "list of parts.",
    )
    start: _Index | None = Field(
        default=None, description="First character within the content (or its part)."
    )
    end: _Index | None = Field(default=None, description="One past its last character there.")
    tokens: _Index = Field(description="How many tokens of the prompt it has.")
    score: _Share | None = Field(
        description="Sum of the scores of its tokens; null where its place in the prompt is not "
        "certain, or the chat template leaves it out."
    )
    mean: _Share | None = Field(description="Mean of the scores of its tokens; null likewise.")
    sentences: list[SourceSentence] = Field(
        description="Its sentences, the highest mean first; at most top_k of all sources. With "
        "top_k null all, in the order of the text."
    )


class CitedSource(_Part):
    """A source that a part of the answer is cited with."""

    index: _Index = Field(description="Number of the source among the request's sources.")
    id: str = Field(description="Its name.")
    kind: Literal["marked", "document", "search_result", "tool"] = Field(description="What it is.")
    title: str | None = Field(default=None, description="Its title, if it has one.")
    url: str | None = Field(default=None, description="Its URL, if it has one.")
    number: _Index = Field(
        description="Its number among the search results, or among the sources that are none."
    )
    score: _Share = Field(description="Sum of the scores of its tokens.")
    start: _Index = Field(
        description="First character, in the source's text, of its sentence with the highest mean."
    )
    end: _Index = Field(description="One past its last character there.")
    text: str = Field(description="That sentence.")
    blocks: tuple[_Index, _Index] | None = Field(
        default=None,
        description="Of a search result: the half-open range of its blocks with the sentence.",
    )
    log_prob_drop: float | None = Field(
        default=None, description="See RemovedPart; if the source is among those verified."
    )
    verdict: Verdict | None = Field(default=None, description="Likewise.")


class Citation(_Part):
    """A part of the answer and the sources that it came from."""

    start: _Index = Field(description="First character of the part in the content of the answer.")
    end: _Index = Field(description="One past its last character there.")
    text: str = Field(description="Text of the part.")
    sources: Annotated[list[CitedSource], Field(min_length=1)] = Field(
        description="Its sources, the one with the most evidence first."
    )


class UntrustedShare(_Part):
    """What an argument of a tool call owes to a tool result or another source."""

    message: _Index | None = Field(default=None, description="Index of the tool result's message.")
    tool_call_id: str | None = Field(default=None, description="Its tool_call_id, if it has one.")
    name: str | None = Field(default=None, description="Its name, if it has one.")
    source: str | None = Field(
        default=None, description="Id of the source, if it is not a tool result."
    )
    share: _Share = Field(description="Sum of the scores of its tokens.")


class GuardedArgument(_Part):
    """An argument of a tool call, and whether the guard flags it."""

    tool_call: _Index = Field(description="Index of the tool call.")
    argument: str = Field(description="Name of the argument.")
    trusted: _Share = Field(
        description="What it owes to the messages of system, developer and user together: the sum "
        "of the scores of their tokens, without those of documents and marked sources."
    )
    untrusted: list[UntrustedShare] = Field(
        description="What it owes to each tool result and each other source, in their order."
    )
    flagged: bool = Field(description="Whether the rule holds.")
    reason: str | None = Field(default=None, description="Why it is flagged.")


class Guard(_Part):
    """What the guard says of the arguments of the answer's tool calls."""

    flagged: bool = Field(description="Whether any of them is flagged.")
    arguments: list[GuardedArgument] = Field(
        description="Every argument that is explained; empty if the answer has no tool call."
    )


class SentenceScore(_Scored):
    """One sentence or line of a message and its share."""

    message: _Index = Field(
        description="Index of the message that it stands in, 0 for a plain prompt."
    )
    part: _Index | None = Field(
        default=None,
        description="Index of the content part within the message; only where the content is a "
        "list of parts.",
    )


class RemovedPart(_Part):
    """A sentence or a source that was taken out of the prompt, and what that did to the target.

    A sentence has the keys of `SentenceScore`, a source those of `SourceScore` but its sentences.
    """

    index: _Index | None = Field(default=None, description="Number of the source.")
    id: str | None = Field(default=None, description="Name of the source.")
    kind: Literal["marked", "document", "search_result", "tool"] | None = Field(
        default=None, description="What the source is."
    )
    title: str | None = Field(default=None, description="Title of the source, if it has one.")
    url: str | None = Field(default=None, description="URL of the source, if it has one.")
    message: _Index | None = Field(
        default=None, description="Index of the message that it stands in."
    )
    part: _Index | None = Field(
        default=None, description="Index of the content part within the message, if it has parts."
    )
    start: _Index | None = Field(default=None, description="First character within the content.")
    end: _Index | None = Field(default=None, description="One past its last character there.")
    text: str | None = Field(default=None, description="Text of the sentence.")
    tokens: _Index = Field(description="How many tokens of the prompt it has.")
    score: _Share = Field(description="Sum of the scores of its tokens.")
    mean: _Share = Field(description="Mean of the scores of its tokens.")
    log_prob_drop: float | None = Field(
        default=None,
        description="By how many nats the target's log-probability falls without it; negative "
        "where the target is more likely without it.",
    )
    verdict: Verdict | None = Field(
        default=None, description="What log_prob_drop says; see the verification's own verdict."
    )
    reason: str | None = Field(
        default=None,
        description="Why there are no numbers: it could not be taken out, or its request failed; "
        "or why there is no verdict beside the number.",
    )


class RemovedTogether(_Part):
    """What taking out all of them at once did to the target."""

    log_prob_drop: float | None = Field(
        default=None, description="By how many nats the target's log-probability falls."
    )
    verdict: Verdict | None = Field(default=None, description="What it says.")
    reason: str | None = Field(
        default=None, description="Why there is no number, or no verdict beside it."
    )


class VerificationFound(_Part):
    """How much less likely the target is without the parts of the prompt that score best."""

    log_prob: float | None = Field(
        default=None,
        description="Natural logarithm of the target's probability, given the prompt and all that "
        "was generated before each of its tokens: the sum over its tokens.",
    )
    target_tokens: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="How many tokens that is of."
    )
    removed: list[RemovedPart] | None = Field(
        default=None,
        description="The parts that were taken out, the best first: the sources of a request that "
        "has any, else sentences.",
    )
    together: RemovedTogether | None = Field(
        default=None, description="All of them taken out at once."
    )
    verdict: Verdict | None = Field(
        default=None,
        description="What the fall without all of them says: 'supported' where it is at least ln "
        "10 nats (the target is a tenth as likely without them) and 0.1 nats per target token, "
        "'weak' where it is at least ln 2 nats (half as likely) and 0.03 per token, else "
        "'unsupported'.",
    )
    reason: str | None = Field(
        default=None, description="Why nothing could be verified; then nothing else is here."
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
    scored_requests: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="Engine requests that scored the target; with verify, or weighting 'surprise'.",
    )
    scored_tokens: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="Tokens prefilled by them; absent as recomputed_tokens, which they are not "
        "part of.",
    )
    scored_cached_tokens: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="Tokens that they found in the prefix cache; absent likewise."
    )
    seconds: dict[str, float] = Field(
        description="Seconds by phase, over all hops: queue, prefill, attribution; and weighting "
        "and verify."
    )
    dropped_target_tokens: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="Target tokens at the end that did not fit the model's context and were left "
        "out of what is explained.",
    )


class Coverage(_Part):
    """Which layers of the model the scores are of, where some cannot be traced."""

    layers: list[_Index] = Field(
        description="Indices of the layers that were traced. What flows to the target through the "
        "others, which mix tokens by linear attention, state spaces or other attention, is in no "
        "score; with include 'layers' or 'attention' they have zeros."
    )
    model_layers: Annotated[int, Field(ge=1)] = Field(description="Layers of the model.")
    layer_share: _Share = Field(description="Share of the layers that were traced.")


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
        description="Scores of the prompt tokens within the request's scope: the top_k highest "
        "above 0, highest first, or with top_k null all in the order of the prompt.",
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
    unlisted_mass: _Share | None = Field(
        default=None,
        description="Part of input_mass on prompt tokens outside the request's scope: the "
        "template's, and blanks; only with scope 'content'.",
    )
    change_share: _Share | None = Field(
        default=None,
        description="With coverage: which share of what mixing tokens changes in the stream of the "
        "target's rows is of the traced layers, by L1 norms; the rest is of layers whose sources "
        "are not in the scores. Absent where it cannot be measured.",
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
    sources: list[SourceScore] | None = Field(
        default=None,
        description="Scores of the sources, in the order that the request gives them; only if the "
        "request has sources.",
    )
    sentences: list[SentenceScore] | None = Field(
        default=None,
        description="Sentences of the messages, the highest mean first, at most top_k; with "
        "include 'sentences'.",
    )
    images: list[ImageScore] | None = Field(
        default=None,
        description="Scores of the images, in the order that the messages give them; only if the "
        "prompt has images.",
    )
    verification: VerificationFound | None = Field(
        default=None,
        description="What becomes of the target without the parts that score best; with verify.",
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
    citations: list[Citation] | None = Field(
        default=None,
        description="The parts of the answer that have sources, in the order of the answer; only "
        "if the request has citations.",
    )
    guard: Guard | None = Field(
        default=None, description="The guard's judgement; only if the request has a guard."
    )
    heads: Literal[True] | None = Field(
        default=None,
        description="true where scores are attention under the server's weights of heads, and not "
        "proximities; only if the request has heads.",
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
    coverage: Coverage | None = Field(
        default=None,
        description="Which layers were traced; only of a model some of whose layers cannot be, "
        "with the server's option partial_coverage.",
    )
    usage: AttributionUsage | None = Field(default=None, description="What it cost.")


class DeletedAttribution(_Part):
    """A deferred attribution that is gone; its trace has been stopped if it was unfinished."""

    id: str = Field(pattern="^ft-[0-9a-f]{32}$", description="Id of the attribution.")
    object: Literal["flashtrace.attribution.deleted"] = Field(description="Kind of the object.")
    deleted: Literal[True] = Field(description="Always true.")
