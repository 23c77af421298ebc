"""What the fork server imports, for all processes that are forked off it."""

from __future__ import annotations

from importlib import import_module

from tests import heap

MODULES = (
    "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm_flashtrace.server.endpoint",
    "vllm_flashtrace.server.launcher",
    "vllm_flashtrace.worker.runner",
)

heap.import_without_collecting()
for name in MODULES:
    import_module(name)
heap.leave_out_what_is_there()
