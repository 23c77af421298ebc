"""What one trace has to do: tokens to prefill, what to explain, what to follow, what to skip.

Positions of a plan lie within its tokens, and the tokens end with the last one of the target:
later ones cannot influence it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unicodedata import normalize

import regex
import torch
from torch import Tensor

from vllm_flashtrace.api.checks import shown
from vllm_flashtrace.api.patterns import last_match
from vllm_flashtrace.api.request import (
    FlashTraceRequest,
    RegexTarget,
    Target,
    TextTarget,
    TokensTarget,
    ToolCallTarget,
)
from vllm_flashtrace.base.errors import InvalidRequestError, TraceError
from vllm_flashtrace.base.records import Completion, ScoredText, Span
from vllm_flashtrace.core.hops import HopRecursion
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.text.answer_parts import AnswerPart, answer_parts
from vllm_flashtrace.text.call_formats import WrittenCall
from vllm_flashtrace.text.generated import (
    GeneratedText,
    OutputParser,
    ParsedOutput,
    decode_generated,
)
from vllm_flashtrace.text.guard import require_messages
from vllm_flashtrace.text.offsets import TokenText, token_offsets
from vllm_flashtrace.text.prompt_images import without_text
from vllm_flashtrace.text.prompt_map import PromptMap, locate_prompt
from vllm_flashtrace.text.prompt_texts import Render
from vllm_flashtrace.text.reasoning import (
    Reasoning,
    ReasoningBlock,
    find_reasoning,
    hidden_tokens,
    reasoning_blocks,
)
from vllm_flashtrace.text.sources import PromptSource, find_sources, locate_sources
from vllm_flashtrace.text.tool_calls import call_target_span, locate_calls

_REGEX_SECONDS = 0.25
# Every character of Unicode's punctuation categories, which hold the comma and the full stop of the
# paper authors' list; blanks are taken off before, and what is left of a blank token is "".
_PUNCTUATION = regex.compile(r"[\p{Punctuation}\s]*")


def skip_mask(token_texts: Sequence[str], rule: str | Sequence[str]) -> Tensor | None:
    """Marks skipped tokens.

    Args:
        token_texts: Text of each token.
        rule: ``"none"``; ``"punctuation"`` for tokens that consist of punctuation and blanks
            alone; or strings: a token whose text without surrounding blanks equals one of them,
            itself without surrounding blanks, is skipped, composed or decomposed alike.

    Returns:
        bool ``[N]``, or None when the rule is ``"none"``.
    """
    if rule == "none":
        return None
    stripped = [text.strip() for text in token_texts]
    if rule == "punctuation":
        skipped = [_PUNCTUATION.fullmatch(text) is not None for text in stripped]
    else:
        strings = {normalize("NFC", text.strip()) for text in rule}
        skipped = [normalize("NFC", text) in strings for text in stripped]
    return torch.tensor(skipped, dtype=torch.bool)


@dataclass(frozen=True, slots=True)
class ResolvedTarget:
    """What is explained.

    Attributes:
        weights: Weights over absolute positions.
        text: The exact text looked for, or None where the tokens' own text says it.
        part: What part of the answer it is, where the answer was cut into parts.
    """

    weights: TargetWeights
    text: str | None = None
    part: AnswerPart | None = None


def resolve_target(
    target: Target,
    generated: GeneratedText,
    reasoning: Reasoning,
    prompt_length: int,
    tool_call: Callable[[ToolCallTarget], Span],
    name: str = "flashtrace.target",
) -> ResolvedTarget:
    """Turns a target of the request into weights.

    Args:
        target: The target.
        generated: The decoded generated tokens.
        reasoning: Their reasoning part, for ``"output"``.
        prompt_length: Position of the first generated token.
        tool_call: Finds a generated tool call in the visible text, or raises a TraceError.
        name: Path of the target in the request, for messages.

    Raises:
        TraceError: ``empty_target``, ``target_not_found``, ``span_out_of_range``,
            ``regex_timeout``, ``tool_call_not_found`` or ``argument_not_found``.
    """
    visible, readable = generated.visible, generated.shown
    text: str | None = None
    if isinstance(target, TextTarget):
        place = generated.find_last(readable, target.text)
        if place is None:
            raise TraceError(
                "target_not_found",
                f"{name}.text {shown(target.text)} does not occur in the generated text",
            )
        text = readable.text[slice(*place)]
        weights = _ones(readable.overlapping(*place))
    elif isinstance(target, RegexTarget):
        start, end = _search(target.regex, readable.text, name)
        text = readable.text[start:end]
        weights = _ones(readable.overlapping(start, end))
    elif isinstance(target, ToolCallTarget):
        start, end = tool_call(target)
        text = visible.text[start:end]
        weights = _ones(visible.overlapping(start, end))
    elif isinstance(target, TokensTarget):
        _require_generated(max(end for _, end in target.tokens) - 1, len(generated), name)
        weights = _ones([i for start, end in target.tokens for i in range(start, end)])
    elif target == "output":
        weights = _ones(reasoning.answer)
    elif target == "generated":
        weights = _ones(visible.overlapping(0, len(visible.text)))
    else:
        weights = target.weights
        _require_generated(max(target.weights), len(generated), name)
    if not weights:
        raise TraceError("empty_target", f"{name}: {_emptiness(generated, reasoning)}")
    return ResolvedTarget(_absolute(weights, prompt_length), text)


def _absolute(weights: Mapping[int, float], prompt_length: int) -> TargetWeights:
    return TargetWeights.from_mapping({prompt_length + i: w for i, w in weights.items()})


def _emptiness(generated: GeneratedText, reasoning: Reasoning) -> str:
    """Why a target that no position names is empty, and what would not be."""
    count = len(generated)
    spans = f'{{"tokens": [[0, {count}]]}} explains the generated tokens themselves'
    if generated.visible.text.strip():
        if reasoning.tokens:
            return f"all that was generated is reasoning; 'generated' explains it, and {spans}"
        return f"nothing but markers of reasoning was generated; {spans}"
    if generated.visible.text:
        return f"nothing but blanks was generated; {spans}"
    plain = [generated.full.token(i) for i in range(count) if i not in generated.special]
    if not plain:
        return f"nothing but special tokens was generated; {spans}"
    if not "".join(plain).strip("\ufffd"):
        return f"the generated tokens are parts of a character that is not complete; {spans}"
    return f"a stop string cut off all the text that was generated; {spans}"


def _ones(tokens: list[int]) -> dict[int, float]:
    return dict.fromkeys(tokens, 1.0)


def _search(pattern: str, text: str, name: str) -> tuple[int, int]:
    try:
        found = last_match(pattern, text, seconds=_REGEX_SECONDS)
    except TimeoutError:
        raise TraceError(
            "regex_timeout",
            f"{name}.regex {shown(pattern)} took longer than {_REGEX_SECONDS} s on the "
            "generated text",
        ) from None
    if found is None:
        raise TraceError(
            "target_not_found",
            f"{name}.regex {shown(pattern)} matches nothing in the generated text",
        )
    return found


def _require_generated(last: int, length: int, name: str) -> None:
    if last >= length:
        raise TraceError(
            "span_out_of_range",
            f"{name} reaches generated token {last}, but {length} were generated",
        )


@dataclass(frozen=True, slots=True)
class OutputParts:
    """A completion taken apart.

    Attributes:
        generated: The decoded generated tokens, and how many of them are hidden.
        parsed: What the server's parsers found; None where there are none.
        reasoning: Their reasoning; None where nothing located it.
    """

    generated: GeneratedText
    parsed: ParsedOutput | None = None
    reasoning: list[ReasoningBlock] | None = None

    def tool_call(self, target: ToolCallTarget) -> Span:
        """Characters of the visible text that are the call or the argument a target names.

        Raises:
            TraceError: ``tool_call_not_found`` or ``argument_not_found``.
        """
        if self.parsed is None:
            raise TraceError(
                "tool_call_not_found",
                f"flashtrace.target.tool_call {target.tool_call}: no tool call parser read this "
                "completion",
            )
        calls = self.parsed.tool_calls[: self.parsed.max_tool_calls]
        return call_target_span(target, calls, self._located())

    def require_located(self) -> None:
        """Refuses tool calls whose arguments cannot be told apart in the generated text.

        Raises:
            TraceError: ``tool_call_not_found``.
        """
        if self.parsed is not None and self.parsed.tool_calls and self._located() is None:
            raise TraceError(
                "tool_call_not_found",
                "flashtrace.guard: the generated text does not show where its tool calls were "
                "written",
            )

    def answer_parts(self, kind: str, reasoning: Reasoning) -> list[AnswerPart]:
        """The parts of the answer.

        Args:
            kind: See `answer_parts`.
            reasoning: The reasoning and what follows it.
        """
        visible = self.generated.visible
        if not reasoning.answer:
            return []
        answer = visible.starts[reasoning.answer[0]], visible.ends[reasoning.answer[-1]]
        calls: list[WrittenCall] = []
        if self.parsed is not None and self.parsed.tool_calls and kind == "claims":
            calls = (self._located() or [])[: self.parsed.max_tool_calls]
            content = (self.parsed.content or "").strip()
            at = visible.text.find(content, *answer)
            answer = (at, at + len(content)) if at >= 0 else (answer[0], answer[0])
        return answer_parts(kind, visible.text, answer, calls)

    def in_answer(
        self, found: ResolvedTarget, target: TargetWeights, prompt_length: int
    ) -> Span | None:
        """See `TracePlan.in_answer`."""
        if len(target.spans) > 1 and found.part is None:
            return None
        view = self.generated.visible
        first, last = target.first - prompt_length, target.last - prompt_length
        start, end = view.starts[first], view.ends[last]
        if found.part is not None:
            start, end = found.part.span[0], min(end, found.part.span[1])
        elif found.text is not None:
            at = view.text.find(found.text, start, end)
            start, end = (at, at + len(found.text)) if at >= 0 else (start, end)
        if self.parsed is None:
            return (start, end) if start < end else None
        content = self.parsed.content or ""
        at = view.text.find(content, self.reasoning[0].end if self.reasoning else 0)
        inside = at >= 0 and at <= start < end <= at + len(content)
        return (start - at, end - at) if inside else None

    def _located(self) -> list[WrittenCall] | None:
        """Where the tool calls stand in the visible text."""
        if self.parsed is None:
            return None
        begin = self.reasoning[0].end if self.reasoning else 0
        return locate_calls(self.generated.visible.text, begin, self.parsed.tool_calls)


def take_apart(
    generated: GeneratedText, completion: Completion, parser: OutputParser | None
) -> OutputParts:
    """Runs the server's parsers and locates what they found.

    Args:
        generated: The decoded generated tokens.
        completion: The completion they are of.
        parser: The server's parsers; None if it has none.
    """
    if parser is None:
        return OutputParts(generated)
    parsed = parser(completion.text, completion.generated_token_ids)
    blocks = reasoning_blocks(parsed, generated, completion)
    hidden = hidden_tokens(parsed, blocks, generated.visible, completion.generated_token_ids)
    return OutputParts(replace(generated, hidden=hidden), parsed, blocks)


@dataclass(frozen=True, slots=True)
class TracePlan:
    """One attribution, ready to run.

    Attributes:
        request: The client's options.
        completion: What is explained.
        token_ids: The prompt and the generated tokens up to the last target position; N of them.
        prompt_length: Number of prompt tokens.
        recursion: Hands out the target of each hop.
        target: What hop 0 explains; absolute positions.
        target_text: Text of the target.
        part: What part of the answer the target is, where the answer was cut into parts.
        input_mask: bool ``[N]``, prompt tokens that are neither followed nor skipped; they alone
            are credited.
        auto_threshold: Mass on reasoning at which ``hops: "auto"`` stops.
        dropped_target_tokens: Target tokens that do not fit the model's context.
        prompt: The decoded prompt; its images' tokens have no text.
        generated: The decoded generated tokens, all of them.
        prompt_map: The client's messages laid over the prompt.
        sources: What the answer may have been taken from; None where nothing was asked for.
        in_answer: Characters of the target within the content that the client gets; None where it
            lies elsewhere, or in no one place.
        after_reasoning: Whether reasoning that is marked as such stands before it.
    """

    request: FlashTraceRequest
    completion: Completion
    token_ids: list[int]
    prompt_length: int
    recursion: HopRecursion
    target: TargetWeights
    target_text: str
    part: AnswerPart | None
    input_mask: Tensor
    auto_threshold: float
    dropped_target_tokens: int
    prompt: TokenText
    generated: GeneratedText
    prompt_map: PromptMap
    sources: list[PromptSource] | None
    in_answer: Span | None
    after_reasoning: bool

    @property
    def target_spans(self) -> list[Span]:
        """Spans of the target, counted from the first generated token."""
        offset = self.prompt_length
        return [(start - offset, end - offset) for start, end in self.target.spans]


_LEAST_SURPRISE = 1e-4
"""Of a target's largest: a token of which the model was sure counts a little all the same."""


def surprise_text(plans: Sequence[TracePlan]) -> ScoredText:
    """What is scored for `weigh_by_surprise`: the tokens of all targets, in one text."""
    positions = torch.cat([plan.recursion.target_tokens for plan in plans]).unique()
    longest = max(plans, key=lambda plan: len(plan.token_ids))
    return ScoredText(longest.token_ids, positions.tolist())


def weigh_by_surprise(plans: Sequence[TracePlan], text: ScoredText, log_probs: Tensor) -> None:
    """Weights each token of the targets by ``-log p``, before anything is explained.

    Args:
        plans: One for each target.
        text: What `surprise_text` gave.
        log_probs: Natural logarithms, ``[P]``, in the order of its positions.

    Raises:
        TraceError: ``bad_scores``: one is not a finite number.
    """
    if not log_probs.isfinite().all():
        raise TraceError("bad_scores", "the log-probability of a target token is not finite")
    positions = torch.tensor(text.positions)
    for plan in plans:
        own = -log_probs[torch.isin(positions, plan.recursion.target_tokens)].double()
        plan.recursion.weigh(own.clamp(min=_LEAST_SURPRISE * max(float(own.max()), 1e-4)))


def plan_trace(
    request: FlashTraceRequest, completion: Completion, tokenizer: Any, **options: Any
) -> TracePlan:
    """As `plan_targets`, for a request with one target."""
    [plan] = plan_targets(request, completion, tokenizer, **options)
    return plan


def plan_targets(
    request: FlashTraceRequest,
    completion: Completion,
    tokenizer: Any,
    *,
    reasoning_parser: OutputParser | None = None,
    render: Render | None = None,
    max_trace_tokens: int | None = None,
    auto_threshold: float = 0.05,
    max_hops: int = 8,
    max_targets: int = 64,
) -> list[TracePlan]:
    """Plans the attribution of a completion, one plan for each target.

    Args:
        request: The client's options.
        completion: The finished completion.
        tokenizer: The model's tokenizer.
        reasoning_parser: The server's reasoning and tool call parsers.
        render: Renders messages exactly as the completion's were.
        max_trace_tokens: Most tokens that can be prefilled; None for no limit.
        auto_threshold: Mass on reasoning at which ``hops: "auto"`` stops.
        max_hops: Limit for ``hops: "auto"``.
        max_targets: Most parts that an answer may be cut into.

    Raises:
        TraceError: ``empty_completion``, ``empty_target``, ``target_not_found``,
            ``span_out_of_range``, ``reasoning_not_found``, ``regex_timeout``,
            ``tool_call_not_found``, ``argument_not_found``, ``target_beyond_context``,
            ``too_many_targets``, or ``assistant_not_located``.
        InvalidRequestError: The request has a guard, and the prompt is no chat; or it asks for what
            it cannot have beside the prompt's images.
    """
    if not completion.generated_token_ids:
        raise TraceError("empty_completion", "no token was generated")
    if request.guard is not None:
        require_messages(completion)
    refuse_with_images(request, len(completion.images))
    prompt_length = len(completion.prompt_token_ids)
    written = token_offsets(tokenizer, completion.prompt_token_ids)
    prompt = without_text(written, completion.images, but_first=False)
    parts = take_apart(decode_generated(tokenizer, completion), completion, reasoning_parser)
    generated = parts.generated
    reasoning = find_reasoning(
        request.reasoning, generated, prompt_text=prompt.text, parsed=parts.reasoning
    )
    resolved = _resolve_all(request, parts, reasoning, prompt_length, max_targets)
    most = max_trace_tokens
    scored = request.weighting != "equal" or request.verify > 0
    if most is not None and request.rows == "predicting" and not scored:
        most += 1  # No row of the last token itself is needed.
    targets = [_within_context(target.weights, most, prompt_length) for target in resolved]
    with_marks = without_text(written, completion.images, but_first=True)
    prompt_map = locate_prompt(completion, with_marks, render, tokenizer)
    sources: list[PromptSource] | None = None
    if request.sources is not None:
        sources = locate_sources(find_sources(request, completion), prompt_map, prompt)
    token_ids = completion.token_ids
    skipped = skip_mask([*prompt.tokens(), *generated.full.tokens()], request.skip_tokens)
    if skipped is not None:
        # What is skipped would tell which hidden tokens spell one of the client's strings.
        skipped[prompt_length : prompt_length + generated.hidden] = False
        # Tokens of images have no text, and are no punctuation.
        skipped[[token for image in completion.images for token in image.tokens]] = False
    plans = []
    explained = [
        skipped is None or target.without(skipped[: target.last + 1]) is not None
        for target, _ in targets
    ]
    for found, (target, dropped), left in zip(resolved, targets, explained, strict=True):
        length = target.last + 1
        own_skipped = None if skipped is None else skipped[:length]
        if own_skipped is not None and not left:
            # Beside parts that have words, those of punctuation alone are left out.
            if found.part is not None and any(explained):
                continue
            if request.skip_tokens != "punctuation":
                kind = "target" if found.part is None else "answer"
                raise TraceError(
                    "empty_target",
                    f"flashtrace.skip_tokens leaves no token of the {kind} to explain",
                )
            own_skipped = own_skipped.clone()
            own_skipped[target.positions] = False
        followed = _followed(request, reasoning, generated, prompt_map, target, prompt_length)
        input_mask = (torch.arange(length) < prompt_length) & ~followed
        if own_skipped is not None:
            input_mask &= ~own_skipped
        recursion = HopRecursion(
            target,
            prompt_length,
            length,
            followed,
            hops=request.hops,
            skip_mask=own_skipped,
            auto_threshold=auto_threshold,
            max_hops=max_hops,
            predicting=request.rows == "predicting",
        )
        plan = TracePlan(
            request=request,
            completion=completion,
            token_ids=token_ids[:length],
            prompt_length=prompt_length,
            recursion=recursion,
            target=target,
            target_text=_target_text(found.text, dropped, target, generated, prompt_length),
            part=found.part,
            input_mask=input_mask,
            auto_threshold=auto_threshold,
            dropped_target_tokens=dropped,
            prompt=prompt,
            generated=generated,
            prompt_map=prompt_map,
            sources=sources,
            in_answer=parts.in_answer(found, target, prompt_length),
            after_reasoning=reasoning.located
            and any(prompt_length + i < target.first for i in reasoning.tokens[:1]),
        )
        plans.append(plan)
    return plans


def refuse_with_images(request: FlashTraceRequest, images: int) -> None:
    """Refuses what a request cannot have beside images.

    A verification takes texts out of the prompt, where images would have to move; and what an image
    shows may be the words of somebody else than the one who sent it, so a guard cannot trust it.

    Args:
        request: The client's options.
        images: How many images the prompt has.

    Raises:
        InvalidRequestError: ``unsupported_input``, naming the option.
    """
    for name, asked in (("verify", request.verify > 0), ("guard", request.guard is not None)):
        if asked and images:
            raise InvalidRequestError(
                f"flashtrace.{name}",
                f"flashtrace.{name} is not available for prompts with images, got {images} of them",
                code="unsupported_input",
            )


def _resolve_all(
    request: FlashTraceRequest,
    parts: OutputParts,
    reasoning: Reasoning,
    prompt_length: int,
    max_targets: int,
) -> list[ResolvedTarget]:
    """The request's target, or its targets."""
    generated = parts.generated
    if not isinstance(request.targets, str):
        several = request.targets is not None
        return [
            resolve_target(
                target,
                generated,
                reasoning,
                prompt_length,
                parts.tool_call,
                f"flashtrace.targets[{index}]" if several else "flashtrace.target",
            )
            for index, target in enumerate(request.targets or (request.target,))
        ]
    visible = generated.visible
    if request.guard is not None:
        parts.require_located()
    found = parts.answer_parts(request.targets, reasoning)
    if len(found) > max_targets:
        raise TraceError(
            "too_many_targets",
            f"flashtrace.targets {shown(request.targets)}: the answer has {len(found)}; the server "
            f"explains at most {max_targets} of one answer",
        )
    resolved = []
    for part in found:
        tokens = [i for i in visible.within(*part.span) if i >= generated.hidden]
        if tokens:
            weights = _absolute(_ones(tokens), prompt_length)
            resolved.append(ResolvedTarget(weights, visible.text[slice(*part.span)], part))
    if not resolved:
        raise TraceError("empty_target", f"flashtrace.targets: {_emptiness(generated, reasoning)}")
    return resolved


def _within_context(
    target: TargetWeights, limit: int | None, prompt_length: int
) -> tuple[TargetWeights, int]:
    """The part of the target that fits, and how many tokens do not."""
    if limit is None:
        return target, 0
    kept = target.below(limit)
    if kept is None:
        raise TraceError(
            "target_beyond_context",
            f"the target begins at token {target.first} of prompt and completion (the prompt has "
            f"{prompt_length}), but only the first {limit} can be traced in the model's context",
        )
    return kept, len(target.positions) - len(kept.positions)


def _followed(
    request: FlashTraceRequest,
    reasoning: Reasoning,
    generated: GeneratedText,
    prompt_map: PromptMap,
    target: TargetWeights,
    prompt_length: int,
) -> Tensor:
    """Mask ``[N]`` of the tokens that hops explain in turn.

    Raises:
        TraceError: An assistant message that should be followed cannot be located.
    """
    tokens: Sequence[int] = range(generated.shown_length)
    if request.recurse_over == "reasoning":
        tokens = reasoning.tokens
        blank = not any(generated.full.token(i).strip() for i in tokens)
        if blank and request.reasoning == "auto":
            # No reasoning was set apart: what leads up to the target takes its place.
            start = reasoning.answer[0] if reasoning.located and reasoning.answer else 0
            tokens = range(start, target.first - prompt_length)
    mask = torch.zeros(target.last + 1, dtype=torch.bool)
    mask[[prompt_length + i for i in tokens if prompt_length + i <= target.last]] = True
    if request.recurse_over == "assistant":
        lost = [i for i in sorted(prompt_map.unlocated) if prompt_map.roles[i] == "assistant"]
        if lost:
            raise TraceError(
                "assistant_not_located",
                "flashtrace.recurse_over 'assistant': the prompt does not show where assistant "
                f"message {lost[0]} lies",
            )
        mask[prompt_map.of_role("assistant")] = True
    return mask


def _target_text(
    exact: str | None,
    dropped: int,
    target: TargetWeights,
    generated: GeneratedText,
    prompt_length: int,
) -> str:
    """The target's text: what was looked for, or what its tokens say."""
    if exact is not None and not dropped:
        return exact
    spans = [(start - prompt_length, end - prompt_length) for start, end in target.spans]
    view = generated.shown
    shows_all = all(view.starts[i] < view.ends[i] for span in spans for i in range(*span))
    if not shows_all and not generated.hidden:
        view = generated.full
    return "".join(view.text[view.starts[start] : view.ends[end - 1]] for start, end in spans)
