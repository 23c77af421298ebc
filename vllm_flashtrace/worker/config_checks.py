"""Refuses engine configurations with which traces would not be exact, or that no test covers."""

from __future__ import annotations

from vllm.config import KVTransferConfig, VllmConfig

from vllm_flashtrace.base.errors import UnsupportedModelError
from vllm_flashtrace.trace.engines import HANDING_OVER, check_data_parallel

# Architectures that tests compare with an oracle; others are traced only when proven at the start.
KNOWN_ARCHITECTURES = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)

TRACED_CONNECTORS = frozenset({"OffloadingConnector"})
"""KV connectors of vLLM, or modules and names of others, that tests trace through."""


def check_config(config: VllmConfig) -> None:
    """Refuses engine configurations that the capture path does not cover.

    Raises:
        UnsupportedModelError: Naming the feature in the way.
    """
    parallel = config.parallel_config
    refusals = {
        "decode context parallelism": getattr(parallel, "decode_context_parallel_size", 1) > 1,
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "micro-batching (DBO)": bool(getattr(parallel, "use_ubatching", False)),
        # It moves rows of the batch on the device alone.
        "adaptive verification of drafts": bool(
            getattr(config.speculative_config, "enable_adaptive_verification", False)
        ),
        "a pooling model": config.model_config.runner_type != "generate",
        "prompt embeddings": bool(getattr(config.model_config, "enable_prompt_embeds", False)),
    }
    for feature, present in refusals.items():
        if present:
            raise UnsupportedModelError(f"traces are not supported with {feature}")
    if config.kv_transfer_config is not None:
        _check_connector(config.kv_transfer_config)
    check_data_parallel(parallel)


def _check_connector(transfer: KVTransferConfig, *, alone: bool = True) -> None:
    """Refuses connectors through which no test has traced, and what hands requests over."""
    module, name = transfer.kv_connector_module_path, transfer.kv_connector
    if alone and name in HANDING_OVER and not module:
        return
    if transfer.kv_role != "kv_both":
        raise UnsupportedModelError(
            f"traces are not supported with disaggregated prefill (kv_role {transfer.kv_role})"
        )
    if name == "MultiConnector" and not module:
        for child in transfer.kv_connector_extra_config.get("connectors", ()):
            _check_connector(KVTransferConfig(**child), alone=False)
    elif (f"{module}.{name}" if module else name) not in TRACED_CONNECTORS:
        raise UnsupportedModelError(f"traces are not supported with KV transfer by {name}")


def check_architecture(config: VllmConfig) -> None:
    """Refuses, where nothing was proven at the start, what no test compares.

    Raises:
        UnsupportedModelError: Naming the architecture, or the quantisation.
    """
    architecture = config.model_config.architecture
    if config.model_config.quantization is not None:
        raise UnsupportedModelError(
            f"traces are not supported for quantized weights ({config.model_config.quantization}) "
            "without a proof at the start"
        )
    if architecture not in KNOWN_ARCHITECTURES:
        raise UnsupportedModelError(
            f"traces are not supported for {architecture} without a proof at the start; without "
            f"it: {', '.join(KNOWN_ARCHITECTURES)}"
        )
