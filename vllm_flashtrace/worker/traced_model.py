"""The loaded model of a worker as traces need it: its layers, their weights, reads of its KV cache.

`TracedModel` holds what does not depend on the device. The subclasses, `CPUTracedModel` and
`GPUTracedModel`, say how attention forms its weights there and how the paged cache is read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank

from vllm_flashtrace.base.errors import TraceError, UnsupportedModelError
from vllm_flashtrace.kernels import (
    AttentionForm,
    KeptQueries,
    PagedRows,
    ProximityTrace,
    RowSegment,
    column_norms,
    inverse_rms,
)
from vllm_flashtrace.trace.budget import ModelShape, part_of_memory
from vllm_flashtrace.worker.cache_groups import CacheGroups
from vllm_flashtrace.worker.clock import Clock, CudaClock, HostClock
from vllm_flashtrace.worker.config_checks import check_config
from vllm_flashtrace.worker.fingerprint import WeightsFingerprint
from vllm_flashtrace.worker.kept_rows import KeptRows
from vllm_flashtrace.worker.layers import find_layers, model_part, other_layers
from vllm_flashtrace.worker.output_projections import (
    added_weight,
    base_projection,
    output_projection,
    packed_kernel,
)
from vllm_flashtrace.worker.quantized import dequantize
from vllm_flashtrace.worker.step_rows import StepRows
from vllm_flashtrace.worker.taps import has_taps


class Projection(NamedTuple):
    """``W_O`` of a layer.

    Attributes:
        weight: ``[D, H * d]``.
        column_norms: See `kernels.column_norms`; None where they are not kept.
    """

    weight: Tensor
    column_norms: Tensor | None = None


class TracedModel(ABC):
    """The part of a vLLM model that is on this worker.

    Heads are those of this tensor-parallel rank, layers those of this pipeline stage, counted from
    the first on this worker.

    Attributes:
        batched: Whether one call records the target rows of all traces of a step, or each trace has
            its own, so that a fault stays with it.
        measures_mass: Whether it measures what column sums must add up to, see `RowSegment.mass`.
        layers: Its decoder layers, in order.
        device: Where accumulators live.
        part: What of the whole model is on this worker.
        shape: Sizes of that part.
        first_head: Index among the model's query heads of the first on this worker.
        clock: Times the device's work.
        normed: Whether what attention blocks add to the stream is normed, see `BlockNorm`.
        gate_width: See `OutputGate`; 0 where there are no gates.
        fingerprint: Tells whether the model's weights have changed.
        cache_groups: Where the KV cache keeps the layers; set by the runner where not in one group.
        slot_of: Tells where a LoRA adapter's weights are, by its id; set by the runner.
        head_weights: float32 ``[L, H]`` of these layers and heads, or None; see `core.head_scores`.
    """

    batched: ClassVar[bool]
    measures_mass: ClassVar[bool] = False

    def __init__(self, model: nn.Module, config: VllmConfig, device: torch.device) -> None:
        """Inspects the model.

        Raises:
            UnsupportedModelError: It cannot be traced exactly; the message names what is in the
                way.
        """
        check_config(config)
        self.layers = find_layers(model, config)
        if not has_taps(model):
            raise UnsupportedModelError("the model was loaded without taps")
        heads, gate = self.layers[0].heads, self.layers[0].gate
        self.gate_width = 0 if gate is None else gate.width
        self.device = device
        self.part = model_part(model, config, self.layers)
        self.shape = ModelShape(
            num_layers=len(self.layers),
            num_heads=heads.queries,
            num_kv_heads=heads.groups,
            hidden_size=config.model_config.get_hidden_size(),
            sums_per_head=max(1, self.gate_width),
            other_layers=len(other_layers(model, config, self.layers)),
        )
        rank = get_tensor_model_parallel_rank() if self.part.ranks > 1 else 0
        self.first_head = rank * heads.queries
        self.normed = self.layers[0].block_norm is not None
        self.clock: Clock = CudaClock() if device.type == "cuda" else HostClock()
        self.fingerprint = WeightsFingerprint(model, device)
        self._head_dim, self._dtype = heads.keys, config.model_config.dtype
        self.slot_of: Callable[[int], int] | None = None
        self.head_weights: Tensor | None = None
        names = frozenset(layer.name for layer in self.layers)
        self.cache_groups = CacheGroups((0,), (0,) * len(self.layers), names)
        self._indices = {layer.name: index for index, layer in enumerate(self.layers)}
        self._dequantized: Tensor | None = None
        self._unpacked: dict[int, tuple[Callable[..., Any], Projection]] = {}

    @property
    def scaled(self) -> bool:
        """Whether the weights of rows have factors of their own in each layer."""
        return self.normed or self.gate_width > 0

    def take_head_weights(self, weights: Tensor | None) -> None:
        """Takes its part of the weights of heads.

        Args:
            weights: float32 ``[layers, heads]`` of the whole model, or None.
        """
        if weights is not None:
            own = weights[list(self.part.traced_layers)]
            own = own[:, self.first_head : self.first_head + self.shape.num_heads]
            self.head_weights = own.contiguous().to(self.device)

    @property
    def tells_lse(self) -> bool:
        """Whether its attention kernels may tell the log-sum-exp of queries."""
        return False

    @abstractmethod
    def add_column_sums(
        self,
        layer: int,
        query: Tensor,
        group: StepRows,
        rows: PagedRows,
        scales: Tensor | None,
        lse: Tensor | None = None,
    ) -> None:
        """Adds ``c_h[j] += sum_i w_i s_i alpha^h_ij`` of one layer to the rows' traces.

        Args:
            layer: Layer index.
            query: ``[tokens, H, d]``, queries as `heads_of` gives them.
            group: The target rows.
            rows: The same as they lie among these queries.
            scales: float32 ``[R]``, ``[H, R]`` or ``[H, d, R]``, see `AttentionInputs`.
            lse: float32 ``[H, tokens]``, see `AttentionInputs`; None where `tells_lse` is not.
        """

    def heads_of(self, layer: int, query: Tensor) -> Tensor:
        """Queries as the attention kernel saw them, ``[tokens, H, d]``.

        Raises:
            TraceError: ``recording_failed``: they are not of the type that was expected.
        """
        return query if query.dim() == 3 else query.unflatten(-1, (-1, self._head_dim))

    def row_scales(self, layer: int, rows: PagedRows, output: Tensor, out: Tensor) -> None:
        """What the norm behind a layer's block multiplies rows by, beside its gain.

        Args:
            layer: Layer index.
            rows: The target rows.
            output: ``[tokens, D]``, the block's output.
            out: float32 ``[R]``: gets ``1 / rms`` of each row.
        """
        norm = self.layers[layer].block_norm
        if norm is None:
            raise TraceError("recording_failed", f"the block of layer {layer} has no norm")
        inverse_rms(rows, output, norm.epsilon, out)

    def row_gates(self, layer: int, rows: PagedRows, hidden_states: Tensor) -> Tensor:
        """What target rows' attention output is multiplied by.

        Args:
            layer: Layer index.
            rows: The target rows.
            hidden_states: ``[tokens, D]``, what goes into the layer's block.

        Returns:
            float32 ``[H, R]`` or ``[H, d, R]``.
        """
        gate = self.layers[layer].gate
        if gate is None:
            raise TraceError("recording_failed", f"the block of layer {layer} has no gate")
        return gate.values(hidden_states[rows.places])

    def gain(self, layer: int) -> Tensor | None:
        """What the norm behind a layer's block multiplies coordinates by, float32 ``[D]``."""
        norm = self.layers[layer].block_norm
        return None if norm is None else norm.gain()

    def gains(self) -> Tensor:
        """`gain` of all layers of a model that is `normed`, float32 ``[L, D]``."""
        gains = [self.gain(layer) for layer in range(len(self.layers))]
        return torch.stack([gain for gain in gains if gain is not None])

    @abstractmethod
    def attention_form(self, layer: int) -> AttentionForm:
        """How a layer forms its attention weights."""

    @abstractmethod
    def read_values(self, layer: int, block_tables: Sequence[Tensor], tokens: int) -> Tensor:
        """A request's values, float32 ``[tokens, G, d]``, until the next are read.

        Args:
            layer: Layer index.
            block_tables: See `BatchRow`.
            tokens: How many, from the first on.
        """

    def keep_queries(self, rows: PagedRows) -> KeptQueries | None:
        """Where a step's queries may wait until its end; None where each layer is added at once."""
        return None

    def add_kept_column_sums(self, group: StepRows) -> None:  # noqa: B027 - most models keep none
        """Adds the sums of the group's kept queries; the step's requests must hold their blocks."""

    def row_bytes(self) -> int:
        """What each row takes that a trace keeps for further hops; 0 where none may be kept."""
        size, gates = self._head_dim, self.gate_width
        return KeptRows.row_bytes(self.shape, size, self._dtype, self.normed, gates, self.tells_lse)

    def keep_rows(self, positions: Tensor, queries_alone: bool = False) -> KeptRows:
        """Memory for the rows of one trace at given positions, or of their queries alone."""
        sizes = self.shape, self._head_dim, self._dtype, self.device
        if queries_alone:
            return KeptRows(positions, *sizes, with_lse=self.tells_lse, stream=False)
        return KeptRows(positions, *sizes, self.normed, self.gate_width, self.tells_lse)

    def weigh(self, kept: KeptRows, group: StepRows) -> None:
        """Adds column sums of kept rows, of all layers; the step's requests must hold their blocks.

        Args:
            kept: The rows of one trace.
            group: Which of them, with the weights of a hop, as they lie in ``kept``.
        """
        near = group.rows.adjacent
        where = group.rows.places if near is None else near
        for layer in range(self.shape.num_layers):
            factors = kept.factors_of(layer, where)
            queries, lse = kept.queries[layer], kept.lse_of(layer)
            self.add_column_sums(layer, queries, group, group.rows, factors, lse)

    def weigh_together(self, kept: KeptRows, groups: Sequence[StepRows]) -> None:
        """As `weigh` for several targets, each with sums of its own."""
        for group in groups:
            self.weigh(kept, group)

    @abstractmethod
    def replace_by_proximities(
        self,
        traces: Sequence[ProximityTrace],
        block_tables: Sequence[Sequence[Tensor]],
        adapter: int | None,
    ) -> None:
        """Runs the proximity pass of all layers over this rank's heads.

        Reads the values from the cache, so it must be called, or on a GPU queued, while the
        requests still hold their blocks. Never waits for a GPU.

        Args:
            traces: See `kernels.replace_by_proximities`; one, unless the model is `batched`.
            block_tables: Of each trace, see `BatchRow`.
            adapter: Id of the LoRA adapter that the requests are computed with.

        Raises:
            SumsTouchedError: Something failed when sums may have been replaced.
        """

    def output_projection(self, layer: int, adapter: int | None = None) -> Projection:
        """What leads from a layer's heads to the stream as it is now.

        That is ``W_O`` in the model's dtype; with an adapter, or the gain of a norm behind the
        block, it is another matrix, in float32. One that
        is quantised is good until the next is asked for: all are made in one matrix.
        """
        base, gain = self._base_projection(layer), self.gain(layer)
        added = None
        if adapter is not None:
            added = added_weight(self.layers[layer].adapters, adapter, self.slot_of)
        if added is None and gain is None:
            return base
        # In float32, since an adapter's small changes would be lost in sixteen bits.
        weight = base.weight.float() if added is None else added.add_(base.weight)
        return Projection(weight if gain is None else weight * gain[:, None])

    def adapter_number(self, adapter: int) -> Tensor:
        """A LoRA adapter's `WeightsFingerprint`, to be asked for while it is active.

        Raises:
            TraceError: ``recording_failed``: it is not active.
        """
        if self.slot_of is None:
            raise TraceError("recording_failed", "the adapters of this worker are not known")
        return self.fingerprint.take_adapter(self.slot_of(adapter))

    def plan_rows(self, segments: Sequence[RowSegment]) -> PagedRows:
        """Readies target rows for recording; done once per step and used for every layer."""
        return PagedRows.build(segments, self.shape.num_heads, self.shape.num_kv_heads, self.device)

    def layer_index(self, layer_name: str) -> int | None:
        """Index of an attention layer of this model; None for one of another model."""
        return self._indices.get(layer_name)

    def accumulator_limit_bytes(
        self, max_accumulator_mib: int | None, activation_bytes: int = 0
    ) -> int:
        """What all accumulators together may take.

        Args:
            max_accumulator_mib: The configured limit, or None for the default.
            activation_bytes: What vLLM keeps free of the device's memory for its activations.
        """
        if max_accumulator_mib is not None:
            return max_accumulator_mib << 20
        return part_of_memory()

    def take_scratch(self, activation_bytes: int) -> None:
        """Takes the memory that traces need besides accumulators, so that none is lacking later.

        That is the matrix of `output_projection`, if any is quantised, and what `keep_queries`
        gives out.

        Args:
            activation_bytes: See `accumulator_limit_bytes`, which must be asked after this.
        """
        if any(layer.quantization is not None for layer in self.layers):
            self._matrix()

    def end_step(self) -> None:  # noqa: B027 - most models keep nothing for a step
        """Returns memory that only a step with traces needs."""

    def _base_projection(self, layer: int) -> Projection:
        """``W_O`` without adapters, kept only while it is packed in the kernel it is read from.

        Weights change by many ways, and a projection of old ones would be well-formed and wrong.
        """
        traced = self.layers[layer]
        used, _ = base_projection(getattr(traced.block, traced.projection, None))
        replaced = used is not traced.out_proj
        if replaced:
            raise UnsupportedModelError(
                f"traces are not supported with an output projection that was replaced as a module "
                f"({traced.name})"
            )
        if traced.quantization is not None:
            weight = self._matrix()
            with torch.inference_mode():
                dequantize(traced.out_proj, traced.quantization, weight)
            return Projection(weight)
        kernel = packed_kernel(traced.out_proj)
        if kernel is None:
            return Projection(output_projection(traced.out_proj))
        kept = self._unpacked.get(layer)
        if kept is None or kept[0] is not kernel:
            weight = output_projection(traced.out_proj)
            unpacked = Projection(weight, column_norms(weight, self.shape.num_heads))
            kept = self._unpacked[layer] = kernel, unpacked
        return kept[1]

    def _matrix(self) -> Tensor:
        """Where quantised ``W_O`` are made, one after the other, ``[D, H * d]``.

        Whoever asks for one reads it before the next is made: on a GPU all of it is queued on one
        stream.
        """
        if self._dequantized is None:
            heads = self.layers[0].heads
            size = self.shape.hidden_size, heads.queries * heads.values
            with torch.inference_mode(False):  # It is written to with and without.
                self._dequantized = torch.empty(size, dtype=self._dtype, device=self.device)
        return self._dequantized
