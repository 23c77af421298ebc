"""Keeps the blocks that a trace reads at its end, where layers have a sliding window or chunks.

What it changes: ``SlidingWindowManager`` frees a request's blocks behind its window, and
``ChunkedLocalAttentionManager`` those in front of its chunk. For a trace
``remove_skipped_blocks`` frees none that a target row sees: it is told that no more tokens are
computed than lie in front of the first target. ``get_num_blocks_to_allocate`` then reserves a
trace's blocks without the cap that counts on their being freed. ``KVCacheManager.allocate_slots``
notes which requests are traces, and ``free`` and ``pop_blocks_for_free`` forget them. Requests
without a sealed trace spec are treated as ever, and so are traces for which the whole cache is too
small; see ``worker.cache_groups.keeps_blocks``.

Why here: the values that a step's rows see are read when the last step is over. vLLM keeps or frees
by the kind of layer alone; no request field sets it.

Tested on: vLLM 0.32.0.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.single_type_kv_cache_manager import (
    ChunkedLocalAttentionManager,
    SlidingWindowManager,
)

from vllm_flashtrace.base.logs import log_unexpected
from vllm_flashtrace.patches._check import require_keyword, require_parameters
from vllm_flashtrace.patches.prefix_cache import spec_of
from vllm_flashtrace.trace.wire import TraceSpec
from vllm_flashtrace.worker.cache_groups import keeps_blocks

_FREEING = (ChunkedLocalAttentionManager, SlidingWindowManager)
_COUNT = "get_num_blocks_to_allocate"

# First target position of the traces that hold blocks, by request id; ids are unique.
_traces: dict[str, int] = {}


def check() -> None:
    """Raises PatchError unless the methods have the expected parameters."""
    for kind, name, parameters in (
        (KVCacheManager, "allocate_slots", ("self", "request")),
        (KVCacheManager, "free", ("self", "request")),
        (KVCacheManager, "pop_blocks_for_free", ("self", "request")),
        *(
            (kind, name, ("self", "request_id", *more))
            for kind in _FREEING
            for name, more in (
                ("remove_skipped_blocks", ("processed_computed_tokens",)),
                (_COUNT, ()),
            )
        ),
    ):
        require_parameters(getattr(kind, name, None), f"{kind.__name__}.{name}", *parameters)
    for kind in _FREEING:
        require_keyword(getattr(kind, _COUNT), _COUNT, "apply_admission_cap")


def apply() -> None:
    """Wraps the methods."""
    stock_allocate = KVCacheManager.allocate_slots

    @functools.wraps(stock_allocate)
    def allocate_slots(self: KVCacheManager, request: Any, *args: Any, **kwargs: Any) -> Any:
        params = request.sampling_params
        if params is not None and params.extra_args and request.request_id not in _traces:
            _note(self, request)
        return stock_allocate(self, request, *args, **kwargs)

    KVCacheManager.allocate_slots = allocate_slots
    KVCacheManager.free = _forgetting(KVCacheManager.free)
    KVCacheManager.pop_blocks_for_free = _forgetting(KVCacheManager.pop_blocks_for_free)
    for kind in _FREEING:
        kind.remove_skipped_blocks = _keeping(kind.remove_skipped_blocks)
        kind.get_num_blocks_to_allocate = _counting(kind.get_num_blocks_to_allocate)


def _keeping(stock: Any) -> Any:
    @functools.wraps(stock)
    def remove_skipped_blocks(
        self: Any, request_id: str, processed_computed_tokens: int, *args: Any, **kwargs: Any
    ) -> None:
        target = _traces.get(request_id, processed_computed_tokens)
        stock(self, request_id, min(target, processed_computed_tokens), *args, **kwargs)

    return remove_skipped_blocks


def _counting(stock: Any) -> Any:
    @functools.wraps(stock)
    def get_num_blocks_to_allocate(self: Any, request_id: str, *args: Any, **kwargs: Any) -> int:
        if request_id in _traces:
            kwargs["apply_admission_cap"] = False
        blocks: int = stock(self, request_id, *args, **kwargs)
        return blocks

    return get_num_blocks_to_allocate


def _forgetting(stock: Any) -> Any:
    @functools.wraps(stock)
    def free(self: KVCacheManager, request: Any) -> Any:
        _traces.pop(request.request_id, None)
        return stock(self, request)

    return free


def _note(manager: KVCacheManager, request: Any) -> None:
    try:
        spec = spec_of(request)
        fits = keeps_blocks(manager.kv_cache_config, request.num_prompt_tokens)
        if isinstance(spec, TraceSpec) and fits:
            _traces[request.request_id] = spec.first_target
    except Exception as error:
        log_unexpected("keeping the blocks of a trace", error)
