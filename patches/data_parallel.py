"""Tells which engine a request is sent to, where there are several.

What it changes: ``DPLBAsyncMPClient.get_core_engine_for_request`` picks one of the engines of a
data-parallel server for each request. After it, the rank of the engine is noted for the task that
added the request. The choice itself is not touched.

Why here: no output carries the rank, and vLLM forgets it when the request ends. The trace of a
completion must run on the engine that holds the completion's prefix cache.

Tested on: vLLM 0.32.0.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.v1.engine.core_client import DPLBAsyncMPClient

from vllm_flashtrace.base.logs import logger
from vllm_flashtrace.patches._check import require_keyword, require_parameters
from vllm_flashtrace.trace.engines import note_rank


def check() -> None:
    """Raises PatchError unless engines are picked and called as expected."""
    pick = getattr(DPLBAsyncMPClient, "get_core_engine_for_request", None)
    require_parameters(pick, "DPLBAsyncMPClient.get_core_engine_for_request", *("self", "request"))
    call = getattr(DPLBAsyncMPClient, "_call_utility_async", None)
    require_parameters(call, "DPLBAsyncMPClient._call_utility_async", *("self", "method"))
    require_keyword(call, "DPLBAsyncMPClient._call_utility_async", "engine")


def apply() -> None:
    """Wraps the method."""
    stock = DPLBAsyncMPClient.get_core_engine_for_request

    @functools.wraps(stock)
    def get_core_engine_for_request(self: DPLBAsyncMPClient, request: Any) -> Any:
        engine = stock(self, request)
        try:
            note_rank(self.core_engines.index(engine))
        except Exception as error:
            # Traces of this request then run on any engine, without its cache.
            _log_once(type(error).__name__, str(error))
        return engine

    DPLBAsyncMPClient.get_core_engine_for_request = get_core_engine_for_request


@functools.cache
def _log_once(kind: str, message: str) -> None:
    logger.error("FlashTrace: it is not known which engine serves a request: %s: %s", kind, message)
