"""Which generated tokens are reasoning, and which the client must not learn the text of.

Reasoning is found by the first rule that applies: an explicit option, the server's reasoning
parser, ``<think>`` tags. Markers around reasoning are neither reasoning nor answer. Where no rule
applies, everything generated before the target is reasoning, which :mod:`.plan` fills in, since it
knows the target. What a client must not read is never underestimated: if in doubt, everything
generated is hidden.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from vllm_flashtrace.api.checks import shown
from vllm_flashtrace.api.request import TextTarget, TokensTarget
from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.base.records import Completion, Span
from vllm_flashtrace.text.generated import GeneratedText, ParsedOutput
from vllm_flashtrace.text.normal_forms import last_at
from vllm_flashtrace.text.offsets import TokenText
from vllm_flashtrace.text.tool_calls import locate_calls


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
    marked = _MarkedSpans(ids, parsed.markers, generated)
    if marked.spells(parsed.reasoning):
        return [marked.block(span) for span in marked.spans]
    span = _reasoning_span(parsed, visible.text, completion.text)
    if span is None:
        return None
    tokens = [i for i in visible.within(*span) if i not in generated.special]
    last = max(tokens, default=len(ids))
    later = [marked.block(each) for each in marked.spans if each[0] > last]
    return [ReasoningBlock(tokens, span[1]), *later]


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
        at = last_at(text, content)
        if at >= 0:
            return at
        # The parser left something out of the content. What both end with is shown.
        bare = text.rstrip()
        backwards = zip(reversed(content), reversed(bare), strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], backwards))
        return len(bare) - (0 if parsed.tool_calls else same)
    calls = locate_calls(text, known, parsed.tool_calls)
    return min(call.span[0] for call in calls) if calls else len(text)


class _MarkedSpans:
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


def _reasoning_span(parsed: ParsedOutput, visible: str, text: str) -> Span | None:
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


_TAG = re.compile(r"<(/?)think>")
_NAME = r"(?:\w+:)?(?:think|thinking|thought|thoughts|reasoning)"
# What closes reasoning, once or several times, and reasoning in which nothing was said.
_CLOSING = re.compile(
    rf"(?:\s*(?:(?:<{_NAME}>\s*)?</{_NAME}>|(?:\[THINK\]\s*)?\[/THINK\]"
    r"|(?:<\|START_THINKING\|>\s*)?<\|END_THINKING\|>|(?:◁think▷\s*)?◁/think▷|<channel\|>))+"
)


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Reasoning among the generated tokens.

    Attributes:
        tokens: Positions of reasoning tokens, ascending, counted from the first generated token.
        answer: Positions of tokens after the reasoning that show the client something, without
            blank tokens at either end.
        located: Whether a rule applied; if not, `tokens` is empty and `answer` is everything
            visible.
    """

    tokens: list[int]
    answer: list[int]
    located: bool = True


def find_reasoning(
    option: str | TextTarget | TokensTarget,
    generated: GeneratedText,
    *,
    prompt_text: str = "",
    parsed: Sequence[ReasoningBlock] | None = None,
) -> Reasoning:
    """Finds reasoning by the request's ``reasoning`` option.

    Args:
        option: ``"auto"``, ``"none"``, a text or spans of generated tokens.
        generated: The decoded generated tokens.
        prompt_text: The decoded prompt; templates may open a ``<think>`` block in it.
        parsed: The server's parser's reasoning; None where there is no parser, or where its answer
            cannot be located.

    Raises:
        TraceError: ``span_out_of_range`` or ``reasoning_not_found`` for an explicit option.
    """
    found = _by_option(option, generated, prompt_text, parsed)
    # A blank token that is hidden must not be told from another by where the answer begins.
    answer = [i for i in found.answer if i >= generated.hidden]
    return Reasoning(found.tokens, answer, found.located)


def _by_option(
    option: str | TextTarget | TokensTarget,
    generated: GeneratedText,
    prompt_text: str,
    parsed: Sequence[ReasoningBlock] | None,
) -> Reasoning:
    visible = generated.visible
    if isinstance(option, TokensTarget):
        tokens = _given_tokens(option, len(generated))
        return Reasoning(tokens, _answer_from(visible, visible.ends[tokens[-1]]))
    if isinstance(option, TextTarget):
        return _given_text(option.text, generated)
    if option == "none":
        return Reasoning([], _answer_from(visible, 0))
    if parsed is not None:
        tokens = sorted({i for block in parsed for i in block.tokens})
        last = max((block.end for block in parsed), default=0)
        return Reasoning(tokens, _answer_from(visible, last))
    return _from_tags(generated, opened=prompt_text.rstrip().endswith("<think>"))


def _given_tokens(option: TokensTarget, length: int) -> list[int]:
    last = max(end for _, end in option.tokens)
    if last > length:
        raise TraceError(
            "span_out_of_range",
            f"flashtrace.reasoning.tokens reaches token {last}, but {length} were generated",
        )
    return sorted({i for start, end in option.tokens for i in range(start, end)})


def _given_text(text: str, generated: GeneratedText) -> Reasoning:
    views = (generated.shown,) if generated.hidden else (generated.visible, generated.full)
    for view in views:
        place = generated.find_last(view, text)
        if place is not None:
            tokens = view.overlapping(*place)
            visible = generated.visible
            return Reasoning(tokens, _answer_from(visible, visible.ends[tokens[-1]]))
    raise TraceError(
        "reasoning_not_found",
        f"flashtrace.reasoning.text {shown(text)} does not occur in the generated text",
    )


def _from_tags(generated: GeneratedText, *, opened: bool) -> Reasoning:
    full = generated.full
    blocks = _tagged_blocks(full.text, opened=opened)
    if blocks is None:
        return Reasoning([], _answer_from(generated.visible, 0), located=False)
    tokens = sorted({i for start, end, _ in blocks for i in full.within(start, end)})
    begin = _behind_closing(full.text, blocks[-1][2])
    behind = _trimmed(full, full.within(begin, len(full.text)))
    visible = generated.visible
    shown = [i for i in behind if visible.starts[i] < visible.ends[i]]
    return Reasoning([i for i in tokens if i not in generated.special], _trimmed(visible, shown))


def _tagged_blocks(text: str, *, opened: bool) -> list[tuple[int, int, int]] | None:
    """Start, end and end of the closing tag of each ``<think>`` block; None without any tag.

    A block that is not closed reaches to the end. A closing tag without an opening one closes a
    block that began in the prompt.
    """
    tags = list(_TAG.finditer(text))
    if not tags and not opened:
        return None
    start: int | None = 0 if opened or tags[0].group(1) else None
    blocks: list[tuple[int, int, int]] = []
    for tag in tags:
        closing = bool(tag.group(1))
        if closing and start is not None:
            blocks.append((start, tag.start(), tag.end()))
            start = None
        elif not closing and (start is None or not text[start : tag.start()].strip()):
            start = tag.end()  # The model may repeat a tag that the prompt ends with.
    if start is not None:
        blocks.append((start, len(text), len(text)))
    return blocks


def _answer_from(visible: TokenText, start: int) -> list[int]:
    """Visible tokens from a character on, behind the closing markers that stand there."""
    start = _behind_closing(visible.text, start)
    return _trimmed(visible, visible.within(start, len(visible.text)))


def _behind_closing(text: str, start: int) -> int:
    marker = _CLOSING.match(text, start)
    return marker.end() if marker else start


def _trimmed(text: TokenText, tokens: list[int]) -> list[int]:
    """Leaves out blank tokens at both ends."""
    shown = [at for at, i in enumerate(tokens) if text.token(i).strip()]
    return tokens[shown[0] : shown[-1] + 1] if shown else []
