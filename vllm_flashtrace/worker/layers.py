"""Finds the attention layers of a loaded vLLM model, and refuses by name what cannot be traced.

What is read here is the structure: which modules a layer is made of, and which attributes change
what lies between ``v`` and the residual stream. That nothing was overlooked is proven by numbers
when the worker starts, see `start_proof`. With pipeline parallelism the layers are those of this
worker's stage. LoRA adapters matter on the output projection only: what they do to queries, keys,
values and the stream is in what is recorded.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from vllm.config import KVTransferConfig, VllmConfig
from vllm.distributed import get_pp_group
from vllm.lora.layers import RowParallelLinearWithLoRA
from vllm.model_executor.layers.attention import Attention, ChunkedLocalAttention, MLAAttention
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.v1.attention.backend import AttentionType
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from vllm_flashtrace.base.errors import TraceError, UnsupportedModelError
from vllm_flashtrace.base.logs import log_unexpected
from vllm_flashtrace.trace.config import FlashTraceConfig
from vllm_flashtrace.trace.engines import HANDING_OVER, check_data_parallel
from vllm_flashtrace.trace.wire import ModelPart
from vllm_flashtrace.worker.latents import up_projection
from vllm_flashtrace.worker.output_gates import OutputGate
from vllm_flashtrace.worker.quantized import Quantization, quantization_of

# Architectures that tests compare with an oracle; others are traced only when proven at the start.
KNOWN_ARCHITECTURES = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)

TRACED_CONNECTORS = frozenset({"OffloadingConnector"})
"""KV connectors of vLLM, or modules and names of others, that tests trace through."""

# Of the norms of a decoder layer, the one that sees the stream, or what is added to it, behind the
# attention block. Where there is one more, that norms the block's output before it is added: the
# same name means one or the other. Where block and MLP take the stream as it is, as in OLMo 2, the
# norm of that name is the block's.
_NORMS_BEHIND = (
    "pre_feedforward_layernorm",
    "pre_mlp_layernorm",
    "post_attention_layernorm",
    "feedforward_layernorm",
)
_NORMS_OF_BLOCKS = {
    "pre_feedforward_layernorm": "post_attention_layernorm",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "post_attention_layernorm": "post_self_attn_layernorm",
    "mlp": "post_attention_layernorm",
}
NORMS_IN_FRONT = ("input_layernorm", "attention_layernorm")
MLP, _NORM_OF_MLP = "mlp", "post_feedforward_layernorm"
_NORMS = (RMSNorm, GemmaRMSNorm)
# What vLLM makes of the norms of models in Transformers' code; they gather what ranks have cut,
# which the stream is not.
_GATHERING_NORMS = ("TPAwareRMSNorm", "TPAwareGemmaRMSNorm")

_ATTENTION = (Attention, ChunkedLocalAttention, MLAAttention)
# Those whose caches free the blocks that no later token sees.
_FREEING_SPECS = (ChunkedLocalAttentionSpec, SlidingWindowSpec)

# The backends of latent attention whose caches are read, see `latents` and `gpu_latents`.
CPU_BACKEND, CPU_LATENT_BACKEND = "CPU_ATTN", "CPU_MLA"
GPU_LATENT_BACKENDS = (
    "CUTLASS_MLA",
    "FLASHINFER_MLA",
    "FLASHMLA",
    "FLASH_ATTN_MLA",
    "TRITON_MLA",
)


class HeadSizes(NamedTuple):
    """Sizes of a layer's attention on this worker, as it is recorded.

    Latent attention is recorded as it is prefilled: every head has keys and values of its own,
    which are made of the latents in the cache.

    Attributes:
        queries: Query heads, H.
        groups: Key/value heads, G.
        keys: Size of a query and of a key.
        values: Size of a value as the output projection takes it. A cached one may be longer: a
            model whose values are shorter than its keys pads them with zeros.
    """

    queries: int
    groups: int
    keys: int
    values: int


@dataclass(frozen=True, slots=True)
class BlockNorm:
    """The RMSNorm that an attention block's output passes before it is added to the stream.

    With ``u_i`` the block's output, ``gain * u_i / sqrt(mean(u_i^2) + epsilon)`` is added. The
    root is a number of row ``i`` that all heads and tokens share, so it belongs to the row's
    weight, and the gain to ``M``: see `core.proximity`.

    Attributes:
        module: The norm.
        epsilon: What it adds to the mean of the squares.
    """

    module: Any
    epsilon: float

    @classmethod
    def read(cls, layer_name: str, norm: Any) -> BlockNorm:
        """Reads a norm.

        Raises:
            UnsupportedModelError: It is none of the norms that are known.
        """
        kind = type(norm)
        gathers = kind.__name__ in _GATHERING_NORMS and isinstance(norm, _NORMS)
        known = kind in _NORMS or gathers
        if not known or getattr(norm, "variance_size_override", None) is not None:
            raise UnsupportedModelError(
                f"traces are not supported with a {kind.__name__} of what the attention "
                f"block adds ({layer_name})"
            )
        return cls(norm, float(norm.variance_epsilon))

    def gain(self) -> torch.Tensor:
        """Its factor on each coordinate as it is now, float32 ``[D]``."""
        weight: torch.Tensor = self.module.weight.detach().float()
        return weight + 1 if isinstance(self.module, GemmaRMSNorm) else weight


@dataclass(frozen=True, slots=True)
class TracedLayer:
    """One decoder layer's modules.

    Attributes:
        index: Position in the whole model's stack.
        name: The attention layer's name in vLLM's forward context.
        decoder: The decoder layer; its input is the residual stream ``x_prev``.
        block: The attention block; its output is what is added to the residual stream.
        attention: vLLM's attention layer.
        behind: What takes the stream behind the attention block: a norm, or the MLP.
        projection: The output projection's name in the block.
        out_proj: The output projection ``W_O``, without adapters.
        adapters: What holds LoRA adapters of the output projection, or None.
        in_front: What takes the stream in front of the attention block, where the layer does not
            carry it beside what is to be added to it: a norm, or the layer itself; else None.
        multiplier: Factor on what the block adds to the stream.
        quantization: How ``W_O`` is quantised, or None.
        up_quantization: How what makes keys and values of latents is quantised, or None.
        block_norm: The norm of what the block adds, or None.
        gate: What multiplies attention's output in front of ``W_O``, or None.
    """

    index: int
    name: str
    decoder: nn.Module
    block: nn.Module
    attention: Attention | MLAAttention
    behind: nn.Module
    projection: str
    out_proj: RowParallelLinear
    adapters: nn.Module | None = None
    in_front: nn.Module | None = None
    multiplier: float = 1.0
    quantization: Quantization | None = None
    up_quantization: Quantization | None = None
    block_norm: BlockNorm | None = None
    gate: OutputGate | None = None

    @property
    def heads(self) -> HeadSizes:
        """Sizes of its heads."""
        attention: Any = self.attention
        queries = attention.num_heads
        values = self.out_proj.input_size_per_partition // queries
        if isinstance(attention, MLAAttention):
            return HeadSizes(queries, queries, attention.qk_head_dim, values)
        return HeadSizes(queries, attention.num_kv_heads, attention.head_size, values)

    @property
    def chunk_size(self) -> int | None:
        """Tokens of a chunk, where a token sees those of its own chunk alone."""
        chunked = isinstance(self.attention, ChunkedLocalAttention)
        return int(self.attention.attention_chunk_size) if chunked else None


def find_layers(model: nn.Module, config: VllmConfig) -> list[TracedLayer]:
    """The decoder layers of a model that are on this worker, in order.

    With pipeline parallelism these are the layers of its stage.

    Layers of a model that drafts tokens for this one are none of them. With the option
    ``partial_coverage`` neither are layers whose mixing of tokens is none that can be traced.

    Raises:
        UnsupportedModelError: A layer uses a feature that cannot be traced exactly, or its
            structure cannot be read; the message says what was not found.
    """
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    layers, refusals = [], []
    for context_name, attention in config.compilation_config.static_forward_context.items():
        if config.speculative_config is not None and id(attention) not in names:
            continue
        try:
            layer = _read_layer(modules, names, context_name, attention, config)
        except _OtherAttentionError as error:
            refusals.append(error)
        else:
            layers += [] if layer is None else [layer]
    layers.sort(key=lambda layer: layer.index)
    _check_coverage(layers, refusals, stage_layers(model, config), config)
    if len({layer.heads for layer in layers}) > 1:
        raise UnsupportedModelError("attention layers of different sizes are not supported")
    _check_block_norms(layers)
    _check_gates(layers, config)
    _check_chunks(layers, config)
    return layers


class _OtherAttentionError(UnsupportedModelError):
    """A layer's attention is of a kind that is not traced."""


def _read_layer(
    modules: dict[str, nn.Module],
    names: dict[int, str],
    context_name: str,
    attention: Any,
    config: VllmConfig,
) -> TracedLayer | None:
    """The decoder layer of something in vLLM's forward context; None if that is no attention."""
    if not isinstance(attention, (Attention, MLAAttention)):
        return None
    if isinstance(attention, MLAAttention):
        _check_latents(context_name, attention)
    parts = names.get(id(attention), "").split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    if not numbers or len(parts) - numbers[-1] < 3:
        raise UnsupportedModelError(
            f"{context_name} is not inside the attention block of a numbered decoder layer"
        )
    block = modules[".".join(parts[:-1])]
    decoder = modules[".".join(parts[: numbers[-1] + 1])]
    projection = _projection_name(block)
    out_proj, adapters = base_projection(getattr(block, projection, None))
    quantization, up_quantization = _check_attention(context_name, attention, block, out_proj)
    in_front, behind = _around(context_name, decoder, block, out_proj)
    return TracedLayer(
        index=int(parts[numbers[-1]]),
        name=context_name,
        decoder=decoder,
        block=block,
        attention=attention,
        behind=getattr(decoder, behind),
        projection=projection,
        out_proj=out_proj,
        adapters=adapters,
        in_front=in_front,
        multiplier=_multiplier(context_name, decoder),
        quantization=quantization,
        up_quantization=up_quantization,
        block_norm=_block_norm(context_name, decoder, behind),
        gate=OutputGate.read(context_name, block, attention, projection),
    )


@dataclass(frozen=True, slots=True)
class OtherLayer:
    """A decoder layer that is not traced, as far as its change of the stream is measured.

    Attributes:
        decoder: The layer.
        behind: As in `TracedLayer`.
        in_front: As in `TracedLayer`.
    """

    decoder: nn.Module
    behind: nn.Module
    in_front: nn.Module | None


def other_layers(
    model: nn.Module, config: VllmConfig, layers: Sequence[TracedLayer]
) -> list[OtherLayer]:
    """The decoder layers on this worker that are not traced, in order.

    Empty where what they add to the stream cannot be seen as it is of the traced ones.
    """
    missing = sorted(set(stage_layers(model, config)) - {layer.index for layer in layers})
    if not missing or layers[0].block_norm is not None:
        return []
    names = {id(module): name for name, module in model.named_modules()}
    stack = names[id(layers[0].decoder)].rpartition(".")[0]
    found = []
    for index in missing:
        decoder = model.get_submodule(f"{stack}.{index}")
        kind = type(layers[0].behind)
        try:
            behind = getattr(decoder, _norm(f"{stack}.{index}", decoder, _NORMS_BEHIND))
            in_front = getattr(decoder, _norm(f"{stack}.{index}", decoder, NORMS_IN_FRONT))
        except UnsupportedModelError:
            return []
        if type(behind) is not kind:
            return []
        carried = layers[0].in_front is None
        found.append(OtherLayer(decoder, behind, None if carried else in_front))
    return found


def _check_coverage(
    layers: Sequence[TracedLayer],
    refusals: Sequence[UnsupportedModelError],
    stage: range,
    config: VllmConfig,
) -> None:
    """Refuses a model some of whose layers cannot be traced, unless the option allows it."""
    found = [layer.index for layer in layers]
    whole = found == list(stage)
    if whole and not refusals:
        return
    if len(set(found)) < len(found) or not set(found) <= set(stage):
        raise UnsupportedModelError("decoder layers and attention layers do not fit together")
    reason = (
        refusals[0].message
        if refusals
        else f"{len(stage) - len(found)} of {len(stage)} decoder layers have no attention layer"
    )
    if not found or whole:
        raise UnsupportedModelError(reason)
    if not partial_coverage(config):
        raise UnsupportedModelError(
            f"{reason}; the option 'partial_coverage' traces the other {len(found)} alone"
        )


def partial_coverage(config: VllmConfig) -> bool:
    """Whether a model may be traced through some of its layers alone."""
    try:
        return FlashTraceConfig.from_additional_config(config.additional_config).partial_coverage
    except ValueError:
        return False  # Said where the first trace is refused.


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


def _projection_name(block: nn.Module) -> str:
    """Name of an attention block's one row-parallel projection, else the usual name."""
    kinds = (RowParallelLinear, RowParallelLinearWithLoRA)
    found = [name for name, child in block.named_children() if isinstance(child, kinds)]
    return found[0] if len(found) == 1 else "o_proj"


def _around(
    layer_name: str, decoder: nn.Module, block: nn.Module, out_proj: nn.Module | None
) -> tuple[nn.Module | None, str]:
    """`TracedLayer.in_front`, and the name of `TracedLayer.behind`."""
    if _norms_outputs_alone(decoder):
        return decoder, MLP
    behind = _norm(layer_name, decoder, _NORMS_BEHIND)
    takes_residual = "residual" in inspect.signature(decoder.forward).parameters
    if takes_residual and _carries_stream(decoder, block, getattr(decoder, behind), out_proj):
        return None, behind
    return getattr(decoder, _norm(layer_name, decoder, NORMS_IN_FRONT)), behind


class _NormSeenError(Exception):
    """Ends a decoder layer's code where the stream behind its block is normed."""


def _carries_stream(decoder: Any, block: Any, behind: nn.Module, out_proj: Any) -> bool:
    """Whether a layer hands the stream on beside what is to be added to it.

    One may take both and add up by itself, as those of Granite 4 do. Its own code tells, run on one
    row up to the norm behind the block, which does nothing meanwhile.
    """
    seen: list[int] = []

    def end(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(sum(argument is not None for argument in (*args, *kwargs.values())))
        raise _NormSeenError

    row = torch.zeros(1, out_proj.output_size, dtype=out_proj.params_dtype)
    row = row.to(next(behind.parameters()).device)
    arguments = dict.fromkeys(inspect.signature(decoder.forward).parameters)
    given = {"positions": torch.zeros_like(row[:, 0], dtype=torch.int64)}
    given |= {"hidden_states": row, "residual": row.clone()}
    stock = vars(block).get("forward")
    hook = behind.register_forward_pre_hook(end, prepend=True, with_kwargs=True)
    block.forward = lambda *_, **__: row.clone()
    try:
        with torch.inference_mode():
            decoder(**{name: given[name] for name in arguments if name in given})
    except _NormSeenError:
        return seen == [2]
    except Exception as error:
        log_unexpected("reading how a decoder layer hands on its stream", error)
        return True  # The proof at the start tells.
    finally:
        hook.remove()
        vars(block).pop("forward", None)
        if stock is not None:
            block.forward = stock
    return True


def _norms_outputs_alone(decoder: nn.Module) -> bool:
    """Whether a layer has norms of what its block and MLP give, and none of what they take."""
    has = [_has(decoder, name) for name in (_NORMS_OF_BLOCKS[MLP], _NORM_OF_MLP, MLP)]
    taken = [*NORMS_IN_FRONT, *(n for n in _NORMS_BEHIND if n != _NORMS_OF_BLOCKS[MLP])]
    return all(has) and not any(_has(decoder, name) for name in taken)


def _has(decoder: nn.Module, name: str) -> bool:
    return isinstance(getattr(decoder, name, None), nn.Module)


def _norm(layer_name: str, decoder: nn.Module, names: tuple[str, ...]) -> str:
    """Which of these names a decoder layer has a norm of."""
    for name in names:
        if _has(decoder, name):
            return name
    raise UnsupportedModelError(
        f"the decoder layer of {layer_name} has no {' or '.join(names)}: its norm "
        f"{'in front of' if names == NORMS_IN_FRONT else 'behind'} attention was not found"
    )


def _block_norm(layer_name: str, decoder: nn.Module, behind: str) -> BlockNorm | None:
    norm = getattr(decoder, _NORMS_OF_BLOCKS.get(behind, ""), None)
    return BlockNorm.read(layer_name, norm) if isinstance(norm, nn.Module) else None


def _check_block_norms(layers: list[TracedLayer]) -> None:
    with_norm = [layer for layer in layers if layer.block_norm is not None]
    if not with_norm:
        return
    refusals = {
        "a norm of what attention adds in some layers only": len(with_norm) < len(layers),
        "a norm of what attention adds and a residual multiplier": any(
            layer.multiplier != 1 for layer in layers
        ),
    }
    for feature, present in refusals.items():
        if present:
            raise UnsupportedModelError(f"traces are not supported with {feature}")


def _check_gates(layers: list[TracedLayer], config: VllmConfig) -> None:
    widths = {layer.gate.width for layer in layers if layer.gate is not None}
    if not widths:
        return
    refusals = {
        "output gates of different kinds": len(widths) > 1,
        "an output gate in some attention layers only": any(layer.gate is None for layer in layers),
        # The gates of some rows are computed once more, for which adapters know no rows.
        "an output gate and LoRA adapters": config.lora_config is not None,
        "an output gate on a GPU": config.device_config.device_type != "cpu",
    }
    for feature, present in refusals.items():
        if present:
            raise UnsupportedModelError(f"traces are not supported with {feature}")


def _check_chunks(layers: list[TracedLayer], config: VllmConfig) -> None:
    """Refuses models that vLLM computes without their chunks, as it does in Transformers' code."""
    text = config.model_config.hf_text_config
    kinds = getattr(text, "layer_types", None) or ()
    size = getattr(text, "attention_chunk_size", None)
    if not size or config.model_config.max_model_len <= size:
        return
    for layer in layers:
        has_chunks = "chunked_attention" in kinds[layer.index : layer.index + 1]
        if has_chunks and layer.chunk_size is None:
            raise UnsupportedModelError(
                "traces are not supported with chunked local attention that is computed as "
                f"attention to every token ({layer.name})"
            )


def _multiplier(layer_name: str, decoder: nn.Module) -> float:
    multiplier = float(getattr(decoder, "residual_multiplier", 1.0))
    if not 0 < multiplier < math.inf:
        raise UnsupportedModelError(
            f"traces are not supported with a residual multiplier of {multiplier} ({layer_name})"
        )
    return multiplier


def _check_latents(name: str, attention: MLAAttention) -> None:
    """Refuses latent attention that is not read as its layer computes it."""
    backend = attention.attn_backend.get_name()
    known = backend in (CPU_LATENT_BACKEND, *GPU_LATENT_BACKENDS)
    _refuse(name, {f"multi-head latent attention (MLA) on the {backend} backend": not known})


def _check_attention(
    name: str, attention: Attention | MLAAttention, block: nn.Module, out_proj: nn.Module | None
) -> tuple[Quantization | None, Quantization | None]:
    """How output projection and `kv_b_proj` are quantised; refuses what is not traced."""
    refusals = {
        f"{type(attention).__name__} layers": type(attention) not in _ATTENTION,
        "dual chunk attention": getattr(block, "dual_chunk_attention_config", None) is not None,
        "an unknown output projection": not isinstance(out_proj, RowParallelLinear),
    }
    _refuse(name, refusals)
    assert isinstance(out_proj, RowParallelLinear)
    if out_proj.tp_size > 1 and not out_proj.reduce_results:
        # Experts then compute a part of the rows each, and the stream between layers has these.
        raise UnsupportedModelError(
            "traces are not supported where tensor-parallel ranks divide the residual stream "
            f"(sequence-parallel experts) ({name})"
        )
    width, heads = out_proj.input_size_per_partition, attention.num_heads
    other_width = "an output projection of another width than its heads"
    if isinstance(attention, MLAAttention):
        impl: Any = attention.impl
        refusals = {
            other_width: width != heads * attention.v_head_dim,
            "an output gate of latent attention": getattr(block, "g_proj", None) is not None,
            "sparse attention": attention.use_sparse or attention.indexer is not None,
            "a sliding window of latent attention": attention.sliding_window is not None,
            "non-causal attention": attention.non_causal_multi_token_decode,
            "LoRA adapters of an up-projection of latents": (
                impl.kv_b_proj is not up_projection(attention)
            ),
            "an up-projection of latents that is packed or has a bias": (
                packed_kernel(up_projection(attention)) is not None
                or up_projection(attention).bias is not None
            ),
        }
    else:
        refusals = {
            other_width: width % heads != 0 or width > heads * attention.head_size,
            f"{AttentionType(attention.attn_type).value} attention": attention.attn_type
            != AttentionType.DECODER,
            "KV sharing between layers": attention.kv_sharing_target_layer_name is not None,
            "values of another size than keys": attention.head_size_v != attention.head_size,
        }
    _refuse(name, refusals)
    up: Quantization | None = None
    try:
        quantization = quantization_of(out_proj)
        if isinstance(attention, MLAAttention):
            up = quantization_of(up_projection(attention), "an up-projection of latents")
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{error.message} ({name})") from None
    by_batch = "an up-projection of latents that rounds them by one scale for all of a step"
    _refuse(name, {by_batch: up is not None and up.by_batch})
    return quantization, up


def _refuse(name: str, refusals: dict[str, bool]) -> None:
    for feature, present in refusals.items():
        if present:
            raise _OtherAttentionError(f"traces are not supported with {feature} ({name})")


@dataclass(frozen=True, slots=True)
class CacheGroups:
    """Where the KV cache keeps the traced layers: in groups, each with block tables of its own.

    Attributes:
        numbers: The groups that hold any of them, as the runner counts groups.
        places: Of each layer, the place of its group in ``numbers``.
        names: Names of the layers in vLLM's forward context.
    """

    numbers: tuple[int, ...]
    places: tuple[int, ...]
    names: frozenset[str]

    def layers(self, place: int) -> list[int]:
        """Indices of the layers of one group."""
        return [layer for layer, where in enumerate(self.places) if where == place]


def cache_groups(config: KVCacheConfig, layers: Sequence[TracedLayer]) -> CacheGroups:
    """Finds the groups of the KV cache that hold the layers.

    A group of layers with a sliding window, or with chunks, forgets tokens behind it; those that a
    trace needs are kept for it, see `patches.kept_blocks`.

    Raises:
        UnsupportedModelError: A cache may forget what a trace needs, or does not hold a layer.
    """
    number_of = {}
    for number, group in enumerate(config.kv_cache_groups):
        specs = getattr(group.kv_cache_spec, "kv_cache_specs", {})
        for name in group.layer_names:
            number_of[name] = number, specs.get(name, group.kv_cache_spec)
    for layer in layers:
        if layer.name not in number_of:
            raise UnsupportedModelError(f"the KV cache does not hold {layer.name}")
        spec = number_of[layer.name][1]
        if getattr(spec, "non_causal", False):
            raise UnsupportedModelError("traces are supported with causal attention only")
        if type(spec) not in (FullAttentionSpec, MLAAttentionSpec, *_FREEING_SPECS):
            raise UnsupportedModelError(
                f"traces are not supported with a {type(spec).__name__}: its cache does not keep "
                "every token"
            )
    numbers = sorted({number_of[layer.name][0] for layer in layers})
    places = tuple(numbers.index(number_of[layer.name][0]) for layer in layers)
    return CacheGroups(tuple(numbers), places, frozenset(layer.name for layer in layers))


def keeps_blocks(config: KVCacheConfig, tokens: int) -> bool:
    """Whether the KV cache has room for all blocks of a request, also those that others free.

    The scheduler and its workers ask this of the same configuration: the one keeps the blocks of a
    trace, the others trace it, or neither does.

    Args:
        config: The KV cache's.
        tokens: Tokens of the request; places for drafts take up to one more block.
    """
    groups = config.kv_cache_groups
    if not any(type(group.kv_cache_spec) in _FREEING_SPECS for group in groups):
        return True
    blocks = sum(-(-tokens // group.kv_cache_spec.block_size) + 1 for group in groups)
    return blocks < config.num_blocks  # Block 0 stays empty.


def stage_layers(model: nn.Module, config: VllmConfig) -> range:
    """The layers that this worker runs, as indices in the whole model.

    Raises:
        UnsupportedModelError: The model does not tell.
    """
    if config.parallel_config.pipeline_parallel_size == 1:
        return range(config.model_config.get_total_num_hidden_layers())
    inner: Any = getattr(model, "model", None)
    if hasattr(inner, "start_layer"):
        return range(inner.start_layer, inner.end_layer)
    # Around a language model inside, and in Transformers' code, the places of other stages' tell.
    total = config.model_config.get_total_num_hidden_layers()
    stacks = [
        [place for place, layer in enumerate(stack) if not isinstance(layer, PPMissingLayer)]
        for stack in model.modules()
        if isinstance(stack, nn.ModuleList)
        and len(stack) == total
        and any(isinstance(layer, PPMissingLayer) for layer in stack)
    ]
    if len(stacks) == 1 and stacks[0] and stacks[0][-1] - stacks[0][0] == len(stacks[0]) - 1:
        return range(stacks[0][0], stacks[0][-1] + 1)
    raise UnsupportedModelError(
        "traces are not supported with pipeline parallelism of a model that does not tell its "
        "stage's layers"
    )


def is_last_stage(config: VllmConfig) -> bool:
    """Whether the model's last layer is on this worker."""
    return config.parallel_config.pipeline_parallel_size == 1 or get_pp_group().is_last_rank


def model_part(
    model: nn.Module, config: VllmConfig, traced: Sequence[TracedLayer] = ()
) -> ModelPart:
    """What of the model is on this worker.

    Args:
        model: The model.
        config: vLLM's configuration.
        traced: The layers that are traced; all if none are given.
    """
    layers = stage_layers(model, config)
    return ModelPart(
        first_layer=layers.start,
        num_layers=len(layers),
        model_layers=config.model_config.get_total_num_hidden_layers(),
        ranks=config.parallel_config.tensor_parallel_size,
        traced=tuple(layer.index for layer in traced) if len(traced) < len(layers) else (),
    )


def output_projection(layer: TracedLayer) -> torch.Tensor:
    """``W_O`` of a layer as the linear layer keeps it, ``[D, H * d]``, in the model's dtype.

    With tensor parallelism these are the columns of this rank's own heads. A matrix that is packed
    (see `packed_kernel`) is got by applying the projection to the identity. The bias is not part of
    it: it belongs to no token.
    """
    projection = layer.out_proj
    if packed_kernel(projection) is None:
        return projection.weight.detach()
    rows = projection.input_size_per_partition
    identity = torch.eye(rows, dtype=projection.params_dtype)
    with torch.inference_mode():
        return projection.quant_method.apply(projection, identity).t().contiguous()


def packed_kernel(module: nn.Module) -> Callable[..., Any] | None:
    """What the CPU backend computes a linear layer with, if it has packed the matrix.

    vLLM then empties ``weight`` and keeps the packed matrix in the closure of a function, where
    nothing writes to it: the same function is the same matrix. A function that closes over nothing
    reads ``weight``.

    Returns:
        None where the layer computes with ``weight``.
    """
    kernel = vars(module).get("cpu_linear")
    return kernel if getattr(kernel, "__closure__", None) else None


def base_projection(projection: nn.Module | None) -> tuple[nn.Module | None, nn.Module | None]:
    """An output projection without its adapters, and the module that holds them, if any.

    Raises:
        UnsupportedModelError: The adapters are cut over ranks in a way that is not read here.
    """
    if not isinstance(projection, RowParallelLinearWithLoRA):
        return projection, None
    if type(projection) is not RowParallelLinearWithLoRA:
        raise UnsupportedModelError("traces are not supported with fully sharded LoRA adapters")
    return projection.base_layer, projection


def added_weight(
    layer: TracedLayer, adapter: int, slot_of: Callable[[int], int] | None
) -> torch.Tensor | None:
    """What an adapter adds to ``W_O``, float32 ``[D, H * d]`` of this rank's heads.

    Args:
        layer: The layer.
        adapter: The adapter's id.
        slot_of: Tells which slot of the model's modules holds an adapter. Asked in the step in
            which the trace ends, while the slot still holds the adapter of its request.

    Returns:
        None where no adapter can change this projection.

    Raises:
        TraceError: ``recording_failed``: the adapter is not where it should be.
    """
    if layer.adapters is None:
        return None
    if slot_of is None:
        raise TraceError("recording_failed", "the adapters of this worker are not known")
    slot = slot_of(adapter)
    adapters: Any = layer.adapters
    (down,), (up,) = adapters.lora_a_stacked, adapters.lora_b_stacked
    product: torch.Tensor = up[slot, 0].float() @ down[slot, 0].float()
    return product


def adapter_slot(runner: Any, adapter: int) -> int:
    """Where the modules of a runner's model hold an adapter.

    Args:
        runner: A V1 or V2 model runner.
        adapter: The adapter's id (``LoRARequest.lora_int_id``).

    Raises:
        TraceError: ``recording_failed``: the adapter is not active.
    """
    slots = runner.lora_manager._adapter_manager.lora_index_to_id
    if adapter not in slots:
        raise TraceError("recording_failed", f"LoRA adapter {adapter} is not active")
    index: int = slots.index(adapter)
    return index
