"""Asks a running server what its engine and its worker still hold.

Invariant: figures come from the processes that hold the memory, through the route that vLLM opens
in its development mode, and from vLLM's own metrics.
"""

from __future__ import annotations

import ast
import re
from typing import Any

import httpx
import msgspec

from tests.server.live_server import Server

DEV_MODE = {"VLLM_SERVER_DEV_MODE": "1"}
_HELD = ("accumulator_bytes", "recording", "waiting_results")
_GAUGES = {
    "requests_running": "vllm:num_requests_running",
    "requests_waiting": "vllm:num_requests_waiting",
    "kv_cache_usage": "vllm:kv_cache_usage_perc",
}
_TIMEOUT_SECONDS = 60


def what_is_left(server: Server) -> dict[str, float]:
    """Accumulators, recordings and results of the worker; requests and KV blocks of the engine."""
    status = worker_status(server)
    return {**{key: status[key] for key in _HELD}, **_gauges(server)}


def worker_status(server: Server) -> dict[str, Any]:
    """The worker's own account; the server must have been started with ``DEV_MODE``."""
    response = httpx.post(
        f"{server.url}/collective_rpc",
        json={"method": "flashtrace_status"},
        timeout=_TIMEOUT_SECONDS,
    )
    response.raise_for_status()
    # The route answers with the text form of the bytes that the worker returned.
    [reply] = response.json()["results"]
    status: dict[str, Any] = msgspec.msgpack.decode(ast.literal_eval(reply))
    return status


def _gauges(server: Server) -> dict[str, float]:
    text = httpx.get(f"{server.url}/metrics", timeout=_TIMEOUT_SECONDS).text
    values = {}
    for name, metric in _GAUGES.items():
        found = re.findall(rf"^{metric}{{[^}}]*}} (\S+)$", text, flags=re.MULTILINE)
        if not found:
            raise RuntimeError(f"the server has no metric {metric}")
        values[name] = sum(map(float, found))
    return values
