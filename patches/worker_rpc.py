"""Adds the methods by which an API server reaches the traces of a worker.

What it changes: ``WorkerBase`` gains ``flashtrace_collect``, ``flashtrace_discard`` and
``flashtrace_status``, to be called by name through ``collective_rpc``. They return msgpack
``bytes``, because other types do not survive the way back.

Why here: ``--worker-extension-cls`` takes a single class and belongs to the user.

Tested on: vLLM 0.32.0.
"""

from __future__ import annotations

from typing import Any

import msgspec
from vllm.v1.worker.worker_base import WorkerBase

from vllm_flashtrace.patches._check import PatchError
from vllm_flashtrace.trace.wire import secret_id
from vllm_flashtrace.worker.runner import activation_bytes, capture_of, worker_report

_METHODS = ("flashtrace_collect", "flashtrace_discard", "flashtrace_status")


def check() -> None:
    """Raises PatchError if vLLM or another plugin already has methods of these names."""
    for name in _METHODS:
        if hasattr(WorkerBase, name):
            raise PatchError(f"WorkerBase.{name} exists already")


def apply() -> None:
    """Adds the methods."""

    def flashtrace_collect(self: Any, nonce: str) -> bytes:
        return capture_of(self.model_runner).recorder.collect(nonce)

    def flashtrace_discard(self: Any, nonce: str) -> bytes:
        capture_of(self.model_runner).recorder.discard(nonce)
        return b""

    def flashtrace_status(self: Any) -> bytes:
        capture = capture_of(self.model_runner)
        capture.settle_budget(activation_bytes(self))
        budget = capture.recorder.budget
        return msgspec.msgpack.encode(
            {
                "refusal": capture.refusal,
                "secret": secret_id(),
                "recording": len(capture.recorder.active_requests),
                "waiting_results": capture.recorder.waiting_results,
                "accumulator_bytes": capture.recorder.accumulator_bytes,
                "worker": worker_report(self),
                **(budget.to_status() if budget is not None else {}),
            }
        )

    WorkerBase.flashtrace_collect = flashtrace_collect
    WorkerBase.flashtrace_discard = flashtrace_discard
    WorkerBase.flashtrace_status = flashtrace_status
