"""How much of what a trace looks up it finds in the prefix cache, and whether it should have.

Invariant: a lookup counts as missed only if the engine that was asked must have computed those
very tokens before: for the completion that is explained, or for an earlier hop of the same trace.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from vllm_flashtrace.base.logs import logger

WARN_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class CacheLookup:
    """One trace request's lookup, in tokens.

    Attributes:
        queries: Tokens that may come from the cache: those before the first target.
        hits: Tokens that did.
        left: Tokens that must have been left there.
    """

    queries: int
    hits: int
    left: int

    @property
    def missed(self) -> bool:
        """Whether less was found than must have been left: evicted, or on another engine."""
        return self.hits < self.left


def cache_lookup(
    first_target: int, hits: int | None, cache_config: Any, computed_before: bool
) -> CacheLookup:
    """The lookup of a trace request.

    Args:
        first_target: Its first target position, where its lookup ends.
        hits: ``RequestOutput.num_cached_tokens``.
        cache_config: vLLM's ``CacheConfig``.
        computed_before: Whether the engine has computed everything before the first target.
    """
    enabled = bool(cache_config.enable_prefix_caching)
    # The cache holds whole blocks only.
    block = cache_config.block_size
    left = first_target // block * block if enabled and computed_before and block else 0
    return CacheLookup(first_target if enabled else 0, hits or 0, left)


class CacheUse:
    """Sums over the trace requests of one API server.

    Attributes:
        queries: Tokens looked up.
        hits: Tokens found.
        misses: Trace requests that found less than must have been left.
    """

    def __init__(self) -> None:
        self.queries = 0
        self.hits = 0
        self.misses = 0
        self._warn_after = float("-inf")

    def add(self, lookup: CacheLookup) -> None:
        """Takes one lookup; a miss is logged, at most once in :data:`WARN_SECONDS`."""
        self.queries += lookup.queries
        self.hits += lookup.hits
        if not lookup.missed:
            return
        self.misses += 1
        now = time.monotonic()
        if now >= self._warn_after:
            self._warn_after = now + WARN_SECONDS
            logger.warning(
                "A trace found %d of %d tokens in the prefix cache that were computed before it: "
                "they were evicted, or computed by another engine (%d such traces so far; "
                "logged at most every %d s)",
                lookup.hits,
                lookup.left,
                self.misses,
                WARN_SECONDS,
            )

    def to_status(self) -> dict[str, int]:
        """For the status report."""
        return {"queries": self.queries, "hits": self.hits, "misses": self.misses}
