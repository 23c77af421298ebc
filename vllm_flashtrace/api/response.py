"""The attribution object as the OpenAPI schema describes it.

Invariant: these models only describe; no response is checked or changed by them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class _Described(BaseModel):
    model_config = ConfigDict(extra="allow")


class TargetFound(_Described):
    """What was explained."""

    text: str = Field(description="Text of the explained tokens.")
    tokens: list[tuple[int, int]] = Field(
        description="Half-open ranges [start, end) of generated tokens."
    )


class ScoredToken(_Described):
    """One prompt token and its share of the information that went into the target."""

    index: int = Field(ge=0, description="Position in the rendered prompt.")
    token: str
    token_id: int = Field(ge=0)
    score: float = Field(ge=0)
    message: int | None = Field(
        default=None, ge=0, description="Index of the message; absent for template tokens."
    )
    start: int | None = Field(default=None, ge=0, description="First character in the message.")
    end: int | None = Field(default=None, ge=0, description="End, exclusive, in the message.")


class HopMass(_Described):
    """Where the mass of one hop went; the masses add up to 1."""

    hop: int = Field(ge=0)
    input_mass: float = Field(ge=0)
    reasoning_mass: float = Field(ge=0)
    target_mass: float = Field(ge=0)
    skipped_mass: float = Field(ge=0)
    scores: list[float] | None = Field(
        default=None, description="One score per prompt token; with include 'hops'."
    )


class SegmentScore(_Described):
    """Score of one message, or of the rest of the prompt."""

    role: str
    score: float = Field(ge=0)
    message: int | None = Field(default=None, ge=0)
    name: str | None = None


class SentenceScore(_Described):
    """One sentence or line of the prompt and its share."""

    message: int = Field(ge=0)
    part: int | None = Field(default=None, ge=0, description="Index of the content part, if any.")
    start: int = Field(ge=0, description="First character in the message.")
    end: int = Field(ge=0, description="End, exclusive, in the message.")
    text: str
    tokens: int = Field(ge=1, description="Tokens of the prompt that it has.")
    score: float = Field(ge=0, description="Of all its tokens.")
    mean: float = Field(ge=0, description="Of its tokens; sentences are ranked by it.")


class GeneratedToken(_Described):
    """One generated token and its share."""

    index: int = Field(ge=0)
    token: str | None = None
    token_id: int | None = None
    score: float = Field(ge=0)


class AttributionUsage(_Described):
    """What the attribution cost."""

    recomputed_tokens: int = Field(ge=0)
    cached_tokens: int = Field(ge=0)
    seconds: dict[str, float]


class AttributionError(_Described):
    """Why there is no attribution."""

    code: str
    message: str


class AttributionObject(_Described):
    """An attribution: its scores when completed, its error when failed or skipped."""

    id: str = Field(pattern="^ft-[0-9a-f]{32}$")
    object: Literal["flashtrace.attribution"]
    status: Literal["queued", "running", "completed", "failed", "skipped"]
    error: AttributionError | None = Field(
        default=None, description="Only with status 'failed' or 'skipped'."
    )
    target: TargetFound | None = None
    scores: list[ScoredToken] | None = None
    prompt_tokens: int | None = Field(default=None, ge=0)
    input_mass: float | None = Field(default=None, ge=0)
    remaining_mass: float | None = Field(default=None, ge=0)
    target_mass: float | None = Field(default=None, ge=0)
    skipped_mass: float | None = Field(default=None, ge=0)
    hops: list[HopMass] | None = None
    segments: list[SegmentScore] | None = None
    sentences: list[SentenceScore] | None = None
    generated: list[GeneratedToken] | None = None
    layers: list[list[float]] | None = None
    tokens: list[str | None] | None = None
    usage: AttributionUsage | None = None


class DeletedAttribution(_Described):
    """A deferred attribution that is gone; its trace has been stopped if it was unfinished."""

    id: str = Field(pattern="^ft-[0-9a-f]{32}$")
    object: Literal["flashtrace.attribution.deleted"]
    deleted: Literal[True]
