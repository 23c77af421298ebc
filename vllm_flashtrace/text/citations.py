"""Which sources the parts of an answer are cited with.

A part is cited with the sources that most of its information came from, as far as it came from
sources at all: :func:`cited` has the rule, and the documentation the evidence for it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from vllm_flashtrace.text.sources import PromptSource

BEST_TOKENS = 8
"""A source's evidence is the mean score of its best tokens, this many."""
LEAST_OF_BEST = 0.5
"""A source is cited if its evidence is at least this part of the best one's ..."""
LEAST_EVIDENCE = 0.006
"""... and this large: its best tokens hold about 5 % of all that went into the target."""


def evidence(source: PromptSource, scores: Sequence[float]) -> float:
    """How much a source was used: the mean score of its best tokens.

    Args:
        source: The source.
        scores: Score of each prompt token.
    """
    if not source.tokens:
        return 0.0
    best = sorted((scores[token] for token, _, _ in source.tokens), reverse=True)[:BEST_TOKENS]
    return sum(best) / len(best)


def cited(sources: Sequence[PromptSource], scores: Sequence[float]) -> list[int]:
    """Numbers of the sources that a part of the answer is cited with, the best first.

    Args:
        sources: The sources.
        scores: Score of each prompt token for this part.
    """
    known = [evidence(source, scores) for source in sources]
    least = max(LEAST_OF_BEST * max(known, default=0.0), LEAST_EVIDENCE)
    numbers = [i for i, each in enumerate(known) if each >= least]
    return sorted(numbers, key=lambda i: (-known[i], i))


def cited_source(
    sources: Sequence[PromptSource], number: int, entry: dict[str, Any]
) -> dict[str, Any]:
    """A source as a citation names it, with its best sentence as the cited text.

    Args:
        sources: The sources.
        number: Number of the source.
        entry: Its entry among the target's ``sources``.
    """
    source = sources[number].source
    sentence = max(entry["sentences"], key=lambda each: each["mean"])
    start = sentence["start"] - source.span[0]
    end = sentence["end"] - source.span[0]
    named = {key: getattr(source, key) for key in ("id", "kind", "title", "url")}
    is_result = source.kind == "search_result"
    alike = sum((each.source.kind == "search_result") == is_result for each in sources[:number])
    first = bisect_right(source.blocks, start) - 1
    return {
        "index": number,
        **{key: value for key, value in named.items() if value is not None},
        "number": alike,
        "score": entry["score"],
        "start": start,
        "end": end,
        "text": sentence["text"],
        **({"blocks": [first, bisect_right(source.blocks, end - 1)]} if is_result else {}),
    }
