"""Text that a tokenizer or a client writes in another normal form.

A tokenizer may compose characters (NFC, NFKC), fold case, strip accents or drop blanks before it
makes tokens, so that decoded tokens are not the text they were made from. Where tokenizing a text
again gives exactly the tokens at hand, the tokenizer's own offsets tell which characters each token
was made from.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, takewhile
from typing import Any

from tokenizers import Encoding, Tokenizer

from vllm_flashtrace.base.records import Span
from vllm_flashtrace.text.offsets import (
    TokenText,
    backend_of,
    is_combining,
    special_token_ids,
    token_offsets,
)

_BORDER = "\ud800"  # A lone surrogate: no text of a client or a tokenizer has one.
_MAX_IN_FRONT = 4  # Tokens that a tokenizer adds in front of a text; usual are 0 to 2.


def made_from(tokenizer: Any, text: str, token_ids: Sequence[int]) -> tuple[TokenText, int] | None:
    """Lays tokens over the text that they were made from.

    Args:
        tokenizer: A Hugging Face tokenizer.
        text: The text.
        token_ids: Its tokens. Special tokens may be in front and behind, and either end may have
            been cut off.

    Returns:
        The tokens over what of the text they were made from, and what to add to a position in
        ``text`` to get one in there; None where tokenizing does not give these tokens. Characters
        that the tokenizer drops or merges into others lie in no token's range, which
        :meth:`TokenText.covering` makes up for.
    """
    plain = _plain_tokenizer(tokenizer)
    if plain is None:
        return None
    own_ids, ranges = plain.encode(text)
    place = _placed(own_ids, token_ids, special_token_ids(tokenizer))
    if place is None:
        return None
    front, first, last = place
    begin, end = 0, len(text)
    if first > 0:
        # The tokens cut off may have dropped blanks behind them, or share a character.
        begin = min(ranges[first - 1][1], ranges[first][0])
    if last < len(own_ids):
        end = ranges[last - 1][1]
    inside = [(start - begin, stop - begin) for start, stop in ranges[first:last]]
    behind = len(token_ids) - front - len(inside)
    at_end = end - begin, end - begin
    return _token_text(text[begin:end], [*[(0, 0)] * front, *inside, *[at_end] * behind]), -begin


def _token_text(text: str, ranges: Sequence[Span]) -> TokenText:
    starts = accumulate((start for start, _ in ranges), max)
    return TokenText(text, list(starts), list(accumulate((end for _, end in ranges), max)))


def _placed(
    own: Sequence[int], token_ids: Sequence[int], special: frozenset[int]
) -> tuple[int, int, int] | None:
    """Where a text's tokens lie among others: number in front, first and end of the text's own."""
    own, token_ids = list(own), list(token_ids)
    leading = sum(1 for _ in takewhile(special.__contains__, token_ids[:_MAX_IN_FRONT]))
    places: list[tuple[int, int, int]] = []
    for front in range(leading + 1):
        behind = token_ids[front + len(own) :]
        if token_ids[front : front + len(own)] == own and special.issuperset(behind):
            return front, 0, len(own)
    for front in range(leading + 1):
        kept = len(token_ids) - front
        if 0 < kept < len(own):
            if token_ids[front:] == own[-kept:]:
                places.append((front, len(own) - kept, len(own)))
            if token_ids[front:] == own[:kept]:
                places.append((front, 0, kept))
    return places[0] if len(places) == 1 else None


@dataclass(frozen=True, slots=True)
class _PlainTokenizer:
    """A tokenizer that adds, cuts off and trims nothing.

    Attributes:
        tokenizer: Shares the vocabulary with the one it was made of.
        renumbered: Its own ids of added tokens that have another id there.
        added: Texts of added tokens by id, without the blanks around them.
    """

    tokenizer: Tokenizer
    renumbered: Mapping[int, int]
    added: Mapping[int, str]

    def encode(self, text: str) -> tuple[list[int], list[Span]]:
        """Token ids of a text and the range of characters that each was made from."""
        # Unlike `encode`, `encode_batch` lets other threads run.
        (encoding,) = self.tokenizer.encode_batch([text], add_special_tokens=False)
        ids = [self.renumbered.get(i, i) for i in encoding.ids]
        return ids, self._ranges(text, ids, encoding)

    def _ranges(self, text: str, ids: Sequence[int], encoding: Encoding) -> list[Span]:
        ranges: list[Span] = encoding.offsets
        for index, token in enumerate(ids):
            if bare := self.added.get(token):
                # Added tokens may swallow the blanks around them, which are not theirs.
                start, end = ranges[index]
                at = text.find(bare, start, end)
                if at >= 0:
                    ranges[index] = (at, at + len(bare))
        return ranges


def _plain_tokenizer(tokenizer: Any) -> _PlainTokenizer | None:
    backend = backend_of(tokenizer)
    return backend if backend is None else _plain(backend, backend.encode_special_tokens)


@lru_cache(maxsize=4)
def _plain(backend: Tokenizer, encode_special_tokens: bool) -> _PlainTokenizer:
    # The engine's own object may be set to truncate at any time, and its post-processor may trim
    # offsets. Everything but the added tokens is shared with it.
    plain = Tokenizer(backend.model)
    if backend.normalizer is not None:
        plain.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        plain.pre_tokenizer = backend.pre_tokenizer
    added = backend.get_added_tokens_decoder()
    plain.add_tokens([added[i] for i in sorted(added)])
    plain.encode_special_tokens = encode_special_tokens
    own_ids = {i: plain.token_to_id(token.content) for i, token in added.items()}
    renumbered = {own: i for i, own in own_ids.items() if own is not None and own != i}
    texts = {i: token.content.strip() for i, token in added.items()}
    return _PlainTokenizer(plain, renumbered, texts)


def as_written(tokenizer: Any, text: str) -> tuple[str, list[Span]] | None:
    """What a text becomes when it is tokenized and decoded.

    Returns:
        The decoded text and, for each of its characters, the characters of ``text`` that it stands
        for; None where the tokenizer cannot tell or does not know a character.
    """
    plain = _plain_tokenizer(tokenizer)
    if plain is None:
        return None
    ids, ranges = plain.encode(text)
    if _unknown_ids(tokenizer, plain.tokenizer).intersection(ids):
        return None
    decoded = token_offsets(tokenizer, ids)
    origins: dict[int, Span] = {}
    for token, (start, end) in _token_text(text, ranges).covering(0, len(text)):
        first, last = decoded.starts[token], decoded.ends[token]
        same = decoded.text[first:last] == text[start:end]
        for i in range(first, last):
            own = (start + i - first, start + i - first + 1) if same else (start, end)
            known = origins.get(i, own)
            origins[i] = min(known[0], own[0]), max(known[1], own[1])
    # A blank that the decoder puts in front stands for nothing.
    spans: list[Span] = []
    for i in range(len(decoded.text)):
        behind = spans[-1][1] if spans else 0
        spans.append(origins.get(i, (behind, behind)))
    return decoded.text, spans


def _unknown_ids(tokenizer: Any, plain: Tokenizer) -> set[int]:
    written = getattr(plain.model, "unk_token", None)
    ids = {
        getattr(tokenizer, "unk_token_id", None),
        plain.token_to_id(written) if written else None,
    }
    return {i for i in ids if i is not None}


def find_last(text: str, wanted: str, tokenizer: Any = None) -> Span | None:
    """The last place of a text in another, in the same normal form.

    The text as it stands comes first, then any that is canonically equivalent to it (composed or
    decomposed), then what the tokenizer makes of it.

    Args:
        text: Text to search.
        wanted: Text to find; not empty.
        tokenizer: The tokenizer that wrote ``text``.
    """
    at = last_at(text, wanted)
    if at >= 0:
        return at, at + len(wanted)
    if not (text.isascii() or unicodedata.is_normalized("NFC", text + wanted)):
        found = _find_last_equivalent(text, wanted)
        if found is not None:
            return found
    written = None if tokenizer is None else as_written(tokenizer, wanted)
    if written is None or not written[0].strip() or (at := last_at(text, written[0])) < 0:
        return None
    return at, at + len(written[0])


def last_at(text: str, wanted: str) -> int:
    """``text.rfind(wanted)``, linear for every text as `str.find` is and `str.rfind` is not."""
    at = text[::-1].find(wanted[::-1])
    return at if at < 0 else len(text) - at - len(wanted)


def _find_last_equivalent(text: str, wanted: str) -> Span | None:
    """The last canonically equivalent place that no combining character extends."""
    clusters, wanted_clusters = _clusters(text), _clusters(wanted)
    decomposed = _decomposed(text, clusters)
    at = last_at(decomposed, _decomposed(wanted, wanted_clusters))
    if at < 0:
        return None
    first = decomposed.count(_BORDER, 0, at)
    return clusters[first][0], clusters[first + len(wanted_clusters) - 1][1]


def _clusters(text: str) -> list[Span]:
    """Characters with the combining ones behind them: what (de)composition does not cross."""
    starts = [i for i, character in enumerate(text) if i == 0 or not is_combining(character)]
    return list(zip(starts, [*starts[1:], len(text)], strict=True))


def _decomposed(text: str, clusters: Sequence[Span]) -> str:
    """The text in form NFD with a border around each cluster."""
    pieces = (unicodedata.normalize("NFD", text[slice(*span)]) for span in clusters)
    return _BORDER + "".join(piece + _BORDER for piece in pieces)
