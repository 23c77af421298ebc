"""L1 proximity of every token to the residual stream, read from the paged V cache.

The maths is that of `core.proximity`; here it meets the cache. CUDA tensors are read in place by
Triton kernels (`triton_proximity`), others are gathered and computed by torch; both give the same
numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_flashtrace.core.proximity import token_proximity

_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_VALUE_DTYPES = (*_WEIGHT_DTYPES, torch.float8_e4m3fn, torch.float8_e5m2)
_LARGEST_HEAD = 256


@dataclass(frozen=True, slots=True, eq=False)
class PagedValues:
    """One request's value vectors of one layer: what is cached, times `scale`.

    Attributes:
        cache: ``[num_blocks, G, block_size, d]``, any strides, float32, float16, bfloat16 or
            eight-bit floats (e4m3fn, e5m2); head ``h`` reads key/value head ``h // (H // G)``.
        block_table: int32 ``[>= ceil(N / block_size)]``: token ``j`` lies in slot
            ``j % block_size`` of block ``block_table[j // block_size]``.
        scale: Positive factor.
    """

    cache: Tensor
    block_table: Tensor
    scale: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class ProximityInputs:
    """What one layer's proximities are computed from, for one request of N tokens.

    Attributes:
        column_sums: float32 ``[H, N]``, ``c``, non-negative.
        values: ``v``.
        weight: ``W_O``, ``[D, H*d]`` as a linear layer keeps it, any strides, float32, float16 or
            bfloat16.
        column_norms: float32 ``[H, D]``: Euclidean norms of ``weight[i, h*d:(h+1)*d]``.
        stream: float32 ``[D]``, ``x``, in the weighting of `column_sums`.

    Raises:
        ValueError: The shapes or types do not fit together, or the values' scale is not a positive
            number.
    """

    column_sums: Tensor
    values: PagedValues
    weight: Tensor
    column_norms: Tensor
    stream: Tensor

    def __post_init__(self) -> None:
        cache, block_table = self.values.cache, self.values.block_table
        tensors = {
            "column_sums": self.column_sums,
            "value_cache": cache,
            "block_table": block_table,
            "weight": self.weight,
            "column_norms": self.column_norms,
            "stream": self.stream,
        }
        listing = ", ".join(f"{name} {t.dtype} {tuple(t.shape)}" for name, t in tensors.items())
        if [t.dim() for t in tensors.values()] != [2, 4, 1, 2, 2, 1]:
            raise ValueError(f"the layer's tensors do not have the dimensions expected: {listing}")
        (heads, tokens), (_, groups, block_size, dim) = self.column_sums.shape, cache.shape
        hidden = len(self.stream)
        fitting = (
            min(heads, groups, block_size, hidden) > 0
            and heads % groups == 0
            and 0 < dim <= _LARGEST_HEAD
            and block_table.numel() * block_size >= tokens
            and self.weight.shape == (hidden, heads * dim)
            and self.column_norms.shape == (heads, hidden)
        )
        floats = (self.column_sums, self.column_norms, self.stream)
        typed = (
            all(tensor.dtype == torch.float32 for tensor in floats)
            and block_table.dtype == torch.int32
            and self.weight.dtype in _WEIGHT_DTYPES
            and cache.dtype in _VALUE_DTYPES
        )
        if not fitting or not typed:
            raise ValueError(f"the layer's tensors do not fit together: {listing}")
        if not 0 < self.values.scale < math.inf:
            raise ValueError(f"value_scale must be positive, got {self.values.scale}")


def proximity(inputs: ProximityInputs, *, exact_fraction: float = 1.0) -> Tensor:
    """Computes each token's proximity to the residual stream, summed over heads.

    ``sum_h max(0, |x|_1 - |x - c_h[j] v_j W_O^h|_1)``, see `core.token_proximity`. Never waits for
    a GPU.

    Args:
        inputs: The layer's tensors, all on one device.
        exact_fraction: Below 1.0, only the pairs with the largest bounds, which together hold this
            share of the bounds' total, are exact; the others come out between their proximity and
            their bound.

    Returns:
        float32 ``[N]``. A token is NaN if one of its values or column sums is not finite or a
        column sum is negative; every token is if the stream or a norm is not finite.

    Raises:
        ValueError: `exact_fraction` is not within 0..1.
    """
    if not 0 <= exact_fraction <= 1:
        raise ValueError(f"exact_fraction must be within 0..1, got {exact_fraction}")
    if inputs.column_sums.is_cuda:
        from vllm_flashtrace.kernels.triton_proximity import triton_proximity

        return triton_proximity(inputs, exact_fraction)
    return torch_proximity(inputs, exact_fraction)


def torch_proximity(inputs: ProximityInputs, exact_fraction: float = 1.0) -> Tensor:
    """Torch form of `proximity`."""
    column_sums, stream, norms = inputs.column_sums, inputs.stream, inputs.column_norms
    heads, tokens = column_sums.shape
    if tokens == 0 or not bool((stream.sum() + norms.sum()).isfinite()):
        return column_sums.new_full((tokens,), torch.nan)
    values = gather_tokens(inputs.values.cache, inputs.values.block_table, tokens)
    by_head = inputs.weight.unflatten(1, (heads, -1)).permute(1, 2, 0)  # [H, d, D]
    if inputs.values.scale != 1:
        column_sums = column_sums * inputs.values.scale

    def core(column_sums: Tensor, values: Tensor) -> Tensor:
        return token_proximity(
            column_sums,
            values,
            by_head,
            stream,
            exact_fraction=exact_fraction,
            column_norms=norms,
        )

    lowest, highest = column_sums.aminmax()
    if bool((lowest >= 0) & (highest < torch.inf)):
        try:
            return core(column_sums, values)
        except ValueError:
            usable = _usable(column_sums, values)
            if bool(usable.all()):
                raise
    else:
        usable = _usable(column_sums, values)
    column_sums = column_sums.masked_fill(~usable, 0)
    values = values.masked_fill(~usable[:, None, None], 0)
    return core(column_sums, values).masked_fill_(~usable, torch.nan)


def gather_tokens(cache: Tensor, block_table: Tensor, tokens: int) -> Tensor:
    """The first `tokens` vectors that a block table names.

    Args:
        cache: ``[num_blocks, G, block_size, d]``, any strides; eight-bit floats come out as
            float32.
        block_table: int32 ``[>= ceil(tokens / block_size)]``.
        tokens: Number of vectors.

    Returns:
        ``[tokens, G, d]``, in memory ``[G, tokens, d]``; a view where one block holds them all.
    """
    needed = -(-tokens // cache.shape[2])
    if needed == 1:
        vectors = cache[int(block_table[0]), :, :tokens]
    else:
        raw = cache.view(torch.uint8) if cache.itemsize == 1 else cache
        blocks = raw.transpose(0, 1)[:, block_table[:needed].long()]  # [G, blocks, block_size, d]
        vectors = blocks.contiguous().view(cache.dtype).flatten(1, 2)[:, :tokens]
    if cache.itemsize == 1:
        vectors = vectors.float()
    return vectors.transpose(0, 1)


def _usable(column_sums: Tensor, values: Tensor) -> Tensor:
    """Tokens whose values and column sums are numbers, bool ``[N]``."""
    lengths = torch.linalg.vector_norm(values.float(), dim=2)
    fine = (column_sums >= 0) & (column_sums < torch.inf)
    return lengths.isfinite().all(dim=1) & fine.all(dim=0)
