"""Where each token lies in the decoded text.

The text of a sequence is the concatenation of what its tokens add to it, token ranges never move
backwards, and the work is linear in the number of tokens whatever bytes they hold.

Tokens are decoded in a short sliding window, so that a tokenizer that treats the start of a text
specially (a stripped leading space) is asked about the middle of one. ``DecodeStream`` of the
``tokenizers`` library does the same, but grows quadratically on runs of invalid bytes, may fail on
them, and never emits the last ones; clients may send such tokens.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, takewhile
from typing import Any
from unicodedata import category

from vllm_flashtrace.base.records import Span

_REPLACEMENT = "\ufffd"
_MAX_PENDING = 8
_MAX_WINDOW = 32
_CONTEXT_TOKENS = 6

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True)
class TokenText:
    """A decoded token sequence.

    Attributes:
        text: The decoded text.
        starts: First character of each token.
        ends: One past the last character of each token. A token that adds no text has an empty
            range; tokens that share a character (pieces of one UTF-8 sequence) overlap in it.
    """

    text: str
    starts: list[int]
    ends: list[int]

    def __len__(self) -> int:
        return len(self.starts)

    def token(self, index: int) -> str:
        """Text of one token; for a piece of a character, that character."""
        return self.text[self.starts[index] : self.ends[index]]

    def tokens(self) -> list[str]:
        """Text of every token."""
        return [self.text[s:e] for s, e in zip(self.starts, self.ends, strict=True)]

    def pieces(self) -> list[str]:
        """Text of every token such that the texts join to the whole.

        A character that several tokens share goes to the first of them.
        """
        texts: list[str] = []
        known = 0
        for start, end in zip(self.starts, self.ends, strict=True):
            texts.append(self.text[max(start, known) : end])
            known = max(known, end)
        return texts

    def overlapping(self, start: int, end: int) -> list[int]:
        """Tokens that hold at least one character of ``[start, end)``, ascending."""
        if start >= end:
            return []
        first = bisect_right(self.ends, start)
        last = bisect_left(self.starts, end)
        return [i for i in range(first, last) if self.starts[i] < self.ends[i]]

    def within(self, start: int, end: int) -> list[int]:
        """Tokens of ``[start, end)``; one that straddles an edge counts if it is not blank inside.

        A token of ``>`` and a line break at the end of a tag thereby stays with the tag.
        """
        return [
            i
            for i in self.overlapping(start, end)
            if (self.starts[i] >= start and self.ends[i] <= end)
            or self.text[max(start, self.starts[i]) : min(end, self.ends[i])].strip()
        ]

    def covering(self, start: int, end: int) -> list[tuple[int, Span]]:
        """Tokens of ``[start, end)``, each with its characters in there, so that none is left over.

        Of characters that lie in no token's range, combining ones go to the token before them,
        which they were composed with, and others to the token behind them.
        """
        found: list[tuple[int, Span]] = []
        known = start
        for token in self.overlapping(start, end):
            first, last = max(start, self.starts[token]), min(end, self.ends[token])
            if first > known:
                gap = self.text[known:first] if found else ""
                merged = sum(1 for _ in takewhile(is_combining, gap))
                _extend(found, known, known + merged)
                first = known + merged
            found.append((token, (first, last)))
            known = max(known, last)
        _extend(found, known, end)
        return found

    def filled(self) -> TokenText:
        """The same tokens with ranges that leave no character over, as :meth:`covering` does."""
        starts, ends = [*self.starts], [*self.ends]
        for token, (start, end) in self.covering(0, len(self.text)):
            starts[token], ends[token] = start, end
        return TokenText(self.text, list(accumulate(starts, max)), list(accumulate(ends, max)))

    def cut(self, length: int) -> TokenText:
        """The same tokens over the first ``length`` characters; later ones become empty."""
        return TokenText(
            self.text[:length],
            [min(s, length) for s in self.starts],
            [min(e, length) for e in self.ends],
        )

    def without_first(self, count: int) -> TokenText:
        """The same tokens over the text behind the first `count`, which become empty."""
        cut = self.ends[count - 1] if count else 0
        return TokenText(
            self.text[cut:],
            [max(s - cut, 0) for s in self.starts],
            [max(e - cut, 0) for e in self.ends],
        )


def is_combining(character: str) -> bool:
    """Whether a character is a mark, or a vowel or final consonant of a Hangul syllable."""
    return category(character).startswith("M") or "\u1160" <= character <= "\u11ff"


def _extend(found: list[tuple[int, Span]], known: int, end: int) -> None:
    """Lets the last tokens, which end at `known`, reach to `end`."""
    for at in range(len(found) - 1, -1, -1):
        token, (start, last) = found[at]
        if last != known or end <= known:
            return
        found[at] = token, (start, end)


def token_offsets(
    tokenizer: Any, token_ids: Sequence[int], *, start_after: Sequence[int] = ()
) -> TokenText:
    """Decodes tokens, special ones included, with a character range for each.

    Args:
        tokenizer: A Hugging Face tokenizer, or anything with
            ``decode(ids, skip_special_tokens=False)``.
        token_ids: Tokens to decode.
        start_after: Tokens in front of them; they give context and add no text.

    Returns:
        One range per token. Bytes that are not valid UTF-8 become U+FFFD.
    """
    context = list(start_after[-_CONTEXT_TOKENS:])
    decode = _decoder(tokenizer)
    starts: list[int] = []
    ends: list[int] = []
    pieces: list[str] = []
    position = 0
    for piece, ranges in _pieces(decode, context, token_ids):
        starts += [position + start for start, _ in ranges]
        ends += [position + end for _, end in ranges]
        pieces.append(piece)
        position += len(piece)
    return TokenText("".join(pieces), starts, ends)


def special_token_ids(tokenizer: Any) -> frozenset[int]:
    """Ids that ``skip_special_tokens`` leaves out of decoded text."""
    backend = backend_of(tokenizer)
    if backend is not None:
        added = backend.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if token.special)
    return frozenset(getattr(tokenizer, "all_special_ids", ()))


def without_ids(token_ids: Sequence[int], left_out: Collection[int]) -> list[int]:
    """``token_ids`` less every occurrence of ``left_out``."""
    return [i for i in token_ids if i not in left_out]


def backend_of(tokenizer: Any) -> Any | None:
    """The ``tokenizers.Tokenizer`` under a fast tokenizer."""
    backend = getattr(tokenizer, "_tokenizer", None)
    return backend if hasattr(backend, "get_added_tokens_decoder") else None


def _decoder(tokenizer: Any) -> Decode:
    # The backend, not the wrapper: the wrapper may "clean up" spaces, and the engine's own
    # detokenizer does not.
    source = backend_of(tokenizer) or tokenizer
    return lambda ids: source.decode(list(ids), skip_special_tokens=False)


def _pieces(
    decode: Decode, context: list[int], token_ids: Sequence[int]
) -> Iterator[tuple[str, list[Span]]]:
    """Yields each completed piece of text with the ranges, inside it, of its tokens."""
    # Where the context begins inside a character, a decoder may spoil all bytes that follow.
    while context and decode(context).endswith(_REPLACEMENT):
        context = context[1:]
    ids = [*context, *token_ids]
    prefix, read = 0, len(context)
    known = decode(context) if context else ""
    clean = [0]
    for i in range(read, len(ids)):
        piece = _added(decode, ids, prefix, read, i + 1, known)
        incomplete = piece.endswith(_REPLACEMENT)
        if incomplete and i + 1 < len(ids):
            clean.append(max(clean[-1], len(piece.rstrip(_REPLACEMENT))))
            if i + 1 - read < _MAX_PENDING:
                continue
            # A run of invalid bytes: give up on all but the three tokens that may still begin
            # a character.
            cut = i - 2
            piece = _added(decode, ids, prefix, read, cut, known)
            yield piece, [(0, len(piece))] * (cut - read)
            prefix = read = cut
            known, clean = "", [0] * 4
            continue
        yield piece, _ranges(clean, len(piece))
        if piece or i + 1 - prefix > _MAX_WINDOW:
            prefix = read
            known = decode(ids[prefix : i + 1])
        read = i + 1
        clean = [0]


def _added(decode: Decode, ids: list[int], prefix: int, read: int, end: int, known: str) -> str:
    """The text that ``ids[read:end]`` add after ``known``, the text of ``ids[prefix:read]``."""
    window = decode(ids[prefix:end])
    if window.startswith(known):
        return window[len(known) :]
    return decode(ids[read:end])


def _ranges(clean: list[int], length: int) -> list[Span]:
    """Ranges of a piece's tokens, from the complete characters known after each but the last."""
    ranges = [(before, min(after + 1, length)) for before, after in pairwise(clean)]
    return [*ranges, (clean[-1], length)]
