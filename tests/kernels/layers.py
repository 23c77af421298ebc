"""Layers for the proximity kernels, and their results in float64 from the definition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.kernels.paged import DEVICE, paged_cache
from vllm_flashtrace.kernels import Accumulators, ProximityLayer, ProximityTrace
from vllm_flashtrace.kernels.paged_proximity import torch_proximities
from vllm_flashtrace.kernels.triton_proximity import triton_proximities

Form = Callable[[Sequence[ProximityLayer], Sequence[ProximityTrace]], None]
FORMS: list[Form] = [torch_proximities, triton_proximities]


@dataclass(frozen=True)
class Layer:
    """One layer of one request, and the values in its cache, float64 ``[N, G, d]``."""

    column_sums: Tensor
    value_cache: Tensor
    block_table: Tensor
    weight: Tensor
    stream: Tensor
    value_scale: float
    values: Tensor

    def layer(self, index: int = 0) -> ProximityLayer:
        return ProximityLayer(index, self.value_cache, self.weight, self.value_scale)

    def proximities(self, form: Form, exact_fraction: float = 1.0) -> Tensor:
        """Of every token, float32 ``[N]``, by one of `FORMS`."""
        trace = trace_of([self], exact_fraction)
        form([self.layer()], [trace])
        return trace.sums.column_sums[0, 0]

    def contributions(self) -> Tensor:
        """``c_h[j] v_j W_O^h``, float64 ``[H, N, D]``."""
        heads = len(self.column_sums)
        by_head = self.weight.double().unflatten(1, (heads, -1))  # [D, H, d]
        values = self.values.repeat_interleave(heads // self.values.shape[1], dim=1)
        weighted = values * self.column_sums.double().T[:, :, None] * self.value_scale
        return torch.einsum("nhd,khd->hnk", weighted, by_head)

    def pairs(self) -> Tensor:
        """The definition for every pair of a head and a token, float64 ``[H, N]``."""
        x = self.stream.double()
        return (x.abs().sum() - (x - self.contributions()).abs().sum(-1)).clamp(min=0)

    def bounds(self) -> Tensor:
        """``max(0, sum_i sign(x_i) z_i)`` of every pair, float64 ``[H, N]``."""
        signs = torch.where(self.stream < 0, -1.0, 1.0).double()
        return (self.contributions() @ signs).clamp(min=0)


def trace_of(layers: Sequence[Layer], exact_fraction: float = 1.0) -> ProximityTrace:
    """A request whose layers are these; their column sums are copied, the residual is random."""
    streams = torch.stack([layer.stream for layer in layers])
    generator = torch.Generator().manual_seed(0)
    residual = torch.randn(streams.shape, generator=generator).to(streams.device)
    column_sums = torch.stack([layer.column_sums for layer in layers])
    totals, of_residual = streams.new_full((2, len(layers)), torch.nan, dtype=torch.float64)
    sums = Accumulators(column_sums, residual, streams)
    return ProximityTrace(sums, layers[0].block_table, totals, of_residual, exact_fraction)


def make_layer(
    *,
    values: torch.dtype = torch.float32,
    weight: torch.dtype = torch.float32,
    dim: int = 64,
    groups: int = 1,
    shared: int = 1,
    block_size: int = 16,
    layout: str = "HND",
    hidden: int = 96,
    tokens: int = 40,
    size: float = 1.0,
    value_scale: float = 1.0,
    seed: int = 0,
) -> Layer:
    """A random layer whose stream leans towards the sum of the contributions.

    Args:
        size: Of the stream against that sum. Where it is small, tokens with large column sums push
            many coordinates past zero; where it is large, few tokens push any.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    heads = groups * shared
    column_sums = torch.rand(heads, tokens, generator=generator) ** 6 * 4
    column_sums[torch.rand(heads, tokens, generator=generator) < 0.1] = 0
    vectors = (normal(tokens, groups, dim) / value_scale).to(values)
    matrix = (normal(hidden, heads * dim) / dim**0.5).to(weight).to(DEVICE)
    cache, block_table = paged_cache(vectors, block_size, layout=layout, seed=seed)
    layer = Layer(
        column_sums=column_sums.to(DEVICE),
        value_cache=cache,
        block_table=block_table,
        weight=matrix,
        stream=torch.zeros(hidden, device=DEVICE),
        value_scale=value_scale,
        values=vectors.double().to(DEVICE),
    )
    total = layer.contributions().sum((0, 1)).float()
    noise = normal(hidden) * torch.rand(hidden, generator=generator) ** 2
    stream = size * (total + noise.to(DEVICE) * total.abs().mean())
    stream[torch.rand(hidden, generator=generator).to(DEVICE) < 0.03] = 0
    return replace(layer, stream=stream)


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """L1 distance against the size of the exact result."""
    distance, whole = (ours.double() - exact).abs().sum(), exact.abs().sum()
    return float(distance / whole.clamp(min=torch.finfo(torch.float64).tiny))
