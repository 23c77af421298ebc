"""The generated text: as the engine sees it, as a client may, and as the server's parsers read it.

All views of the text have one range per generated token, so that a token index means the same in
each. What the parsers found are strings; finding these among the tokens is for the modules that
read :class:`ParsedOutput`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from vllm_flashtrace.base.records import Completion, Span
from vllm_flashtrace.text.normal_forms import find_last, made_from
from vllm_flashtrace.text.offsets import (
    TokenText,
    special_token_ids,
    token_offsets,
    without_ids,
)


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """One generated tool call as the client gets it.

    Attributes:
        name: Name of the function.
        arguments: Its arguments, JSON text.
    """

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ParsedOutput:
    """A completion taken apart.

    Attributes:
        reasoning: The reasoning; None or empty if there is none.
        content: The answer without reasoning and tool calls.
        tool_calls: The tool calls, in the order that the client gets them.
        max_tool_calls: How many of them the client gets; None for all.
        reads_reasoning: Whether a reasoning parser looked, so that no reasoning means none.
        reasoning_from: First character of the text at which the reasoning may begin.
        markers: Token ids that open and close reasoning, if each is a token of its own.
        hides_reasoning: Whether the client gets the answer without the reasoning.
    """

    reasoning: str | None = None
    content: str | None = None
    tool_calls: tuple[ParsedCall, ...] = ()
    max_tool_calls: int | None = None
    reads_reasoning: bool = True
    reasoning_from: int = 0
    markers: tuple[int, int] | None = None
    hides_reasoning: bool = False


class OutputParser(Protocol):
    """The server's reasoning and tool call parsers for one prompt."""

    def __call__(self, text: str, token_ids: Sequence[int], /) -> ParsedOutput:
        """Takes a finished completion apart, given its text and its generated token ids."""


_CONTEXT = 32


@dataclass(frozen=True)
class GeneratedText:
    """Views of the generated tokens.

    Attributes:
        full: Special tokens included, nothing cut off.
        visible: What the server's parsers read; special tokens and cut stop text have empty ranges.
        special: Positions of special tokens.
        hidden: How many tokens at the beginning the client must learn no text of: reasoning that
            its request leaves out of the answer.
        tokenizer: The tokenizer of the tokens.
    """

    full: TokenText
    visible: TokenText
    special: frozenset[int]
    hidden: int = 0
    tokenizer: Any = None

    @cached_property
    def shown(self) -> TokenText:
        """The visible text without that of hidden tokens."""
        return self.visible.without_first(self.hidden)

    def __len__(self) -> int:
        return len(self.full)

    def find_last(self, view: TokenText, text: str) -> Span | None:
        """The last place of a client's text in a view, composed or decomposed alike."""
        return find_last(view.text, text, self.tokenizer)

    @property
    def shown_length(self) -> int:
        """Number of tokens up to the last one the client sees: a final EOS or stop text is cut off.

        Where the client sees nothing at all, only special tokens at the end are left out.
        """
        visible = self.visible
        for i in range(len(self) - 1, -1, -1):
            shown = visible.starts[i] < visible.ends[i] if visible.text else i not in self.special
            if shown:
                return i + 1
        return 0


def decode_generated(tokenizer: Any, completion: Completion) -> GeneratedText:
    """Decodes the generated tokens in the context of the prompt.

    Where the client's text is the beginning of the decoded text, with or without special tokens,
    the visible view ends with it. Where the tokens were made from that text by a tokenizer that
    does not reproduce it, the visible view is the text. Otherwise the visible view is everything
    but the special tokens.
    """
    ids, prompt = completion.generated_token_ids, completion.prompt_token_ids
    full = token_offsets(tokenizer, ids, start_after=prompt)
    special_ids = special_token_ids(tokenizer)
    special = frozenset(i for i, token in enumerate(ids) if token in special_ids)
    plain = token_offsets(
        tokenizer,
        without_ids(ids, special_ids),
        # The engine's detokenizer leaves special tokens out of the context too.
        start_after=without_ids(prompt[-_CONTEXT:], special_ids),
    )
    visible = _with_empty(plain, special, len(full))
    for view in (visible, full):
        if view.text.startswith(completion.text):
            visible = view.cut(len(completion.text))
            return GeneratedText(full, visible, special, tokenizer=tokenizer)
    made = made_from(tokenizer, completion.text, ids)
    if made is not None and made[0].text == completion.text:
        visible = made[0].filled()
    return GeneratedText(full, visible, special, tokenizer=tokenizer)


def _with_empty(plain: TokenText, empty: frozenset[int], length: int) -> TokenText:
    """Puts tokens with empty ranges back at the positions in `empty`."""
    starts: list[int] = []
    ends: list[int] = []
    ranges = iter(zip(plain.starts, plain.ends, strict=True))
    at = 0
    for position in range(length):
        if position in empty:
            starts.append(at)
            ends.append(at)
        else:
            start, at = next(ranges)
            starts.append(start)
            ends.append(at)
    return TokenText(plain.text, starts, ends)
