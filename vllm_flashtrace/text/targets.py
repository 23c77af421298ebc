"""Which generated tokens are explained, and with what weight.

Invariant: a resolved target consists of generated tokens only, is never empty, and never reaches
beyond what was generated; otherwise a TraceError says why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vllm_flashtrace.api.patterns import last_match
from vllm_flashtrace.api.request import FlashTraceRequest
from vllm_flashtrace.api.schema_options import RegexTarget, TextTarget, TokensTarget, ToolCallTarget
from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.base.records import Span
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.text.generated import GeneratedText
from vllm_flashtrace.text.reasoning import Reasoning

_REGEX_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class ResolvedTarget:
    """What is explained.

    Attributes:
        weights: Weights over absolute positions.
        text: The exact text looked for, or None where the tokens' own text says it.
    """

    weights: TargetWeights
    text: str | None = None


def resolve_target(
    request: FlashTraceRequest,
    generated: GeneratedText,
    reasoning: Reasoning,
    prompt_length: int,
    tool_call: Callable[[ToolCallTarget], Span],
) -> ResolvedTarget:
    """Turns the request's ``target`` into weights.

    Args:
        request: The request.
        generated: The decoded generated tokens.
        reasoning: Their reasoning part, for ``"output"``.
        prompt_length: Position of the first generated token.
        tool_call: Finds a generated tool call in the visible text, or raises a TraceError.

    Raises:
        TraceError: ``empty_target``, ``target_not_found``, ``span_out_of_range``,
            ``regex_timeout``, ``tool_call_not_found`` or ``argument_not_found``.
    """
    target = request.target
    visible, shown = generated.visible, generated.shown
    text: str | None = None
    if isinstance(target, TextTarget):
        start = shown.text.rfind(target.text)
        if start < 0:
            raise TraceError(
                "target_not_found",
                f"flashtrace.target.text {target.text[:80]!r} does not occur in the generated text",
            )
        text = target.text
        weights = _ones(shown.overlapping(start, start + len(text)))
    elif isinstance(target, RegexTarget):
        start, end = _search(target.regex, shown.text)
        text = shown.text[start:end]
        weights = _ones(shown.overlapping(start, end))
    elif isinstance(target, ToolCallTarget):
        start, end = tool_call(target)
        text = visible.text[start:end]
        weights = _ones(visible.overlapping(start, end))
    elif isinstance(target, TokensTarget):
        _require_generated(max(end for _, end in target.tokens) - 1, len(generated))
        weights = _ones([i for start, end in target.tokens for i in range(start, end)])
    elif target == "output":
        weights = _ones(reasoning.answer)
    elif target == "generated":
        weights = _ones(visible.overlapping(0, len(visible.text)))
    else:
        weights = target.weights
        _require_generated(max(target.weights), len(generated))
    if not weights:
        missing = "answer after its reasoning" if target == "output" else "text"
        raise TraceError("empty_target", f"flashtrace.target: the completion shows no {missing}")
    return ResolvedTarget(
        TargetWeights.from_mapping({prompt_length + i: w for i, w in weights.items()}), text
    )


def _ones(tokens: list[int]) -> dict[int, float]:
    return dict.fromkeys(tokens, 1.0)


def _search(pattern: str, text: str) -> tuple[int, int]:
    try:
        found = last_match(pattern, text, seconds=_REGEX_SECONDS)
    except TimeoutError:
        raise TraceError(
            "regex_timeout",
            f"flashtrace.target.regex {pattern[:80]!r} took longer than {_REGEX_SECONDS} s on the "
            "generated text",
        ) from None
    if found is None:
        raise TraceError(
            "target_not_found",
            f"flashtrace.target.regex {pattern[:80]!r} matches nothing in the generated text",
        )
    return found


def _require_generated(last: int, length: int) -> None:
    if last >= length:
        raise TraceError(
            "span_out_of_range",
            f"flashtrace.target reaches generated token {last}, but {length} were generated",
        )
