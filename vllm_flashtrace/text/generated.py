"""The generated tokens' text: as the engine sees it, as a client may, and what this one may learn.

Invariant: all views have one range per generated token, so a token index means the same in each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vllm_flashtrace.base.records import Completion
from vllm_flashtrace.text.offsets import (
    TokenText,
    special_token_ids,
    token_offsets,
    without_ids,
)

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
    """

    full: TokenText
    visible: TokenText
    special: frozenset[int]
    hidden: int = 0

    @cached_property
    def shown(self) -> TokenText:
        """The visible text without that of hidden tokens."""
        return self.visible.without_first(self.hidden)

    def __len__(self) -> int:
        return len(self.full)

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
    the visible view ends with it. Otherwise (a tokenizer that does not reproduce its input) the
    visible view is everything but the special tokens.
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
            return GeneratedText(full, view.cut(len(completion.text)), special)
    return GeneratedText(full, visible, special)


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
