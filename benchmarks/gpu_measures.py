"""Times the kernels of one layer, and PyTorch's attention beside them.

Invariant: a kernel is timed as the product calls it: rows are prepared once, as for a step of many
layers, and what the first layer of a step pays for that is a row of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu_forms import Forms, forms_on
from benchmarks.gpu_shapes import Layer, ProximityInputs, Shape
from benchmarks.gpu_timing import Cost, Measured, Stopwatch, peak_of
from vllm_flashtrace.kernels import PagedRows

FRACTIONS = (0.9, 1.0)
_LARGEST_LOGITS_BYTES = 8 << 30

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Bench:
    """What all measurements share."""

    stopwatch: Stopwatch
    forms: Forms

    @classmethod
    def on(cls, device: torch.device, repeats: int) -> Bench:
        """For a device."""
        return cls(Stopwatch(device, repeats), forms_on(device))

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
                        yield self.row_sums(layer)
                if layer is not None:
                    yield from self.proximity(layer)

    def attention(self, layer: Layer) -> Iterator[Row]:
        """The passes over the attention matrix, and PyTorch's forward pass on the same shape."""
        arguments = (layer.query, layer.keys, layer.rows, layer.form)
        first = self.forms.first_pass(*arguments)

        def first_of_step() -> None:
            rows = PagedRows.build(
                layer.rows.segments, layer.shape.heads, layer.shape.groups, layer.rows.device
            )
            self.forms.column_sums(layer.query, layer.keys, rows, layer.form, 0)

        calls = {
            "paged_lse": (1, lambda: self.forms.lse(*arguments)),
            "first pass": (1, lambda: self.forms.first_pass(*arguments)),
            "second pass": (1, lambda: self.forms.second_pass(*arguments, 0, first)),
            "paged_column_sums": (2, lambda: self.forms.column_sums(*arguments, 0)),
            "paged_column_sums, first layer": (2, first_of_step),
        }
        theirs, backend = self._torch_attention(layer)
        if theirs is not None:
            cost = layer.whole_attention_cost()
            yield self._row("PyTorch attention", layer, theirs, cost, backend=backend)
        for name, (passes, call) in calls.items():
            measured = self.stopwatch.measure(call)
            ratio = theirs and measured.ms / theirs.ms
            cost = layer.attention_cost(passes)
            yield self._row(name, layer, measured, cost, ratio_to_torch=ratio)

    def row_sums(self, layer: Layer) -> Row:
        """One of the two sums of a layer."""
        residual = torch.randn(layer.count, layer.shape.hidden, device=layer.query.device)
        residual = residual.bfloat16()
        measured = self.stopwatch.measure(
            lambda: self.forms.row_sums(residual, layer.rows, 0, "stream")
        )
        return self._row("add_row_sums", layer, measured, layer.row_sums_cost())

    def proximity(self, layer: Layer) -> Iterator[Row]:
        """At each exact fraction; the rows do not matter."""
        inputs = ProximityInputs.draw(layer)
        for fraction in FRACTIONS:
            measured = self.stopwatch.measure(proximity_call(self.forms, layer, inputs, fraction))
            name = f"proximity, exact fraction {fraction}"
            row = self._row(name, layer, measured, inputs.cost(layer), far_share=inputs.far_share)
            yield {**row, "rows": None}

    def _row(self, name: str, layer: Layer, measured: Measured, cost: Cost, **more: Any) -> Row:
        return {
            "operation": name,
            "layer": layer.shape.name,
            "context": layer.context,
            "rows": layer.count,
            **measured.against(cost, peak_of(self.stopwatch.device)),
            **more,
        }

    def _torch_attention(self, layer: Layer) -> tuple[Measured | None, str]:
        """Causal attention from the lower right, keys and values contiguous and not paged."""
        table = layer.rows.segments[0].block_table.long()
        query = layer.query.transpose(0, 1)[None].contiguous()
        keys, values = (
            t[table].transpose(0, 1).flatten(1, 2)[None, :, : layer.context].contiguous()
            for t in (layer.keys, layer.values)
        )
        backend = sdpa_backend(query, keys, values)
        logits_bytes = 2 * layer.shape.heads * layer.count * layer.context
        if backend == "math" and logits_bytes > _LARGEST_LOGITS_BYTES:
            return None, backend
        bias = causal_lower_right(layer.count, layer.context)
        grouped = layer.shape.heads != layer.shape.groups
        measured = self.stopwatch.measure(
            lambda: scaled_dot_product_attention(
                query, keys, values, attn_mask=bias, scale=layer.form.scale, enable_gqa=grouped
            )
        )
        return measured, backend


def sdpa_backend(query: Tensor, keys: Tensor, values: Tensor) -> str:
    """Which of PyTorch's kernels computes attention that is causal from the lower right.

    The choice that `torch.nn.attention.bias.CausalBias` makes where rows and keys differ in number.
    """
    from torch.backends.cuda import (
        SDPAParams,
        can_use_efficient_attention,
        can_use_flash_attention,
    )

    if not query.is_cuda:
        return "math"
    grouped = query.shape[1] != keys.shape[1]
    parameters = SDPAParams(query, keys, values, None, 0.0, False, grouped)
    if can_use_flash_attention(parameters):
        return "flash"
    return "efficient" if can_use_efficient_attention(parameters) else "math"


def proximity_call(forms: Forms, layer: Layer, inputs: ProximityInputs, fraction: float) -> Any:
    """A call of `kernels.proximity` without arguments."""
    return lambda: forms.proximity(
        inputs.column_sums,
        layer.values,
        layer.rows.segments[0].block_table,
        inputs.weight,
        inputs.norms,
        inputs.stream,
        exact_fraction=fraction,
    )
