"""A ``vllm.LLM`` to trace on: started, asked whether it can trace, and stopped.

Invariant: a bad option is refused before anything starts, and what the user chose is never
overridden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vllm_flashtrace.base.environment import default_kv_cache_bytes, prepare_environment
from vllm_flashtrace.trace.config import SECTION, FlashTraceConfig


def start_engine(model: str, config: Mapping[str, Any] | None, engine_args: dict[str, Any]) -> Any:
    """Starts a ``vllm.LLM`` that this package can trace on.

    Args:
        model: Model name or folder.
        config: Fields of ``FlashTraceConfig``; None leaves those in ``additional_config`` alone.
        engine_args: Arguments of ``vllm.LLM``.

    Raises:
        ValueError: An option is bad; nothing was started.
    """
    if config is not None:
        additional = {**(engine_args.get("additional_config") or {}), SECTION: dict(config)}
        engine_args = {**engine_args, "additional_config": additional}
    FlashTraceConfig.from_additional_config(engine_args.get("additional_config"))
    prepare_environment()
    if not {"kv_cache_memory_bytes", "gpu_memory_utilization"} & engine_args.keys():
        sizes = ("tensor_parallel_size", "pipeline_parallel_size")
        workers = math.prod(int(engine_args.get(size) or 1) for size in sizes)
        engine_args = {**engine_args, "kv_cache_memory_bytes": default_kv_cache_bytes(workers)}
    from vllm import LLM

    return LLM(model=model, **engine_args)


def stop_engine(llm: Any) -> None:
    """Ends the engine's processes; the ``vllm.LLM`` is of no use afterwards."""
    llm.llm_engine.engine_core.shutdown()


def engine_refusal(llm: Any) -> str | None:
    """Why this engine cannot trace its model; None if it can."""
    from vllm_flashtrace.trace.pickup import decode_status

    if llm.llm_engine.vllm_config.parallel_config.data_parallel_size > 1:
        # vLLM runs one process per rank then, and a batch ends at different times in each.
        return "traces are not supported offline with data parallelism"
    try:
        return decode_status(llm.collective_rpc("flashtrace_status"))["refusal"]
    except Exception as error:
        return f"the engine runs without the FlashTrace plugin ({error})"
