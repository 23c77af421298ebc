"""Finding texts in a longer one when only their order is known.

Invariant: a position is given only if no other arrangement of the same texts, in order and without
overlap, puts that text anywhere else.
"""

from __future__ import annotations

from collections.abc import Sequence


def forced_positions(text: str, wanted: Sequence[str]) -> list[int | None]:
    """Finds texts that occur in order.

    The earliest arrangement puts every text as far left as the ones before it allow, the latest as
    far right as the ones after it allow; where they agree, there is no choice. Where no arrangement
    exists, the order is no evidence, and only texts that occur once and are wanted once are placed.

    Args:
        text: Text to search.
        wanted: Non-empty texts, in order.

    Returns:
        For each wanted text the position of its first character, or None.
    """
    earliest = _earliest(text, wanted)
    if earliest is not None:
        mirrored = _earliest(text[::-1], [item[::-1] for item in reversed(wanted)]) or []
        latest = [
            len(text) - at - len(item) for at, item in zip(reversed(mirrored), wanted, strict=True)
        ]
        return [a if a == b else None for a, b in zip(earliest, latest, strict=True)]
    return [
        text.find(item)
        if 0 <= text.find(item) == text.rfind(item) and sum(item in other for other in wanted) == 1
        else None
        for item in wanted
    ]


def _earliest(text: str, wanted: Sequence[str]) -> list[int] | None:
    """Leftmost arrangement, or None if there is none."""
    positions: list[int] = []
    cursor = 0
    for item in wanted:
        at = text.find(item, cursor)
        if at < 0:
            return None
        positions.append(at)
        cursor = at + len(item)
    return positions
