"""The reasoning that the server's parser found, among the generated tokens.

Invariant: the tokens of a block spell what the parser calls reasoning, or lie between the parser's
own marker tokens; where neither can be said, there are no blocks but None. What a client must not
read is never underestimated: if in doubt, everything generated is hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from vllm_flashtrace.base.records import Completion, Span
from vllm_flashtrace.text.generated import GeneratedText
from vllm_flashtrace.text.generated_calls import locate_calls
from vllm_flashtrace.text.offsets import TokenText
from vllm_flashtrace.text.parsed_output import ParsedOutput


@dataclass(frozen=True, slots=True)
class ReasoningBlock:
    """One uninterrupted stretch of reasoning.

    Attributes:
        tokens: Its generated tokens that show something.
        end: Character of the visible text behind it and its closing marker.
    """

    tokens: list[int]
    end: int


def reasoning_blocks(
    parsed: ParsedOutput, generated: GeneratedText, completion: Completion
) -> list[ReasoningBlock] | None:
    """Locates the parser's reasoning, and further blocks between its marker tokens.

    Args:
        parsed: What the server's parser found.
        generated: The decoded generated tokens.
        completion: The completion that both are about.

    Returns:
        ``[]`` where the parser looked and found none; None where it cannot tell or its answer
        cannot be located.
    """
    if not parsed.reasoning:
        return [] if parsed.reads_reasoning else None
    visible, ids = generated.visible, completion.generated_token_ids
    marked = _Marked(ids, parsed.markers, generated)
    if marked.spells(parsed.reasoning):
        return [marked.block(span) for span in marked.spans]
    located = _located(parsed, visible.text, completion.text)
    if located is None:
        return None
    tokens = [i for i in visible.within(*located) if i not in generated.special]
    last = max(tokens, default=len(ids))
    later = [marked.block(span) for span in marked.spans if span[0] > last]
    return [ReasoningBlock(tokens, located[1]), *later]


def hidden_tokens(
    parsed: ParsedOutput,
    blocks: Sequence[ReasoningBlock] | None,
    visible: TokenText,
    token_ids: Sequence[int],
) -> int:
    """How many tokens at the beginning hold reasoning that the client does not get.

    Args:
        parsed: What the server's parser found.
        blocks: The reasoning that was located.
        visible: The visible text.
        token_ids: The generated tokens.
    """
    if not parsed.hides_reasoning:
        return 0
    if parsed.reasoning and blocks is None:
        return len(visible)
    known = max((block.end for block in blocks or ()), default=0)
    shown_from = max(known, _shown_from(parsed, visible.text, known))
    for i in range(_behind_markers(token_ids, parsed.markers), len(visible)):
        if shown_from <= visible.starts[i] < visible.ends[i]:
            return i
    return len(visible)


def _behind_markers(ids: Sequence[int], markers: tuple[int, int] | None) -> int:
    """The first token behind every marked reasoning, whether the parser took it for that or not."""
    for i in range(len(ids) - 1, -1, -1):
        if markers and ids[i] in markers:
            return i + 1 if ids[i] == markers[1] else len(ids)
    return 0


def _shown_from(parsed: ParsedOutput, text: str, known: int) -> int:
    """First character of the answer that the client gets: its content, else its tool calls."""
    if content := (parsed.content or "").strip():
        at = text.rfind(content)
        if at >= 0:
            return at
        # The parser left something out of the content. What both end with is shown.
        bare = text.rstrip()
        backwards = zip(reversed(content), reversed(bare), strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], backwards))
        return len(bare) - (0 if parsed.tool_calls else same)
    calls = locate_calls(text, known, parsed.tool_calls)
    return min(call.span[0] for call in calls) if calls else len(text)


class _Marked:
    """Ranges of tokens between marker tokens; a first one may begin, a last one end, without."""

    def __init__(
        self, ids: Sequence[int], markers: tuple[int, int] | None, generated: GeneratedText
    ) -> None:
        self._ids = ids
        self._markers = markers or ()
        self._visible = generated.visible
        self._special = generated.special
        self.spans = _between(ids, *markers) if markers else []

    def spells(self, reasoning: str) -> bool:
        """Whether the first range, or all of them together, are the parser's reasoning."""
        if not self.spans:
            return False
        whole = [
            "".join(self._visible.token(i) for i in range(start, end)) for start, end in self.spans
        ]
        bare = ["".join(self._visible.token(i) for i in self._tokens(span)) for span in self.spans]
        said = {"".join(text.split()) for text in (whole[0], bare[0], "".join(bare))}
        return "".join(reasoning.split()) in said

    def block(self, span: Span) -> ReasoningBlock:
        """A range as a block of reasoning."""
        end = span[1]
        closed = end < len(self._ids)  # Only a closing marker ends a range before the last token.
        last = end if closed else end - 1
        return ReasoningBlock(self._tokens(span), self._visible.ends[last] if last >= 0 else 0)

    def _tokens(self, span: Span) -> list[int]:
        visible = self._visible
        return [
            i
            for i in range(*span)
            if visible.starts[i] < visible.ends[i]
            and i not in self._special
            and self._ids[i] not in self._markers
        ]


def _between(ids: Sequence[int], opening: int, closing: int) -> list[Span]:
    first = next((token for token in ids if token in (opening, closing)), closing)
    start: int | None = 0 if first == closing else None
    spans: list[Span] = []
    for i, token in enumerate(ids):
        if token == opening and start is None:
            start = i + 1
        elif token == closing and start is not None:
            spans.append((start, i))
            start = None
    return spans if start is None else [*spans, (start, len(ids))]


def _located(parsed: ParsedOutput, visible: str, text: str) -> Span | None:
    """Finds the parser's reasoning by its text, which it may have stripped."""
    reasoning = parsed.reasoning or ""
    at = text.find(reasoning, parsed.reasoning_from)
    if at < 0:
        return None
    if visible == text:
        return at, at + len(reasoning)
    # The parser read another text than the tokens decode to: only one place will do.
    at = visible.find(reasoning)
    if at < 0 or visible.find(reasoning, at + 1) >= 0:
        return None
    return at, at + len(reasoning)
