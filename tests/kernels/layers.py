"""Layers for the proximity kernels, and their results in float64 from the definition."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tests.kernels.paged import DEVICE, paged_cache
from vllm_flashtrace.kernels import PagedValues, ProximityInputs


@dataclass(frozen=True)
class Layer:
    """The tensors of `ProximityInputs`, and the values in the cache, float64 ``[N, G, d]``."""

    column_sums: Tensor
    value_cache: Tensor
    block_table: Tensor
    weight: Tensor
    column_norms: Tensor
    stream: Tensor
    value_scale: float
    values: Tensor

    def tensors(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "values"}

    def inputs(self) -> ProximityInputs:
        return inputs_of(**self.tensors())

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


def inputs_of(
    *, value_cache: Tensor, block_table: Tensor, value_scale: float, **others: Tensor
) -> ProximityInputs:
    return ProximityInputs(values=PagedValues(value_cache, block_table, value_scale), **others)


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
    norms = matrix.float().unflatten(1, (heads, dim)).norm(dim=2).T.contiguous()
    layer = Layer(
        column_sums=column_sums.to(DEVICE),
        value_cache=cache,
        block_table=block_table,
        weight=matrix,
        column_norms=norms,
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
