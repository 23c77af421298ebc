"""L1 proximity of every token to the residual stream, read from the paged V cache.

The maths is that of `core.proximity`; here it meets the cache. CUDA tensors are read in place by
Triton kernels (`triton_proximity`), all layers and traces at once; others are gathered and computed
by torch. Both give the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_flashtrace.core.proximity import (
    gated_token_proximity,
    l1_proximity,
    token_proximity,
    token_shares,
)
from vllm_flashtrace.kernels.target_rows import Accumulators, touching_sums

_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_VALUE_DTYPES = (*_WEIGHT_DTYPES, torch.float8_e4m3fn, torch.float8_e5m2)
_LARGEST_HEAD = 256
_TOKENS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True, eq=False)
class ProximityLayer:
    """What the proximities of one layer need of the model.

    Attributes:
        index: The layer's place in accumulators.
        cache: Value vectors, ``[num_blocks, G, block_size, d]``, any strides, float32, float16,
            bfloat16 or eight-bit floats (e4m3fn, e5m2); head ``h`` reads key/value head
            ``h // (H // G)``.
        weight: ``W_O``, ``[D, H*d]`` as a linear layer keeps it, any strides, float32, float16 or
            bfloat16.
        scale: Positive factor on what is cached.
        column_norms: float32 ``[H, D]``, Euclidean norms of ``weight[i, h*d:(h+1)*d]``, where the
            caller keeps them; the Triton form reads the weight in any case.

    Raises:
        ValueError: The shapes or types do not fit together, or the scale is not a positive number.
    """

    index: int
    cache: Tensor
    weight: Tensor
    scale: float = 1.0
    column_norms: Tensor | None = None

    def __post_init__(self) -> None:
        cache, weight, norms = self.cache, self.weight, self.column_norms
        fitting = (
            (cache.dim(), weight.dim()) == (4, 2)
            and min(cache.shape[1:]) > 0
            and cache.shape[3] <= _LARGEST_HEAD
            and min(weight.shape) > 0
            and weight.shape[1] % (cache.shape[1] * cache.shape[3]) == 0
            and (norms is None or norms.shape == (self.heads, self.hidden))
        )
        typed = (
            cache.dtype in _VALUE_DTYPES
            and weight.dtype in _WEIGHT_DTYPES
            and (norms is None or norms.dtype == torch.float32)
        )
        if not fitting or not typed or self.index < 0:
            raise ValueError(
                "the layer's tensors do not fit together: "
                + _listing(value_cache=cache, weight=weight, column_norms=norms)
            )
        if not 0 < self.scale < math.inf:
            raise ValueError(f"the scale of values must be positive, got {self.scale}")

    @property
    def heads(self) -> int:
        """Query heads, H."""
        return self.weight.shape[1] // self.cache.shape[3]

    @property
    def hidden(self) -> int:
        """Size of the residual stream, D."""
        return self.weight.shape[0]


@dataclass(frozen=True, slots=True, eq=False)
class ProximityTrace:
    """One request's sums over all of its N tokens, and where their proximities go.

    Attributes:
        sums: Column sums ``c`` ``[L, H, N]``, non-negative, which the proximities replace;
            residual ``r`` and stream ``x``, ``[L, D]``, in the same weighting. The last dimension
            of each is contiguous. In torch also ``[L, H * d, N]``, of any sign: column sums for
            each coordinate of a head's values.
        block_table: int32 ``[>= ceil(N / block_size)]``: token ``j`` lies in slot
            ``j % block_size`` of block ``block_table[j // block_size]``.
        totals: float64 ``[L]``, contiguous: gets the proximity of all tokens.
        residual: float64 ``[L]``, contiguous: gets the proximity of ``r``.
        exact_fraction: Below 1.0, only the pairs of a token and a head with the largest bounds,
            which together hold this share of the bounds' total, are exact; the others come out
            between their proximity and their bound.

    Raises:
        ValueError: The shapes or types do not fit together, or `exact_fraction` is not within 0..1.
    """

    sums: Accumulators
    block_table: Tensor
    totals: Tensor
    residual: Tensor
    exact_fraction: float = 1.0

    def __post_init__(self) -> None:
        column_sums, residual, stream = self.sums
        totals, proximities, table = self.totals, self.residual, self.block_table
        sizes, streams = column_sums.shape, residual.shape
        # Without loops, because this is asked of every trace that ends in a step.
        fitting = (
            len(sizes) == 3
            and min(sizes) > 0
            and len(streams) == 2
            and streams == stream.shape
            and streams[1] > 0
            and table.dim() == 1
            and totals.shape == proximities.shape == sizes[:1] == streams[:1]
            and column_sums.stride(-1) == residual.stride(-1) == stream.stride(-1) == 1
            and table.stride(-1) == 1
            and totals.is_contiguous()
            and proximities.is_contiguous()
        )
        typed = (
            column_sums.dtype == residual.dtype == stream.dtype == torch.float32
            and totals.dtype == proximities.dtype == torch.float64
            and table.dtype == torch.int32
        )
        if not fitting or not typed:
            raise ValueError(
                "the trace's tensors do not fit together: "
                + _listing(
                    column_sums=column_sums,
                    residual=residual,
                    stream=stream,
                    block_table=self.block_table,
                    totals=self.totals,
                    residual_proximity=self.residual,
                )
            )
        if not 0 <= self.exact_fraction <= 1:
            raise ValueError(f"exact_fraction must be within 0..1, got {self.exact_fraction}")

    @property
    def tokens(self) -> int:
        """Number of tokens, N."""
        return self.sums.column_sums.shape[2]


def replace_by_proximities(
    layers: Sequence[ProximityLayer], traces: Sequence[ProximityTrace]
) -> None:
    """Computes each token's proximity to the residual stream, summed over heads.

    ``sum_h max(0, |x|_1 - |x - c_h[j] v_j W_O^h|_1)``, see `core.token_proximity`. It takes the
    place of the first head's column sums of every layer and trace; what is in those of other heads
    is not defined afterwards. Never waits for a GPU.

    A token is NaN if one of its values or column sums is not finite or a column sum is negative;
    every token is if the stream or a weight is not finite.

    Args:
        layers: Layers, each at most once.
        traces: Requests, no two of which share accumulators; all tensors on one device.

    Raises:
        ValueError: Layers and traces do not fit together; nothing was changed.
        SumsTouchedError: Something failed when sums may have been replaced.
    """
    if not layers or not traces:
        return
    _check(layers, traces)
    if traces[0].sums.column_sums.is_cuda:
        from vllm_flashtrace.kernels.triton_proximity import triton_proximities

        triton_proximities(layers, traces)
    else:
        torch_proximities(layers, traces)


def torch_proximities(layers: Sequence[ProximityLayer], traces: Sequence[ProximityTrace]) -> None:
    """Torch form of `replace_by_proximities`."""
    with touching_sums():
        for layer in layers:
            for trace in traces:
                column_sums, residual, stream = (sums[layer.index] for sums in trace.sums)
                tokens = _token_proximities(layer, trace, column_sums, stream)
                trace.totals[layer.index] = tokens.sum(dtype=torch.float64)
                trace.residual[layer.index] = l1_proximity(residual, stream)
                column_sums[0] = tokens


def _token_proximities(
    layer: ProximityLayer, trace: ProximityTrace, column_sums: Tensor, stream: Tensor
) -> Tensor:
    """One layer of one trace, float32 ``[N]``."""
    norms = layer.column_norms
    tokens = column_sums.shape[1]
    heads, gated = layer.heads, len(column_sums) > layer.heads
    by_head = layer.weight.unflatten(1, (heads, -1)).permute(1, 2, 0)  # [H, d, D]
    if norms is None:
        norms = column_norms(layer.weight, heads)
    if not bool((stream.sum() + norms.sum()).isfinite()):
        return column_sums.new_full((tokens,), torch.nan)
    values = gather_tokens(layer.cache, trace.block_table, tokens)
    if layer.scale != 1:
        column_sums = column_sums * layer.scale

    def core(column_sums: Tensor, values: Tensor) -> Tensor:
        return (gated_token_proximity if gated else token_proximity)(
            column_sums,
            values,
            by_head,
            stream,
            exact_fraction=trace.exact_fraction,
            column_norms=norms,
        )

    lowest, highest = column_sums.aminmax()
    least = -torch.inf if gated else 0.0
    if bool((lowest >= least) & lowest.isfinite() & highest.isfinite()):
        try:
            return core(column_sums, values)
        except ValueError:
            usable = _usable(column_sums, values, least)
            if bool(usable.all()):
                raise
    else:
        usable = _usable(column_sums, values, least)
    column_sums = column_sums.masked_fill(~usable, 0)
    values = values.masked_fill(~usable[:, None, None], 0)
    return core(column_sums, values).masked_fill_(~usable, torch.nan)


def sum_shares(
    proximities: Tensor, denominators: Tensor, scores: Tensor, *, keep: bool = False
) -> None:
    """Computes each token's share of every layer's proximity, summed over layers.

    Args:
        proximities: float32 ``[L, N]``, rows contiguous; see `core.token_shares`.
        denominators: float64 ``[L]``, likewise.
        scores: float32 ``[>= N]``, contiguous: gets the sums, and zeros behind them.
        keep: Whether the shares of every layer take the place of `proximities`.
    """
    if proximities.is_cuda:
        from vllm_flashtrace.kernels.triton_proximity import triton_sum_shares

        triton_sum_shares(proximities, denominators, scores, keep=keep)
        return
    tokens = proximities.shape[1]
    scores[tokens:] = 0
    for first in range(0, tokens, _TOKENS_AT_ONCE):
        some = slice(first, first + _TOKENS_AT_ONCE)
        block = proximities[:, some]
        shares = token_shares(block.double(), denominators)
        scores[:tokens][some] = shares.sum(0)
        if keep:
            block.copy_(shares)


def column_norms(weight: Tensor, heads: int) -> Tensor:
    """Euclidean norms of ``weight[i, h*d:(h+1)*d]``, float32 ``[H, D]``."""
    by_head = weight.unflatten(1, (heads, -1))
    return torch.linalg.vector_norm(by_head, dim=2, dtype=torch.float32).t().contiguous()


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


def _usable(column_sums: Tensor, values: Tensor, least: float) -> Tensor:
    """Tokens whose values and column sums are numbers, bool ``[N]``, and these not too small."""
    lengths = torch.linalg.vector_norm(values.float(), dim=2)
    fine = (column_sums >= least) & column_sums.isfinite()
    return lengths.isfinite().all(dim=1) & fine.all(dim=0)


def _check(layers: Sequence[ProximityLayer], traces: Sequence[ProximityTrace]) -> None:
    heads, hidden = layers[0].heads, layers[0].hidden
    widths = {heads}
    if not traces[0].sums.column_sums.is_cuda:
        widths.add(layers[0].weight.shape[1])
    last = max(layer.index for layer in layers)
    smallest = min(layer.cache.shape[2] for layer in layers)
    if len({layer.index for layer in layers}) < len(layers):
        raise ValueError("a layer is given twice")
    if any((layer.heads, layer.hidden) != (heads, hidden) for layer in layers):
        raise ValueError("layers of different sizes do not fit together")
    for trace in traces:
        column_sums, residual, _ = trace.sums
        if (
            column_sums.shape[1] not in widths
            or residual.shape[1] != hidden
            or len(column_sums) <= last
            or trace.block_table.numel() * smallest < trace.tokens
        ):
            raise ValueError(
                f"{heads} heads, {hidden} coordinates, layer {last} and blocks of {smallest} "
                "tokens do not fit the trace: "
                + _listing(
                    column_sums=column_sums, residual=residual, block_table=trace.block_table
                )
            )


def _listing(**tensors: Tensor | None) -> str:
    named = ((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    return ", ".join(f"{name} {t.dtype} {tuple(t.shape)}" for name, t in named)
