"""Keeps a request of ours from skipping the rows that it is for.

What it changes: for a request with a sealed spec, ``KVCacheManager.get_computed_blocks`` looks for
cached blocks up to the first position that has to be computed instead of ``num_tokens - 1``: the
first target of a trace, or the position before the first token that is scored. For other requests
nothing changes.

Why here: rows whose KV is cached are not computed, and these must be. The limit is computed
inside ``get_computed_blocks``, and no request field sets it.

Tested on: vLLM 0.32.0.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheManager

from vllm_flashtrace.patches._check import require_parameters
from vllm_flashtrace.trace.wire import Spec, verified_spec

_KNOWN = "_flashtrace_spec"


class _CappedRequest:
    """A view of a request that reports fewer tokens; everything else is the request's own."""

    def __init__(self, request: Any, num_tokens: int) -> None:
        self._request = request
        self.num_tokens = num_tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


def check() -> None:
    """Raises PatchError unless ``get_computed_blocks`` takes one request."""
    require_parameters(
        getattr(KVCacheManager, "get_computed_blocks", None),
        "KVCacheManager.get_computed_blocks",
        *("self", "request"),
    )


def apply() -> None:
    """Wraps ``get_computed_blocks``."""
    stock = KVCacheManager.get_computed_blocks

    @functools.wraps(stock)
    def get_computed_blocks(self: KVCacheManager, request: Any) -> Any:
        params = request.sampling_params
        if params is None or not params.extra_args:
            return stock(self, request)
        spec = spec_of(request)
        if spec is None:
            return stock(self, request)
        # Stock code looks up at most ``num_tokens - 1`` tokens.
        return stock(self, _CappedRequest(request, min(spec.first_row + 1, request.num_tokens)))

    KVCacheManager.get_computed_blocks = get_computed_blocks


def spec_of(request: Any) -> Spec | None:
    """The spec of a request; None where it has none, or one that was not made here.

    A request that waits is looked up at every attempt to schedule it, its spec verified once.
    """
    if not hasattr(request, _KNOWN):
        setattr(request, _KNOWN, verified_spec(request.sampling_params.extra_args))
    found: Spec | None = getattr(request, _KNOWN)
    return found
