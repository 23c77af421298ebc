"""Which generated tokens are reasoning.

Invariant: reasoning tokens are found by the first rule that applies (an explicit option, the
server's reasoning parser, ``<think>`` tags), and markers around reasoning are neither reasoning nor
answer. Where no rule applies, everything generated before the target is reasoning; that is for the
caller to fill in, who knows the target.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_flashtrace.api.schema_options import TextTarget, TokensTarget
from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.text.generated import GeneratedText
from vllm_flashtrace.text.offsets import TokenText
from vllm_flashtrace.text.parsed_reasoning import ReasoningBlock

_TAG = re.compile(r"<(/?)think>")
_CLOSING = re.compile(
    r"\s*(?:</(?:\w+:)?(?:think|thinking|thought|thoughts|reasoning)>|\[/THINK\]"
    r"|<\|END_THINKING\|>|◁/think▷|<channel\|>)"
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
    found = _found(option, generated, prompt_text, parsed)
    # A blank token that is hidden must not be told from another by where the answer begins.
    answer = [i for i in found.answer if i >= generated.hidden]
    return Reasoning(found.tokens, answer, found.located)


def _found(
    option: str | TextTarget | TokensTarget,
    generated: GeneratedText,
    prompt_text: str,
    parsed: Sequence[ReasoningBlock] | None,
) -> Reasoning:
    visible = generated.visible
    if isinstance(option, TokensTarget):
        tokens = _explicit_tokens(option, len(generated))
        return Reasoning(tokens, _answer_from(visible, visible.ends[tokens[-1]]))
    if isinstance(option, TextTarget):
        return _explicit_text(option.text, generated)
    if option == "none":
        return Reasoning([], _answer_from(visible, 0))
    if parsed is not None:
        tokens = sorted({i for block in parsed for i in block.tokens})
        last = max((block.end for block in parsed), default=0)
        return Reasoning(tokens, _answer_from(visible, last))
    return _from_tags(generated, opened=prompt_text.rstrip().endswith("<think>"))


def _explicit_tokens(option: TokensTarget, length: int) -> list[int]:
    last = max(end for _, end in option.tokens)
    if last > length:
        raise TraceError(
            "span_out_of_range",
            f"flashtrace.reasoning.tokens reaches token {last}, but {length} were generated",
        )
    return sorted({i for start, end in option.tokens for i in range(start, end)})


def _explicit_text(text: str, generated: GeneratedText) -> Reasoning:
    views = (generated.shown,) if generated.hidden else (generated.visible, generated.full)
    for view in views:
        start = view.text.rfind(text)
        if start >= 0:
            tokens = view.overlapping(start, start + len(text))
            visible = generated.visible
            return Reasoning(tokens, _answer_from(visible, visible.ends[tokens[-1]]))
    raise TraceError(
        "reasoning_not_found",
        f"flashtrace.reasoning.text {text[:80]!r} does not occur in the generated text",
    )


def _from_tags(generated: GeneratedText, *, opened: bool) -> Reasoning:
    full = generated.full
    blocks = _tagged_blocks(full.text, opened=opened)
    if blocks is None:
        return Reasoning([], _answer_from(generated.visible, 0), located=False)
    tokens = sorted({i for start, end, _ in blocks for i in full.within(start, end)})
    behind = _trimmed(full, full.within(blocks[-1][2], len(full.text)))
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
    """Visible tokens from a character on, behind a closing marker if there is one."""
    marker = _CLOSING.match(visible.text, start)
    start = marker.end() if marker else start
    return _trimmed(visible, visible.within(start, len(visible.text)))


def _trimmed(text: TokenText, tokens: list[int]) -> list[int]:
    """Leaves out blank tokens at both ends."""
    shown = [at for at, i in enumerate(tokens) if text.token(i).strip()]
    return tokens[shown[0] : shown[-1] + 1] if shown else []
