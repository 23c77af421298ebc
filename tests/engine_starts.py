"""Which engines the suite starts, and what forces each start; the summary of a run lists them.

An engine in a process of its own takes 15 to 30 s of processor time to start, so they are shared
where a test does not need another configuration. Whoever starts one says why.
"""

from __future__ import annotations

STARTED: list[str] = []


def note(reason: str) -> None:
    """Counts a start; ``reason`` says what no engine that is there already has."""
    STARTED.append(reason)
