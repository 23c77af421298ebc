"""Which store an API server keeps its deferred attributions in.

Invariant: every API server has a name of its own in the store it shares.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

from vllm_flashtrace.server.sqlite_store import SqliteStore
from vllm_flashtrace.server.store import AttributionStore, StoreLimits
from vllm_flashtrace.server.store_folder import ensure_store_folder
from vllm_flashtrace.trace.config import FlashTraceConfig

# Makes a store from this server's name and the bounds.
StoreMaker = Callable[[str, StoreLimits], AttributionStore]


def make_store(config: FlashTraceConfig, maker: StoreMaker | None = None) -> AttributionStore:
    """The store of one API server process.

    Args:
        config: Has the bounds.
        maker: Makes a store that reaches further than this launcher's own, which is the default.
    """
    limits = StoreLimits(
        entries=config.max_stored_attributions,
        nbytes=config.max_stored_mib << 20,
        ttl_seconds=config.stored_ttl_seconds,
    )
    owner = secrets.token_hex(8)
    if maker is not None:
        return maker(owner, limits)
    return SqliteStore(ensure_store_folder(), owner, limits)
