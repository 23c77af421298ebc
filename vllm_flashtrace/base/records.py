"""Small records that the parts of the package exchange.

Positions are absolute token indices of the trace ``prompt + generated`` unless a name says
otherwise, and spans are half-open ``[start, end)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Document:
    """A document that came with a request.

    Attributes:
        id: Name of it, unlike those of the request's other documents.
        text: Its text.
        kind: ``"document"`` or ``"search_result"``.
        title: Its title, if it has one.
        url: Where it was taken from, if it says so.
        by_template: Whether the chat template writes it into the prompt, and no message holds it.
        blocks: Where each block that its text was joined from begins.
    """

    id: str
    text: str
    kind: str = "document"
    title: str | None = None
    url: str | None = None
    by_template: bool = True
    blocks: tuple[int, ...] = (0,)


@dataclass(frozen=True, slots=True)
class PromptImage:
    """An image of the prompt.

    Attributes:
        index: Its number among the prompt's images, as the client gave them.
        tokens: Positions of the tokens that stand for its parts, ascending.
        span: All tokens that stand in its place, with those that only mark it.
        rows: How many rows of parts it has, which ``tokens`` go through one by one; None where
            that is not known.
        columns: How many parts a row has; None likewise.
    """

    index: int
    tokens: tuple[int, ...]
    span: Span
    rows: int | None = None
    columns: int | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished completion as the engine saw it.

    Attributes:
        prompt_token_ids: Token ids of the rendered prompt.
        generated_token_ids: Every generated id, a final EOS or stop text included.
        text: The generated text the client sees (stop strings cut off).
        prompt_text: The client's own prompt string for a plain completion, else None.
        messages: The client's chat messages (OpenAI form), else None.
        documents: Documents that came with them.
        images: The images of the prompt.
    """

    prompt_token_ids: Sequence[int]
    generated_token_ids: Sequence[int]
    text: str
    prompt_text: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Document] = ()
    images: Sequence[PromptImage] = ()

    @property
    def token_ids(self) -> list[int]:
        """The whole trace, prompt then generated."""
        return [*self.prompt_token_ids, *self.generated_token_ids]


@dataclass(frozen=True, slots=True)
class Coverage:
    """What of a model a trace covers, where some of its layers cannot be traced.

    Attributes:
        layers: Indices of the layers that are traced, ascending.
        model_layers: Layers of the model.
    """

    layers: tuple[int, ...]
    model_layers: int

    def to_dict(self) -> dict[str, Any]:
        """The ``coverage`` of a result."""
        return {
            "layers": list(self.layers),
            "model_layers": self.model_layers,
            "layer_share": len(self.layers) / self.model_layers,
        }


@dataclass(frozen=True, slots=True)
class TraceReport:
    """What the engine measured for one trace request: one hop, or several from one prefill.

    Attributes:
        scores: float32 ``[N]``, per-token scores summed over layers, unnormalised; of the first
            target's first hop.
        later_scores: The same of each hop that followed.
        other_targets: The same of all hops of each further target.
        layer_scores: float32 ``[layers, N]`` when asked for, else None.
        attention: float16 ``[layers, H, columns]`` when asked for, else None: column sums of the
            attention of the target's rows, ``sum_i w_i alpha_ij`` with weights that sum to 1, for
            the tokens up to the last target.
        recomputed_tokens: Tokens prefilled.
        cached_tokens: Tokens whose KV came from the prefix cache.
        restarts: How often recording began again after a preemption.
        seconds: Seconds by phase (``queue``, ``prefill``, ``attribution``).
        weights: What tells the weights that it was computed with from others.
        coverage: Which layers are traced; None if all are.
        changes: float64 ``[targets, 2]``, of each target's first hop: how much the traced layers,
            and all layers, change the weighted stream by mixing tokens; None where it is not known.
    """

    scores: torch.Tensor
    later_scores: tuple[torch.Tensor, ...] = ()
    other_targets: tuple[tuple[torch.Tensor, ...], ...] = ()
    layer_scores: torch.Tensor | None = None
    attention: torch.Tensor | None = None
    recomputed_tokens: int = 0
    cached_tokens: int = 0
    restarts: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    weights: str = ""
    coverage: Coverage | None = None
    changes: torch.Tensor | None = None

    @property
    def targets(self) -> tuple[tuple[torch.Tensor, ...], ...]:
        """Of each target the scores of its hops."""
        return (self.scores, *self.later_scores), *self.other_targets


@dataclass(frozen=True, slots=True)
class ScoredText:
    """Tokens, some of which are scored.

    Attributes:
        token_ids: The tokens.
        positions: Which of them are scored, ascending from 1.
    """

    token_ids: Sequence[int]
    positions: Sequence[int]


@dataclass(frozen=True, slots=True)
class ScoreReport:
    """Log-probabilities of tokens, given all tokens before each.

    Attributes:
        log_probs: float32 ``[P]``, natural logarithms, in the order of the positions.
        recomputed_tokens: Tokens prefilled.
        cached_tokens: Tokens whose KV came from the prefix cache.
        weights: As in `TraceReport`.
    """

    log_probs: torch.Tensor
    recomputed_tokens: int = 0
    cached_tokens: int = 0
    weights: str = ""


@dataclass(slots=True)
class TraceUsage:
    """Cost of a whole attribution, summed over its hops, and what they share.

    Attributes:
        weights: `TraceReport.weights` of its requests; None before the first.
        attention: `TraceReport.attention` of the hop that explains the target, if asked for.
        coverage: `TraceReport.coverage`.
        change_shares: By the identity of its plan, the share of each target that the traced layers
            have in `TraceReport.changes`; empty where it is not known.
        scored_requests: Requests that scored the target, with and without parts of the prompt.
        scored_tokens: Tokens that these prefilled.
        scored_cached_tokens: Tokens that they found in the prefix cache.
    """

    recomputed_tokens: int = 0
    cached_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    weights: str | None = None
    attention: torch.Tensor | None = None
    coverage: Coverage | None = None
    change_shares: dict[int, float] = field(default_factory=dict)
    scored_requests: int = 0
    scored_tokens: int = 0
    scored_cached_tokens: int = 0

    def add(self, report: TraceReport) -> None:
        """Adds one trace request."""
        self.weights = report.weights
        self.coverage = report.coverage
        if report.attention is not None:
            self.attention = report.attention
        self.recomputed_tokens += report.recomputed_tokens
        self.cached_tokens += report.cached_tokens
        for phase, value in report.seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + value

    def add_score(self, report: ScoreReport) -> None:
        """Adds the cost of one request that scored the target."""
        self.scored_requests += 1
        self.scored_tokens += report.recomputed_tokens
        self.scored_cached_tokens += report.cached_tokens
