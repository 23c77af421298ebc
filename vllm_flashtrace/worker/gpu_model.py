"""A traced model on one of the recorded CUDA backends, and what is refused there by name.

Nothing here waits for the device, and nothing is copied out of the KV cache or of the weights:
kernels read both where vLLM keeps them. Of latent attention keys and values are made first, see
`gpu_latents`. What is queued while a request holds its KV blocks reads them before a later step can
write to them, because vLLM runs its steps on the same stream.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.attention.chunked_local_attention import (
    create_chunked_local_attention_backend,
)
from vllm.platforms import current_platform

from vllm_flashtrace.base.errors import TraceError, UnsupportedModelError
from vllm_flashtrace.base.logs import logger
from vllm_flashtrace.kernels import (
    AttentionForm,
    AttentionInputs,
    KeptQueries,
    LayerKeys,
    PagedRows,
    ProximityLayer,
    ProximityTrace,
    RowSegment,
    add_kept_column_sums,
    gather_tokens,
    paged_column_sums,
    replace_by_proximities,
    touching_sums,
)
from vllm_flashtrace.trace.budget import part_of_memory
from vllm_flashtrace.worker.gpu_cache import (
    CacheScales,
    KeyValueViews,
    cache_scales,
    key_value_views,
    quantized_dtype,
)
from vllm_flashtrace.worker.gpu_latents import (
    ROOM_BYTES,
    LatentRoom,
    check_gpu_latents,
    latent_form,
    read_latent_values,
)
from vllm_flashtrace.worker.kept_rows import KeptRows
from vllm_flashtrace.worker.layers import TracedLayer
from vllm_flashtrace.worker.observer import TELLING_VERSIONS, RecordingAttention
from vllm_flashtrace.worker.step_rows import StepRows
from vllm_flashtrace.worker.traced_model import TracedModel

KEPT_ROWS = 1024
"""Target rows of a step whose queries are kept until its end, where the memory below suffices."""

KEPT_BYTES = 512 << 20
"""Most memory for kept queries; at most a quarter of `device_memory_limit`."""

WORTH_KEEPING_LSE = 1 << 31
"""Products of a layer's queries and keys from which on the log-sum-exp of kept queries is kept too.

That is a launch more per layer. An H200 needs about 10 us for so many products, which is about what
a launch costs; the queries of all layers take one pass at the end of the step, and fewer products
cost less there.
"""

_PART_OF_FREE_MEMORY = 2
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class GPUTracedModel(TracedModel):
    """Reads keys, values and weights in place, for all traces of a step in one launch.

    Queries of steps with few target rows are kept until the step ends; the column sums of all
    layers then take as many launches as those of one layer.
    """

    batched = True
    measures_mass = True

    def __init__(self, model: nn.Module, config: VllmConfig, device: torch.device) -> None:
        """See `TracedModel`."""
        super().__init__(model, config, device)
        check_gpu_config(config)
        self._flashinfer_quantizes = flashinfer_quantizes_queries(config)
        self._readings: dict[int, _Reading] = {}
        self._scratch: Tensor | None = None
        self._kept_rows = 0
        self._room = self._latent_room()
        self._longest = config.model_config.max_model_len
        for index, layer in enumerate(self.layers):
            self._check_projection(layer)
            self._reading(index)

    @property
    def tells_lse(self) -> bool:
        """See `TracedModel`."""
        return all(_tells_lse(layer) for layer in self.layers)

    def add_column_sums(
        self,
        layer: int,
        query: Tensor,
        group: StepRows,
        rows: PagedRows,
        scales: Tensor | None,
        lse: Tensor | None = None,
    ) -> None:
        """See `TracedModel`."""
        rows = group.rows_in(self.cache_groups.places[layer], rows)
        if self._room is not None:
            attention: Any = self.layers[layer].attention
            form = self.attention_form(layer)
            self._room.add_column_sums(layer, attention, query, rows, form, scales)
            return
        keys = self._keys(layer)
        inputs = AttentionInputs(query, keys.key_cache, rows, keys.form, scales, lse)
        paged_column_sums(inputs, layer)

    def heads_of(self, layer: int, query: Tensor) -> Tensor:
        """See `TracedModel`."""
        if (query.dtype in _FP8) != quantizes_queries(self.layers[layer]):
            raise TraceError(
                "recording_failed", f"queries of layer {self.layers[layer].index} are {query.dtype}"
            )
        return super().heads_of(layer, query)

    def add_kept_column_sums(self, group: StepRows) -> None:
        """See `TracedModel`."""
        kept = group.kept
        if kept is None or not kept.layers:
            return
        if len(self.cache_groups.numbers) == 1:
            add_kept_column_sums(kept, [self._keys(layer) for layer in kept.layers])
            return
        with touching_sums():
            for place in range(len(self.cache_groups.numbers)):
                rows = group.rows_in(place, group.rows)
                own = KeptQueries(rows, kept.queries, kept.room, kept.scales, kept.lse)
                own.layers = [i for i in self.cache_groups.layers(place) if i in kept.layers]
                if own.layers:
                    add_kept_column_sums(own, [self._keys(layer) for layer in own.layers])
        kept.layers = []

    def row_bytes(self) -> int:
        """See `TracedModel`; 0 where queries are eight-bit floats, which are not kept."""
        return 0 if quantizes_queries(self.layers[0]) else super().row_bytes()

    def weigh(self, kept: KeptRows, group: StepRows) -> None:
        """See `TracedModel`; in as many launches as column sums take for one layer, and one each.

        Rows that do not lie side by side are done layer by layer.
        """
        rows, room = group.rows, self._scratch
        near = rows.adjacent
        if near is None or room is None or len(rows) > self._kept_rows:
            super().weigh(kept, group)
            return
        with torch.inference_mode(False):
            room = room[: len(room) // 16 * 16].view(torch.float32)
            scales = None if kept.scales is None else kept.scales[:, near]
            lse = kept.lse[..., near] if kept.lse is not None and kept.lse_told else None
            group.kept = KeptQueries(rows, kept.queries[:, near], room, scales, lse)
        group.kept.layers = list(range(self.shape.num_layers))
        self.add_kept_column_sums(group)

    def attention_form(self, layer: int) -> AttentionForm:
        """See `TracedModel`."""
        reading = self._reading(layer)
        return reading.form or gpu_attention_form(self.layers[layer], reading.scales)

    def read_values(self, layer: int, block_tables: Sequence[Tensor], tokens: int) -> Tensor:
        """See `TracedModel`; they are copied."""
        reading = self._reading(layer)
        block_table = block_tables[self.cache_groups.places[layer]]
        attention = self.layers[layer].attention
        if isinstance(attention, MLAAttention):
            return read_latent_values(attention, block_table, tokens)
        values = gather_tokens(self._views(layer, reading).values, block_table, tokens)
        return values.float() * reading.scales.value

    def keep_queries(self, rows: PagedRows) -> KeptQueries | None:
        """See `TracedModel`; None where there are too many rows, or no memory could be had."""
        if self._scratch is None:
            return None
        quantized = quantizes_queries(self.layers[0])
        dtype = current_platform.fp8_dtype() if quantized else self._dtype
        sizes = self.shape.num_layers, self._head_dim, dtype
        products = self._head_dim * rows.num_heads * rows.logits
        with_lse = products >= WORTH_KEEPING_LSE and self.tells_lse
        return KeptQueries.within(self._scratch, rows, *sizes, with_lse=with_lse)

    def plan_rows(self, segments: Sequence[RowSegment]) -> PagedRows:
        """See `TracedModel`."""
        heads, groups = self.shape.num_heads, self.shape.num_kv_heads
        return PagedRows.build(segments, heads, groups, self.device, self._kept_rows)

    def take_scratch(self, activation_bytes: int) -> None:
        """See `TracedModel`; queries of `KEPT_ROWS` rows, or as many as there is memory for.

        With latent attention it is the room for keys and values of contexts of any length.
        """
        super().take_scratch(activation_bytes)
        if self._room is not None:
            most = min(ROOM_BYTES, device_memory_limit(self.device, activation_bytes) // 4)
            size = self._room.bytes_for(self._longest, most)
            try:
                self._room.take(size)
            except torch.OutOfMemoryError as error:
                logger.warning("Memory for %d bytes is taken for each trace: %s", size, error)
            return
        row = KeptQueries.row_bytes(
            self.shape.num_layers,
            self.shape.num_heads,
            self._head_dim,
            self._dtype,
        )
        most = min(KEPT_BYTES, device_memory_limit(self.device, activation_bytes) // 4)
        rows = min(KEPT_ROWS, most // row // 16 * 16)
        try:
            with torch.inference_mode(False):  # It is written to with and without.
                self._scratch = torch.empty(rows * row, dtype=torch.uint8, device=self.device)
            self._kept_rows = rows
        except torch.OutOfMemoryError as error:
            logger.warning("Every layer of a trace is computed by itself: %s", error)

    def replace_by_proximities(
        self,
        traces: Sequence[ProximityTrace],
        block_tables: Sequence[Sequence[Tensor]],
        adapter: int | None,
    ) -> None:
        """See `TracedModel`: one call per KV cache group for layers whose ``W_O`` lies there.

        Those whose matrix has to be made, because of quantised weights, of an adapter or of
        a norm behind the block, have a call each, and the matrix while it lasts. So have those of
        latent attention, and the values.
        """
        alone = [
            layer.quantization is not None
            or layer.block_norm is not None
            or (adapter is not None and layer.adapters is not None)
            for layer in self.layers
        ]
        groups = self.cache_groups
        one_call = len(groups.numbers) == 1 and not any(alone) and self._room is None
        with nullcontext() if one_call else touching_sums():
            for place in range(len(groups.numbers)):
                own = [
                    trace
                    if trace.block_table is tables[place]
                    else dataclasses.replace(trace, block_table=tables[place])
                    for trace, tables in zip(traces, block_tables, strict=True)
                ]
                numbers = groups.layers(place)
                together = [index for index in numbers if not alone[index]]
                parts = [together] if together else []
                parts += [[index] for index in numbers if alone[index]]
                if self._room is not None:
                    for index in numbers:
                        weight, _ = self.output_projection(index, adapter)
                        layer = self.layers[index]
                        self._room.replace_by_proximities(layer, index, weight, own)
                    continue
                for part in parts:
                    # Methods of vLLM's parameters are called through Python otherwise.
                    with torch._C.DisableTorchFunctionSubclass():
                        layers = [self._proximity_layer(index, adapter) for index in part]
                    replace_by_proximities(layers, own)

    def accumulator_limit_bytes(
        self, max_accumulator_mib: int | None, activation_bytes: int = 0
    ) -> int:
        """See `TracedModel`: never more than `device_memory_limit`, which is the default."""
        limit = device_memory_limit(self.device, activation_bytes)
        if max_accumulator_mib is None:
            return limit
        if limit < max_accumulator_mib << 20:
            logger.warning(
                "max_accumulator_mib is %s, but %s has room for %s MiB of accumulators",
                max_accumulator_mib,
                self.device,
                limit >> 20,
            )
        return min(limit, max_accumulator_mib << 20)

    def kernel_views(self, layer: int) -> KeyValueViews:
        """Keys and values of a layer as kernels get them."""
        if self._room is not None:
            return self._room.views()
        return self._views(layer, self._reading(layer))

    def _reading(self, layer: int) -> _Reading:
        """Read when first needed, and again when what it follows from, above all scales, changes.

        Holds no tensor, so that weights and caches that vLLM gives up are given up.
        """
        traced = self.layers[layer]
        attention: Any = traced.attention
        reading = self._readings.get(layer)
        source = None
        if self._room is None:
            # What is read of every layer of a step: attributes, and no method but of the cache.
            cache, impl = attention.kv_cache, attention.impl
            source = (
                self.fingerprint.layout,
                cache.shape,
                cache.dtype,
                attention._q_scale_float,
                attention._k_scale_float,
                attention._v_scale_float,
                impl.scale,
                impl.sliding_window,
                impl.logits_soft_cap,
                gpu_attention_form,
            )
            if reading is not None and reading.source == source:
                return reading
        scales = cache_scales(attention)
        if reading is None or reading.scales != scales:
            if self._room is not None:
                check_gpu_latents(traced, self._dtype)
            else:
                check_gpu_layer(traced, self._flashinfer_quantizes)
        form = None
        if self._room is None and impl.alibi_slopes is None and impl.sinks is None:
            form = gpu_attention_form(traced, scales)
        reading = _Reading(scales, quantized_dtype(attention), source, form)
        self._readings[layer] = reading
        return reading

    def _latent_room(self) -> LatentRoom | None:
        """Where keys and values of latent attention are made; None for a model without."""
        latents = {isinstance(layer.attention, MLAAttention) for layer in self.layers}
        if len(latents) > 1:
            raise UnsupportedModelError(
                "traces are not supported with latent attention in some of the layers"
            )
        return LatentRoom(self.layers[0].heads, self._dtype, self.device) if latents.pop() else None

    def _keys(self, layer: int) -> LayerKeys:
        reading = self._reading(layer)
        form = reading.form or gpu_attention_form(self.layers[layer], reading.scales)
        return LayerKeys(layer, self._views(layer, reading).keys, form)

    def _views(self, layer: int, reading: _Reading) -> KeyValueViews:
        return key_value_views(self.layers[layer].attention, reading.dtype)

    def _proximity_layer(self, layer: int, adapter: int | None) -> ProximityLayer:
        reading = self._reading(layer)
        values = self._views(layer, reading).values
        weight, _ = self.output_projection(layer, adapter)
        scale = reading.scales.value * self.layers[layer].multiplier
        return ProximityLayer(layer, values, weight, scale)

    def _check_projection(self, layer: TracedLayer) -> None:
        heads = layer.heads
        # A cached value may be longer than what is projected, and the kernels read whole ones.
        cached = heads.values if self._room is not None else layer.attention.head_size
        width = heads.queries * cached
        if layer.quantization is not None:
            projection = layer.out_proj
            sizes = projection.output_size_per_partition, projection.input_size_per_partition
            if sizes != (self.shape.hidden_size, width):
                raise UnsupportedModelError(
                    f"traces are not supported with a quantized output projection of {sizes} "
                    f"({layer.name})"
                )
            return
        weight = layer.out_proj.weight
        if (
            tuple(weight.shape) != (self.shape.hidden_size, width)
            or weight.dtype not in _FLOATS
            or weight.device.type != self.device.type
        ):
            raise UnsupportedModelError(
                f"traces are not supported with an output projection of {weight.dtype} "
                f"{tuple(weight.shape)} on {weight.device} ({layer.name})"
            )


@dataclass(frozen=True, slots=True)
class _Reading:
    """How a layer's numbers are to be read.

    Attributes:
        scales: All scales of its cache.
        dtype: What a quantised cache's bytes are; None if it is not quantised.
        source: What all of it follows from, the function that makes the form included; None where
            it has to be read each time.
        form: How it forms its weights, where that takes no tensor of the layer.
    """

    scales: CacheScales
    dtype: torch.dtype | None
    source: tuple[Any, ...] | None = None
    form: AttentionForm | None = None


def gpu_attention_form(layer: TracedLayer, scales: CacheScales) -> AttentionForm:
    """How a layer on a recorded CUDA backend, with a cache of given scales, forms its weights.

    Whatever changes an attention weight is in the form, or `check_gpu_layer` refuses the layer. The
    scales that make numbers out of a quantised K cache and of quantised queries are part of the
    factor on the dot products.
    """
    attention: Any = layer.attention
    if isinstance(attention, MLAAttention):
        return latent_form(layer)
    impl = attention.impl
    query_scale = scales.query if attention.query_quant is not None else 1.0
    left, _ = impl.sliding_window

    def on_device(numbers: Tensor | None) -> Tensor | None:
        if numbers is None:
            return None
        return numbers.detach().to(attention.kv_cache.device, torch.float32)

    return AttentionForm(
        scale=float(impl.scale) * scales.key * query_scale,
        sliding_window=left + 1 if left >= 0 else None,
        chunk_size=layer.chunk_size,
        soft_cap=float(impl.logits_soft_cap or 0.0),
        alibi_slopes=on_device(impl.alibi_slopes),
        sinks=on_device(impl.sinks),
    )


def _tells_lse(layer: TracedLayer) -> bool:
    """Whether the patch of FlashAttention may tell a layer's log-sum-exp."""
    attention: Any = layer.attention
    if isinstance(attention, MLAAttention):
        return False
    version = getattr(attention.impl, "vllm_flash_attn_version", None)
    return attention.attn_backend.get_name() == "FLASH_ATTN" and version in TELLING_VERSIONS


def quantizes_queries(layer: TracedLayer) -> bool:
    """Whether a layer's kernel gets its queries in eight bits; latent attention's never does."""
    return getattr(layer.attention, "query_quant", None) is not None


def check_gpu_config(config: VllmConfig) -> None:
    """Refuses engine configurations that only matter on a GPU.

    Raises:
        UnsupportedModelError: Naming the feature in the way.
    """
    offload = config.offload_config
    refusals = {
        "R-SWA attention": config.model_config.rswa_window is not None,
        "attention to later image tokens": bool(config.model_config.is_mm_prefix_lm),
        "non-causal attention": bool(config.attention_config.use_non_causal),
        "weights offloaded to the host": (
            offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0
        ),
        "KV caches on the host (HiSparse)": config.attention_config.hisparse_config is not None,
    }
    for feature, present in refusals.items():
        if present:
            raise UnsupportedModelError(f"traces are not supported with {feature}")


def check_gpu_layer(layer: TracedLayer, flashinfer_quantizes: bool) -> None:
    """Refuses attention layers whose weights the recorder would not reproduce.

    Args:
        layer: The layer.
        flashinfer_quantizes: Whether FlashInfer quantises queries by itself where the cache is fp8.

    Raises:
        UnsupportedModelError: Naming the feature in the way.
    """
    attention: Any = layer.attention
    impl: Any = attention.impl
    backend = attention.attn_backend
    # A backend derived from a recording one may build other block tables; only the classes that
    # were registered are known, and what vLLM derives of them for chunks.
    if not isinstance(attention.impl, RecordingAttention) or backend.get_impl_cls() is not type(
        impl
    ):
        raise UnsupportedModelError(
            f"traces are not supported on the {backend.get_name()} backend ({layer.name})"
        )
    if "get_impl_cls" not in vars(_without_chunks(layer)):
        raise UnsupportedModelError(
            f"traces are not supported on the {backend.__name__} backend ({layer.name})"
        )
    flashinfer = backend.get_name() == "FLASHINFER"
    quantized = quantized_dtype(attention) is not None
    raw_queries = quantized and attention.query_quant is None
    left, right = impl.sliding_window
    refusals = {
        "ALiBi of square roots": bool(getattr(impl, "use_alibi_sqrt", False)),
        "ALiBi on the FLASHINFER backend": flashinfer and impl.alibi_slopes is not None,
        "ALiBi and attention sinks": impl.alibi_slopes is not None and impl.sinks is not None,
        "soft-capped logits on the FLASHINFER backend": flashinfer and bool(impl.logits_soft_cap),
        "chunks that see earlier ones": getattr(impl, "chunk_lookback", -1) > -1,
        "attention to later image tokens": bool(attention.use_mm_prefix),
        f"a sliding window of {impl.sliding_window}": right > 0 or (left < 0) != (right < 0),
        "an fp8 KV cache for which FlashInfer quantizes the queries": (
            flashinfer and raw_queries and flashinfer_quantizes
        ),
        # Its kernels then apply the scales of quantised queries to queries that are not.
        "fp8 scales on the FLASHINFER backend without quantized queries": (
            flashinfer and raw_queries and cache_scales(attention) != CacheScales()
        ),
    }
    for feature, present in refusals.items():
        if present:
            raise UnsupportedModelError(f"traces are not supported with {feature} ({layer.name})")


def _without_chunks(layer: TracedLayer) -> Any:
    """The backend that a layer's chunks are computed on; the layer's own if it has none."""
    backend = layer.attention.attn_backend
    if layer.chunk_size is None:
        return backend
    stock = backend.__base__
    derived = create_chunked_local_attention_backend(stock, layer.chunk_size)
    return stock if derived is backend else backend


def flashinfer_quantizes_queries(config: VllmConfig) -> bool:
    """Whether FlashInfer turns queries into fp8 inside its ``forward`` where the cache is fp8.

    The rule of ``FlashInferMetadataBuilder.get_q_data_type`` in vLLM 0.32.0.
    """
    if config.attention_config.disable_flashinfer_q_quantization:
        return False
    return bool(
        current_platform.is_device_capability(90)
        or current_platform.is_device_capability_family(100)
    )


def device_memory_limit(device: torch.device, activation_bytes: int = 0) -> int:
    """What accumulators may take of a device: half of what is free beside vLLM's activations.

    Must be asked when vLLM has taken its share: weights, KV cache and CUDA graphs. The memory that
    it found to need for activations it frees again, so it looks free between steps. The other half
    is for the recorder's temporaries, of which the proximity pass takes 128 MiB at most (20 MiB for
    one trace of an 8B model), and for activations that vLLM did not foresee.

    Args:
        device: Where accumulators live.
        activation_bytes: What vLLM keeps free for its activations.
    """
    if device.type != "cuda":
        return part_of_memory()
    free, _ = torch.cuda.mem_get_info(device)
    # Freed tensors that PyTorch keeps for the next ones; those of CUDA graphs are not for others.
    kept = sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()
        if segment["device"] == device.index and tuple(segment["segment_pool_id"]) == (0, 0)
    )
    return max(0, free - max(0, activation_bytes - kept)) // _PART_OF_FREE_MEMORY
