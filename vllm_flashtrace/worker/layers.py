"""Finds the attention layers of a loaded vLLM model, and refuses by name what cannot be traced.

What is read here is the structure: which modules a layer is made of, and which attributes change
what lies between ``v`` and the residual stream. That nothing was overlooked is proven by numbers
when the worker starts, see `start_proof`. With pipeline parallelism the layers are those of this
worker's stage. How a layer carries the stream is read in `decoder_stream`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.attention import Attention, ChunkedLocalAttention, MLAAttention
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.v1.attention.backend import AttentionType

from vllm_flashtrace.base.errors import UnsupportedModelError
from vllm_flashtrace.trace.config import FlashTraceConfig
from vllm_flashtrace.trace.wire import ModelPart
from vllm_flashtrace.worker.decoder_stream import (
    NORMS_BEHIND,
    NORMS_IN_FRONT,
    BlockNorm,
    norm_name,
    norm_of_block,
    residual_multiplier,
    stream_takers,
)
from vllm_flashtrace.worker.latents import LATENT_BACKENDS, up_projection
from vllm_flashtrace.worker.output_gates import OutputGate
from vllm_flashtrace.worker.output_projections import (
    base_projection,
    packed_kernel,
    projection_name,
)
from vllm_flashtrace.worker.quantized import Quantization, quantization_of

_ATTENTION = (Attention, ChunkedLocalAttention, MLAAttention)


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
    projection = projection_name(block)
    out_proj, adapters = base_projection(getattr(block, projection, None))
    quantization, up_quantization = _check_attention(context_name, attention, block, out_proj)
    in_front, behind = stream_takers(context_name, decoder, block, out_proj)
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
        multiplier=residual_multiplier(context_name, decoder),
        quantization=quantization,
        up_quantization=up_quantization,
        block_norm=norm_of_block(context_name, decoder, behind),
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
            behind = getattr(decoder, norm_name(f"{stack}.{index}", decoder, NORMS_BEHIND))
            in_front = getattr(decoder, norm_name(f"{stack}.{index}", decoder, NORMS_IN_FRONT))
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
    if not _partial_coverage(config):
        raise UnsupportedModelError(
            f"{reason}; the option 'partial_coverage' traces the other {len(found)} alone"
        )


def _partial_coverage(config: VllmConfig) -> bool:
    """Whether a model may be traced through some of its layers alone."""
    try:
        return FlashTraceConfig.from_additional_config(config.additional_config).partial_coverage
    except ValueError:
        return False  # Said where the first trace is refused.


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


def _check_latents(name: str, attention: MLAAttention) -> None:
    """Refuses latent attention that is not read as its layer computes it."""
    backend = attention.attn_backend.get_name()
    known = backend in LATENT_BACKENDS
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
