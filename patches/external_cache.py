"""Keeps a request of ours from loading the rows that it is for, and from being offloaded.

What it changes: a KV connector (``--kv-transfer-config``) may have more of a request's tokens than
the prefix cache, and what is loaded is not computed. ``KVConnectorFactory.create_connector`` gives
the scheduler a connector whose ``get_num_new_matched_tokens`` offers a request with a sealed spec
what would be loaded while it waits, if that ends in front of the first position that has to be
computed (see ``prefix_cache``); else nothing, and the request computes what it lacks. What would be
loaded within a step that computes the request is not offered: where such a load fails, rows have
been recorded. vLLM's ``OffloadingConnectorScheduler`` is told where to end by the argument that
``get_num_new_matched_tokens`` has for it, so that it offers what lies in front; ``on_new_request``
sets that nothing of the request is stored, since nobody else has its tokens, or they are there. For
other requests nothing changes.

Why here: a connector is asked for as many tokens as it has, and no request field sets where to end.
Every connector must cope with a request that takes nothing of what it has offered, but not with
one that takes a part.

Tested on: vLLM 0.32.0.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorBase_V1, KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
    OffloadingConnectorScheduler,
    RequestOffloadState,
)

from vllm_flashtrace.base.logs import log_unexpected
from vllm_flashtrace.patches._check import require_fields, require_keyword, require_parameters
from vllm_flashtrace.patches.prefix_cache import spec_of

_MATCHED = "get_num_new_matched_tokens"


def check() -> None:
    """Raises PatchError unless the methods have the expected parameters."""
    require_parameters(
        getattr(KVConnectorFactory, "create_connector", None),
        "KVConnectorFactory.create_connector",
        *("config", "role"),
    )
    for kind in (KVConnectorBase_V1, OffloadingConnectorScheduler):
        method = getattr(kind, _MATCHED, None)
        name = f"{kind.__name__}.{_MATCHED}"
        require_parameters(method, name, "self", "request", "num_computed_tokens")
    require_keyword(method, name, "max_num_new_tokens")
    require_parameters(
        getattr(OffloadingConnectorScheduler, "on_new_request", None),
        "OffloadingConnectorScheduler.on_new_request",
        *("self", "request"),
    )
    require_fields(RequestOffloadState, "max_offload_tokens")


def apply() -> None:
    """Wraps the methods."""
    stock_create = KVConnectorFactory.create_connector

    @functools.wraps(stock_create)
    def create_connector(config: Any, role: KVConnectorRole, *args: Any, **kwargs: Any) -> Any:
        connector = stock_create(config, role, *args, **kwargs)
        if role is KVConnectorRole.SCHEDULER:
            setattr(connector, _MATCHED, ending_in_front(getattr(connector, _MATCHED)))
        return connector

    KVConnectorFactory.create_connector = staticmethod(create_connector)
    offloading = OffloadingConnectorScheduler
    setattr(offloading, _MATCHED, told_where_to_end(getattr(offloading, _MATCHED)))
    offloading.on_new_request = storing_nothing(offloading.on_new_request)


def ending_in_front(stock: Any) -> Any:
    """A connector's ``get_num_new_matched_tokens`` whose offers end in front of the first row.

    Args:
        stock: The connector's bound method.
    """

    @functools.wraps(stock)
    def get_num_new_matched_tokens(
        request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        tokens, waits = stock(request, num_computed_tokens)
        first = _first_row(request)
        if first is None or tokens is None:
            return tokens, waits
        if not waits or num_computed_tokens + tokens > first:
            return 0, False
        return tokens, waits

    return get_num_new_matched_tokens


def told_where_to_end(stock: Any) -> Any:
    """The method of vLLM's offloading scheduler, told to offer nothing behind the first row."""

    @functools.wraps(stock)
    def get_num_new_matched_tokens(
        self: OffloadingConnectorScheduler,
        request: Any,
        num_computed_tokens: int,
        max_num_new_tokens: int | None = None,
    ) -> tuple[int | None, bool]:
        first = _first_row(request)
        if first is not None:
            # In whole chunks: it would load a part of the last one.
            size = max(group.tokens_per_chunk for group in self.config.kv_group_configs)
            most = max(0, first // size * size - num_computed_tokens)
            max_num_new_tokens = (
                most if max_num_new_tokens is None else min(most, max_num_new_tokens)
            )
        return stock(self, request, num_computed_tokens, max_num_new_tokens=max_num_new_tokens)

    return get_num_new_matched_tokens


def storing_nothing(stock: Any) -> Any:
    """The method of vLLM's offloading scheduler after which nothing of a request of ours is kept.

    A completion may have asked not to be offloaded, and its trace has the same tokens.
    """

    @functools.wraps(stock)
    def on_new_request(self: OffloadingConnectorScheduler, request: Any) -> None:
        stock(self, request)
        try:
            if _first_row(request) is not None:
                self._req_status[request.request_id].max_offload_tokens = 0
        except Exception as error:
            log_unexpected("keeping a trace from being offloaded", error)

    return on_new_request


def _first_row(request: Any) -> int | None:
    """First position that has to be computed of a request of ours; None of another."""
    params = request.sampling_params
    if params is None or not params.extra_args:
        return None
    spec = spec_of(request)
    return None if spec is None else spec.first_row
