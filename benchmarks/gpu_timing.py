"""Times the kernels of one layer beside PyTorch's attention and what the device could do at best.

A call's time is between CUDA events, the median of several calls, each after a write of more than
the L2 cache; on the CPU, which only a dry run uses, it is the wall-clock time of one call. Rows are
prepared once, as for a step of many layers; what the first layer of a step pays for that is a row
of its own. No kernel's time depends on the drawn keys and values but that of the proximities, whose
column sums are scaled so that a stated share of the pairs of a token and a head needs more than the
eight nearest coordinates. They are computed for `PROXIMITY_LAYERS` layers at once, as for a model,
and their time includes that of putting the column sums back in place.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from vllm_flashtrace import kernels
from vllm_flashtrace.kernels import (
    Accumulators,
    AttentionForm,
    AttentionInputs,
    PagedRows,
    ProximityLayer,
    ProximityTrace,
    RowSegment,
)

FRACTIONS = (0.9, 1.0)
FAR_SHARE = 0.02
"""Share of pairs that needs more than the nearest coordinates; on real text 1 to 3 in a hundred."""

_NEAREST, _BLOCK_SIZE = 8, 16
_LARGEST_LOGITS_BYTES = 8 << 30
_FLUSHED_BYTES = 256 << 20
_WARM_UPS, _HOST_CALLS = 3, 10

Row = dict[str, Any]


class Forms(NamedTuple):
    """The kernels that are checked and timed, under one name each.

    Attributes:
        lse: As `kernels.paged_lse`.
        column_sums: As `kernels.paged_column_sums`: both passes.
        kept_column_sums: As `kernels.add_kept_column_sums`.
        first_pass: What `second_pass` needs of every row and head.
        second_pass: As `column_sums`, with the result of `first_pass` as the last argument.
        row_sums: As `kernels.add_row_sums`.
        proximities: As `kernels.replace_by_proximities`.
    """

    lse: Callable[..., Tensor]
    column_sums: Callable[..., None]
    kept_column_sums: Callable[..., None]
    first_pass: Callable[..., Any]
    second_pass: Callable[..., None]
    row_sums: Callable[..., None]
    proximities: Callable[..., None]


def triton_on(device: torch.device) -> AbstractContextManager[None]:
    """Within it Triton functions take tensors of a device: on the CPU, they are interpreted."""
    if device.type == "cuda":
        return nullcontext()
    from tests.kernels.interpreter import interpreted

    return interpreted()


def forms_on(device: torch.device) -> Forms:
    """On a GPU the product's functions, elsewhere their Triton forms, for the interpreter."""
    from vllm_flashtrace.kernels.triton_column_sums import (
        SecondPass,
        triton_column_sums,
        triton_kept_column_sums,
    )
    from vllm_flashtrace.kernels.triton_lse import FirstPass, Offsets, triton_lse
    from vllm_flashtrace.kernels.triton_operands import LayerBatch
    from vllm_flashtrace.kernels.triton_proximity import triton_proximities
    from vllm_flashtrace.kernels.triton_row_sums import triton_row_sums

    def first_pass(inputs: AttentionInputs) -> Offsets:
        batch = LayerBatch.of_one(inputs, 0)
        first = FirstPass.plan(batch)
        return first.run(batch, first.buffer(batch))

    def second_pass(inputs: AttentionInputs, layer: int, offsets: Offsets) -> None:
        batch = LayerBatch.of_one(inputs, layer)
        second = SecondPass.plan(batch)
        second.run(batch, offsets, second.buffer(batch))

    passes = (first_pass, second_pass)
    if device.type == "cuda":
        sums = (kernels.add_row_sums, kernels.replace_by_proximities)
        columns = (kernels.paged_column_sums, kernels.add_kept_column_sums)
        return Forms(kernels.paged_lse, *columns, *passes, *sums)

    columns = (triton_column_sums, triton_kept_column_sums)
    return Forms(triton_lse, *columns, *passes, triton_row_sums, triton_proximities)


class Peak(NamedTuple):
    """Best rates per second: dense bfloat16 products and memory, from NVIDIA's data sheets."""

    flops: float
    bytes: float


_PEAKS = {
    "NVIDIA H100 80GB HBM3": Peak(989e12, 3.35e12),
    "NVIDIA H200": Peak(989e12, 4.8e12),
}


def peak_of(device: torch.device) -> Peak | None:
    """Best rates of a device, None if it is not one whose rates are known."""
    return _PEAKS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


class Cost(NamedTuple):
    """What a call has to do at least: a multiply-add counts as two flops, memory once."""

    flops: float
    bytes: float


class Stopwatch:
    """Measures calls on one device."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        """Takes the memory that flushes the cache; the median of ``repeats`` calls counts."""
        self.device, self.repeats = device, repeats
        self._on_gpu = device.type == "cuda"
        size = _FLUSHED_BYTES if self._on_gpu else 0
        self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def measure(self, call: Callable[[], object]) -> tuple[float, float]:
        """Milliseconds on the device and until the host may go on; first calls do not count."""
        if not self._on_gpu:  # A dry run, whose times say nothing.
            host_ms = self._host_ms(call)
            return host_ms, host_ms
        for _ in range(_WARM_UPS):
            call()
        self.wait()
        began = time.perf_counter()
        for _ in range(_HOST_CALLS):
            call()
        host_ms = 1e3 * (time.perf_counter() - began) / _HOST_CALLS
        self.wait()
        pairs = []
        for _ in range(self.repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        self.wait()
        return statistics.median(start.elapsed_time(end) for start, end in pairs), host_ms

    def wait(self) -> None:
        """Until the device has done all work."""
        if self._on_gpu:
            torch.cuda.synchronize(self.device)

    def _host_ms(self, call: Callable[[], object]) -> float:
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)


class Shape(NamedTuple):
    """Attention of one layer: query heads H, key/value heads G, head size d, hidden size D."""

    name: str
    heads: int
    groups: int
    head_dim: int
    hidden: int


SHAPES = (
    Shape("8B", 32, 8, 128, 4096),  # Qwen3-8B and Llama-3.1-8B, which are the same here.
    Shape("70B, TP 8", 8, 1, 128, 8192),
)
CONTEXTS = (4096, 16384, 65536)
ROWS = (32, 1024, 8192)
TINY_SHAPES = (Shape("tiny", 4, 2, 16, 48),)
TINY_CONTEXTS, TINY_ROWS = (48,), (4, 32)


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """bfloat16 tensors of one layer whose last tokens are target rows, in blocks in no order.

    Attributes:
        shape: The model.
        context: Tokens N.
        count: Target rows R, the last of the context.
        inputs: The rows' attention, plain causal; keys come first in the cache's last dimension.
        values: ``[blocks, G, block_size, d]``, the rest of it.
    """

    shape: Shape
    context: int
    count: int
    inputs: AttentionInputs
    values: Tensor

    @classmethod
    def draw(cls, shape: Shape, context: int, count: int, device: torch.device) -> Layer:
        """Random keys, values and queries."""
        blocks = -(-context // _BLOCK_SIZE)
        size = (blocks, shape.groups, _BLOCK_SIZE, 2 * shape.head_dim)
        query = torch.randn(count, shape.heads, shape.head_dim, device=device).bfloat16()
        cache = torch.randn(size, device=device, dtype=torch.bfloat16)
        streams = (torch.zeros(1, shape.hidden, device=device) for _ in range(2))
        segment = RowSegment(
            torch.arange(count),
            torch.arange(context - count, context),
            torch.full((count,), 1 / count),
            torch.randperm(blocks).int().to(device),
            Accumulators(torch.zeros(1, shape.heads, context, device=device), *streams),
        )
        rows = PagedRows.build([segment], shape.heads, shape.groups, device)
        keys, values = cache.split(shape.head_dim, dim=3)
        form = AttentionForm(shape.head_dim**-0.5)
        return cls(shape, context, count, AttentionInputs(query, keys, rows, form), values)

    @property
    def table(self) -> Tensor:
        """The block table."""
        return self.inputs.rows.segments[0].block_table

    def attention_cost(self, passes: int) -> Cost:
        """Of so many passes, each a product of queries with all visible keys."""
        shape, count = self.shape, self.count
        pairs = count * (self.context - count) + count * (count + 1) // 2  # visible, exactly
        vectors = count * shape.heads + self.context * shape.groups
        numbers = count * shape.heads + (shape.heads * self.context if passes > 1 else 0)
        flops = passes * 2.0 * shape.head_dim * shape.heads * pairs
        return Cost(flops, passes * 2.0 * vectors * shape.head_dim + 4.0 * numbers)

    def whole_attention_cost(self) -> Cost:
        """Of attention itself: logits and outputs, with queries, keys, values and outputs."""
        vectors = self.count * self.shape.heads + self.context * self.shape.groups
        return Cost(2 * self.attention_cost(1).flops, 2 * 2.0 * vectors * self.shape.head_dim)


PROXIMITY_LAYERS = 4


class Proximities:
    """Inputs of `kernels.replace_by_proximities`: layers of the same values, and one trace.

    Weight and stream are normal; column sums log-normal over tokens (sigma 2), each head scaled so
    that the reach ``c |v|`` of `FAR_SHARE` of its tokens exceeds its ninth nearest coordinate.

    Attributes:
        far_share: Share of the pairs whose reach does.
    """

    def __init__(self, layer: Layer) -> None:
        shape, device = layer.shape, layer.values.device
        width = shape.heads * shape.head_dim
        weight = (torch.randn(shape.hidden, width, device=device) * width**-0.5).bfloat16()
        stream = torch.randn(shape.hidden, device=device)
        lengths = layer.values.float().norm(dim=3)[layer.table.long()].transpose(0, 1).flatten(1)
        lengths = lengths[:, : layer.context].repeat_interleave(shape.heads // shape.groups, 0)
        sums = torch.randn(shape.heads, layer.context, device=device).mul_(2).exp_()
        distances = stream.abs() / kernels.column_norms(weight, shape.heads)
        ninth = distances.kthvalue(_NEAREST + 1, dim=1).values[:, None]
        reach = (sums * lengths).sort(dim=1, descending=True).values
        sums *= ninth / reach[:, int(FAR_SHARE * layer.context), None]
        self.far_share = float((sums * lengths > ninth).float().mean())
        self._sums = sums
        self._layers = [
            ProximityLayer(index, layer.values, weight) for index in range(PROXIMITY_LAYERS)
        ]
        self._accumulators = Accumulators(
            sums.expand(PROXIMITY_LAYERS, -1, -1).clone(),
            torch.zeros(PROXIMITY_LAYERS, shape.hidden, device=device),
            stream.expand(PROXIMITY_LAYERS, -1).clone(),
        )
        self._table = layer.table

    def compute(self, forms: Forms, exact_fraction: float = 1.0) -> Tensor:
        """Of every token in every layer, ``[L, N]``."""
        column_sums = self._accumulators.column_sums
        column_sums.copy_(self._sums)
        results = column_sums.new_empty(2, PROXIMITY_LAYERS, dtype=torch.float64)
        trace = ProximityTrace(self._accumulators, self._table, *results, exact_fraction)
        forms.proximities(self._layers, [trace])
        return column_sums[:, 0]


def proximity_cost(layer: Layer, far_share: float) -> Cost:
    """Of all layers: eight coordinates and the total for every pair, all where they are needed.

    An ``exact_fraction`` below 1 leaves some of these out; its floor is the same.
    """
    shape, pairs = layer.shape, layer.shape.heads * layer.context
    flops = 2.0 * shape.head_dim * pairs * (1 + _NEAREST + shape.hidden * far_share)
    numbers = pairs + layer.context + (shape.heads + 1) * shape.hidden
    halves = (layer.context * shape.groups + shape.hidden * shape.heads) * shape.head_dim
    return Cost(PROXIMITY_LAYERS * flops, PROXIMITY_LAYERS * (2.0 * halves + 4.0 * numbers))


class Bench:
    """Times every operation on one device."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.stopwatch, self.forms = Stopwatch(device, repeats), forms_on(device)

    def time_all(
        self, shapes: Sequence[Shape], contexts: Sequence[int], counts: Sequence[int]
    ) -> Iterator[Row]:
        """Rows of every shape, context and number of target rows that fits the context."""
        for shape in shapes:
            for context in contexts:
                layer = None
                for count in counts:
                    if count <= context:
                        layer = Layer.draw(shape, context, count, self.stopwatch.device)
                        yield from self.attention(layer)
                if layer is not None:
                    yield from self.proximity(layer)

    def attention(self, layer: Layer) -> Iterator[Row]:
        """What is done for rows, beside PyTorch's forward pass on the same shape."""
        inputs, rows, shape = layer.inputs, layer.inputs.rows, layer.shape
        first = self.forms.first_pass(inputs)
        lse = torch.zeros(shape.heads, len(inputs.query), device=rows.device)
        told = replace(inputs, lse=lse)

        def first_of_step() -> None:
            fresh = PagedRows.build(rows.segments, shape.heads, shape.groups, rows.device)
            self.forms.column_sums(replace(inputs, rows=fresh), 0)

        calls: dict[str, tuple[int, Callable[[], object]]] = {
            "paged_lse": (1, lambda: self.forms.lse(inputs)),
            "first pass": (1, lambda: self.forms.first_pass(inputs)),
            "second pass": (1, lambda: self.forms.second_pass(inputs, 0, first)),
            "paged_column_sums": (2, lambda: self.forms.column_sums(inputs, 0)),
            "paged_column_sums, log-sum-exp told": (1, lambda: self.forms.column_sums(told, 0)),
            "paged_column_sums, first layer": (2, first_of_step),
        }
        call, backend = self._torch_attention(layer)
        theirs = None
        if call is not None:
            cost = layer.whole_attention_cost()
            row = self._row("PyTorch attention", layer, call, cost, backend=backend)
            theirs = row["ms"]
            yield row
        for name, (passes, call) in calls.items():
            row = self._row(name, layer, call, layer.attention_cost(passes))
            yield {**row, "ratio_to_torch": theirs and row["ms"] / theirs}
        residual = torch.randn(layer.count, shape.hidden, device=layer.values.device).bfloat16()
        numbers = 4.0 * layer.count * shape.hidden
        call = partial(self.forms.row_sums, rows, 0, residual=residual, stream=residual)
        yield self._row("add_row_sums", layer, call, Cost(numbers, numbers))

    def proximity(self, layer: Layer) -> Iterator[Row]:
        """At each exact fraction; the rows do not matter."""
        inputs = Proximities(layer)
        cost = proximity_cost(layer, inputs.far_share)
        more = {"far_share": inputs.far_share, "layers": PROXIMITY_LAYERS}
        for fraction in FRACTIONS:
            call = partial(inputs.compute, self.forms, fraction)
            name = f"proximity, exact fraction {fraction}"
            yield {**self._row(name, layer, call, cost, **more), "rows": None}

    def _row(
        self, name: str, layer: Layer, call: Callable[[], object], cost: Cost, **more: Any
    ) -> Row:
        """Times, rates reached, and the floor: the longer of products and memory at best rates."""
        ms, host_ms = self.stopwatch.measure(call)
        peak = peak_of(self.stopwatch.device)
        floor = peak and 1e3 * max(cost.flops / peak.flops, cost.bytes / peak.bytes)
        return {
            "operation": name,
            "layer": layer.shape.name,
            "context": layer.context,
            "rows": layer.count,
            "ms": ms,
            "host_ms": host_ms,
            "tflops": cost.flops / ms / 1e9,
            "gbs": cost.bytes / ms / 1e6,
            "floor_ms": floor,
            "ratio_to_floor": floor and ms / floor,
            **more,
        }

    def _torch_attention(self, layer: Layer) -> tuple[Callable[[], object] | None, str]:
        """Causal attention from the lower right, keys and values contiguous and not paged."""
        table = layer.table.long()
        query = layer.inputs.query.transpose(0, 1)[None].contiguous()
        keys, values = (
            t[table].transpose(0, 1).flatten(1, 2)[None, :, : layer.context].contiguous()
            for t in (layer.inputs.key_cache, layer.values)
        )
        backend = sdpa_backend(query, keys, values)
        logits_bytes = 2 * layer.shape.heads * layer.count * layer.context
        if backend == "math" and logits_bytes > _LARGEST_LOGITS_BYTES:
            return None, backend
        call = partial(
            scaled_dot_product_attention,
            query,
            keys,
            values,
            attn_mask=causal_lower_right(layer.count, layer.context),
            scale=layer.inputs.form.scale,
            enable_gqa=layer.shape.heads != layer.shape.groups,
        )
        return call, backend


def sdpa_backend(query: Tensor, keys: Tensor, values: Tensor) -> str:
    """Which of PyTorch's kernels computes attention that is causal from the lower right.

    The choice that `torch.nn.attention.bias.CausalBias` makes where rows and keys differ in number.
    """
    from torch.backends import cuda

    if not query.is_cuda:
        return "math"
    grouped = query.shape[1] != keys.shape[1]
    parameters = cuda.SDPAParams(query, keys, values, None, 0.0, False, grouped)
    if cuda.can_use_flash_attention(parameters):
        return "flash"
    return "efficient" if cuda.can_use_efficient_attention(parameters) else "math"
