"""Tells which engine a request is sent to, where there are several.

What it changes: ``DPLBAsyncMPClient.get_core_engine_for_request``, which picks one of the engines
of a data-parallel server for each request, is followed by a note of what it chose.

Why here: vLLM forgets the choice when the request ends, and no output carries it. The trace of a
completion must run where the completion's prefix cache is.

Tested on: vLLM 0.32.0.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from vllm.v1.engine.core_client import DPLBAsyncMPClient
from vllm_flashtrace.patches._check import require_keyword, require_parameters

from vllm_flashtrace.trace.engines import note_rank

logger = logging.getLogger("vllm.flashtrace")


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
            # Traces of this request run on any engine, without its cache.
            _log_once(type(error).__name__, str(error))
        return engine

    DPLBAsyncMPClient.get_core_engine_for_request = get_core_engine_for_request


@functools.cache
def _log_once(kind: str, message: str) -> None:
    logger.error("FlashTrace: it is not known which engine serves a request: %s: %s", kind, message)
