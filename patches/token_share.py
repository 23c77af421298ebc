"""How much of a step's token budget traces may take.

Invariant: in a capped step traces are granted at most the share, and a trace that asks first in a
step is always granted something, so every trace makes progress.
"""

from __future__ import annotations

MIN_CHUNK = 16
"""A chunk is cut no shorter than this (or the share): a step's fixed cost would outweigh it."""


class TokenShare:
    """The share of one scheduler; :meth:`begin_step`, then :meth:`grant` for each trace."""

    def __init__(self, share: float, step_budget: int, *, may_split: bool = True) -> None:
        """Starts uncapped.

        Args:
            share: Part of the step's budget that traces may take, over 0 and at most 1.
            step_budget: Tokens that one step may schedule.
            may_split: Whether a prefill may be cut into chunks. If not, a capped step admits one
                whole trace.
        """
        self._size = max(1, int(share * step_budget))
        self._min_chunk = min(MIN_CHUNK, self._size)
        self._may_split = may_split
        self._left: int | None = None

    @property
    def size(self) -> int:
        """Tokens that traces may take of a capped step."""
        return self._size

    def begin_step(self, *, capped: bool) -> None:
        """Forgets what was granted; without other requests to starve a step needs no cap."""
        self._left = self._size if capped else None

    @property
    def has_room(self) -> bool:
        """Whether :meth:`grant` would grant a trace of any length at least one token."""
        if self._left is None:
            return True
        return self._left >= (self._min_chunk if self._may_split else self._size)

    def grant(self, wanted: int) -> int:
        """Takes up to ``wanted`` tokens out of the share.

        What is granted counts even if the caller cannot use it in the end, so that the cap is never
        exceeded; the next step starts anew.

        Returns:
            Tokens granted; 0 when the rest of the share is not worth a chunk.
        """
        if self._left is None or wanted <= 0:
            return wanted
        granted = wanted
        if self._may_split and wanted > self._left:
            granted = self._left if self._left >= self._min_chunk else 0
        self._left = max(0, self._left - granted)
        return granted
