"""The one vLLM engine that traces and scores perturbed prompts.

Invariant: it is an ordinary engine of the product, compiled and with prefix caching; what the user
set in the environment stands.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from benchmarks.faithfulness.scorer import EngineScorer
from vllm_flashtrace import FlashTrace

_THREADS_BIND = "VLLM_CPU_OMP_THREADS_BIND"
KV_CACHE_BYTES = 1 << 30
BLOCK_SIZE = 32
"""Tokens per KV block: the smallest that vLLM's CPU attention likes."""


class EngineResource:
    """A running engine and what the benchmark does with it.

    Attributes:
        ft: The product's offline class, whose ``llm`` is the engine.
        scorer: Log-probabilities of responses.
        pad_token_id: The token that stands for removed text.
    """

    def __init__(
        self,
        model_path: str | Path,
        dtype: str = "float32",
        max_model_len: int = 8192,
        **engine_args: Any,
    ) -> None:
        """Starts the engine.

        Args:
            model_path: Folder of the explained model.
            dtype: Of weights, activations and KV cache.
            max_model_len: Tokens of the longest sequence that is to be traced or scored.
            **engine_args: Further arguments of ``vllm.LLM``; they override those set here.
        """
        use_all_cores()
        arguments: dict[str, Any] = {
            "dtype": dtype,
            # A request ends with one token that nobody reads, and it needs a place.
            "max_model_len": max_model_len + 1,
            "kv_cache_memory_bytes": KV_CACHE_BYTES,
            "block_size": BLOCK_SIZE,
            "disable_log_stats": True,
            **engine_args,
        }
        self.ft = FlashTrace(str(model_path), **arguments)
        self.scorer = EngineScorer(self.ft.llm)
        tokenizer = self.ft.llm.get_tokenizer()
        pad = tokenizer.pad_token_id
        self.pad_token_id = int(tokenizer.eos_token_id if pad is None else pad)

    def close(self) -> None:
        """Stops the engine; closing again does nothing."""
        self.ft.close()


def use_all_cores() -> None:
    """Gives the engine's worker every core of this process; vLLM keeps one back otherwise."""
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))
    os.environ.setdefault(_THREADS_BIND, cores)
