"""Random attention over a paged K cache, and its definition in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_flashtrace.kernels import (
    Accumulators,
    AttentionForm,
    AttentionInputs,
    PagedRows,
    RowSegment,
)

LAYERS, HIDDEN = 3, 40
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Shape:
    """Heads, head size, block size, types, and how the cache lies in memory."""

    groups: int = 2
    shared: int = 3
    dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    query_dtype: torch.dtype | None = None
    tokens_first: bool = False
    heads_first: bool = False

    @property
    def heads(self) -> int:
        return self.groups * self.shared


@dataclass(frozen=True)
class Case:
    """A step's queries, the cache, and the target rows of some traces in it."""

    query: Tensor
    cache: Tensor
    rows: PagedRows

    def inputs(self, form: AttentionForm) -> AttentionInputs:
        return AttentionInputs(self.query, self.cache, self.rows, form)

    @property
    def sums(self) -> list[Tensor]:
        return [segment.sums.column_sums for segment in self.rows.segments]

    def one(self, index: int) -> Case:
        """A segment by itself, with accumulators of its own."""
        segment = self.rows.segments[index]
        fresh = replace(segment, sums=Accumulators(*(torch.zeros_like(s) for s in segment.sums)))
        rows = PagedRows.build([fresh], self.rows.num_heads, self.rows.num_kv_heads, CPU)
        return replace(self, rows=rows)


def make_case(
    shape: Shape, positions: Sequence[Sequence[int]], seed: int = 0, spread: float = 1.0
) -> Case:
    """One segment for each list of positions, its rows anywhere in the step, in order.

    Slots that no segment owns are NaN, and so is one row of queries in three.
    """
    generator = torch.Generator().manual_seed(seed)
    size = shape.block_size
    counts = [-(-(own[-1] + 1) // size) for own in positions]
    blocks = torch.randperm(sum(counts) + 2, generator=generator).int()
    cache = _cache(shape, len(blocks))
    tokens = 2 + sum(2 * len(own) for own in positions)
    query = torch.full((tokens, shape.heads, shape.dim), torch.nan)
    segments, block, place = [], 0, 1
    for own, count in zip(positions, counts, strict=True):
        table = blocks[block : block + count]
        for j in range(own[-1] + 1):
            key = spread * torch.randn(shape.groups, shape.dim, generator=generator)
            cache[table[j // size], :, j % size] = key.to(cache.dtype)
        jumps = torch.randint(1, 3, (len(own),), generator=generator)
        rows = place + jumps.cumsum(0) - jumps[0]
        query[rows] = torch.randn(len(own), shape.heads, shape.dim, generator=generator)
        segments.append(
            RowSegment(
                rows,
                torch.tensor(own),
                torch.rand(len(own), generator=generator) + 0.1,
                torch.cat([table, torch.tensor([0], dtype=torch.int32)]),
                Accumulators(
                    torch.zeros(LAYERS, shape.heads, own[-1] + 4),
                    torch.zeros(LAYERS, HIDDEN),
                    torch.zeros(LAYERS, HIDDEN),
                ),
            )
        )
        block, place = block + count, int(rows[-1]) + 1
    rows = PagedRows.build(segments, shape.heads, shape.groups, CPU)
    return Case(query.to(shape.query_dtype or shape.dtype), cache, rows)


def _cache(shape: Shape, blocks: int) -> Tensor:
    """K's half of a cache that holds K and V side by side, ``[blocks, G, block_size, d]``.

    With heads first the blocks of a head follow one another, as those that are made of latents do.
    """
    if shape.heads_first:
        whole = torch.full((shape.groups, blocks, shape.block_size, shape.dim), torch.nan)
        return whole.to(shape.dtype).transpose(0, 1)
    sizes = (blocks, shape.groups, shape.block_size, 2 * shape.dim)
    if shape.tokens_first:
        sizes = (blocks, shape.block_size, shape.groups, 2 * shape.dim)
    cache = torch.full(sizes, torch.nan).to(shape.dtype)
    return (cache.transpose(1, 2) if shape.tokens_first else cache)[..., : shape.dim]


def definition(case: Case, form: AttentionForm) -> tuple[Tensor, list[Tensor]]:
    """Log-sum-exps ``[R, H]`` and each segment's column sums ``[H, N]``, row by row."""
    cache, query = case.cache.float().double(), case.query.float().double()
    heads, shared = case.rows.num_heads, case.rows.num_heads // case.rows.num_kv_heads
    lses, sums = [], []
    for segment in case.rows.segments:
        tokens = torch.arange(segment.columns)
        size = cache.shape[2]
        keys = cache[segment.block_table[tokens // size].long(), :, tokens % size]  # [N, G, d]
        keys = keys.repeat_interleave(shared, dim=1)
        total = torch.zeros(heads, segment.columns, dtype=torch.float64)
        for row, position, weight in zip(
            segment.rows.tolist(), segment.positions.tolist(), segment.weights.tolist(), strict=True
        ):
            logits = form.scale * torch.einsum("hd,nhd->hn", query[row], keys)
            if form.soft_cap:
                logits = form.soft_cap * torch.tanh(logits / form.soft_cap)
            if form.alibi_slopes is not None:
                logits += form.alibi_slopes.double()[:, None] * (tokens - position)
            hidden = tokens > position
            if form.sliding_window is not None:
                hidden |= position - tokens >= form.sliding_window
            if form.chunk_size is not None:
                hidden |= tokens // form.chunk_size != position // form.chunk_size
            logits[:, hidden] = -torch.inf
            everything = logits
            if form.sinks is not None:
                everything = torch.cat([logits, form.sinks.double()[:, None]], dim=1)
            lse = everything.logsumexp(1)
            lses.append(lse)
            total += weight * (logits - lse[:, None]).exp()
        sums.append(total)
    return torch.stack(lses), sums


def relative_error(ours: Tensor, expected: Tensor) -> float:
    """L1 distance over L1 norm; NaN in ours is an infinite error."""
    error = float((ours.double() - expected).abs().sum() / expected.abs().sum())
    return error if error == error else float("inf")
