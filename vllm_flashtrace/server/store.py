"""What keeps deferred attributions for all API servers that share it.

Invariant: whatever keeps them, no entry stays unfinished after its server is gone, and the bounds
hold for all servers together.

All methods block and may be called from any thread.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Any, Protocol

# What a store raises when it cannot be used; one behind a network raises ``ConnectionError``.
STORE_ERRORS = (OSError, sqlite3.Error)


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """Bounds of a store.

    Attributes:
        entries: Most attributions, finished or not.
        nbytes: Most bytes of finished attributions.
        ttl_seconds: How long a finished attribution is kept.
        lease_seconds: When an unfinished one that its server no longer renews has failed.
    """

    entries: int
    nbytes: int
    ttl_seconds: float
    lease_seconds: float = 120.0


class AttributionStore(Protocol):
    """One API server's view of a store; every method may raise one of :data:`STORE_ERRORS`."""

    def reserve(self, attribution_id: str) -> str:
        """Adds a ``queued`` entry and returns its JSON.

        Raises:
            TraceError: ``overloaded``: every entry is unfinished and there is no room.
        """
        ...

    def start(self, attribution_id: str) -> bool:
        """Marks an entry ``running``; False when it was deleted meanwhile."""
        ...

    def finish(self, attribution_id: str, attribution: dict[str, Any]) -> bool:
        """Stores an attribution with its final status; False when its entry was deleted."""
        ...

    def get(self, attribution_id: str) -> str | None:
        """The JSON of an entry's attribution object; None when unknown or over its time."""
        ...

    def delete(self, attribution_id: str) -> bool:
        """Drops an entry; False when unknown or over its time."""
        ...

    def renew(self) -> set[str]:
        """Keeps this server's unfinished entries; returns the ids of all that are still there."""
        ...

    def abandon(self) -> None:
        """Lets this server's unfinished entries fail with ``server_lost``: it stops."""
        ...

    def counts(self) -> dict[str, int]:
        """Number of entries by status, of all servers together."""
        ...

    def close(self) -> None:
        """Lets go of what the view holds; a later call takes it up again."""
        ...
