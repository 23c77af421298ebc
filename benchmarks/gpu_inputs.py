"""Random inputs of a case: a paged cache as vLLM lays it out, queries of a step, accumulators.

Invariant: what no trace of the step owns is NaN: free blocks, slots behind the last token, and the
queries and residuals of tokens that are not target rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu_cases import Case, Part
from vllm_flashtrace.kernels import Accumulators, AttentionForm, PagedRows, RowSegment

LAYERS, LAYER = 2, 1
UNTOUCHED = 7.0
"""What accumulators hold where nothing may be added."""

_SPARE_COLUMNS = 3
_SPARE_BLOCKS = 3
_OTHER_TOKENS = 2


@dataclass(frozen=True, slots=True)
class Trace:
    """One trace of the step, unpaged and as the kernels see it; tensors as in `RowSegment`."""

    rows: Tensor
    positions: Tensor
    weights: Tensor
    block_table: Tensor
    keys: Tensor
    values: Tensor

    @property
    def columns(self) -> int:
        """Tokens of the context."""
        return len(self.keys)


@dataclass(frozen=True, slots=True)
class Inputs:
    """A step's tensors, as the kernels take them."""

    case: Case
    form: AttentionForm
    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    residual: Tensor
    traces: tuple[Trace, ...]

    def accumulators(self) -> list[Accumulators]:
        """Zeros where sums of layer `LAYER` go, `UNTOUCHED` elsewhere."""
        result = []
        for part in self.case.parts:
            size = (LAYERS, self.case.heads, part.context + _SPARE_COLUMNS)
            streams = (LAYERS, self.case.hidden)
            sums = Accumulators(
                *(self.query.new_full(s, UNTOUCHED, dtype=torch.float32) for s in (size, streams)),
                self.query.new_full(streams, UNTOUCHED, dtype=torch.float32),
            )
            sums.column_sums[LAYER, :, : part.context] = 0
            sums.residual[LAYER] = 0
            sums.stream[LAYER] = 0
            result.append(sums)
        return result

    def paged_rows(self, sums: Sequence[Accumulators], *, half: int | None = None) -> PagedRows:
        """The traces' rows; ``half`` 0 or 1 gives every second row, from there on."""
        segments = []
        for trace, accumulators in zip(self.traces, sums, strict=True):
            pick = slice(half, None, 1 if half is None else 2)
            if len(trace.rows[pick]):
                segments.append(
                    RowSegment(
                        trace.rows[pick],
                        trace.positions[pick],
                        trace.weights[pick],
                        trace.block_table,
                        accumulators,
                    )
                )
        return PagedRows.build(segments, self.case.heads, self.case.groups, self.query.device)


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Draws all tensors of a case; the same on every device of a kind."""
    generator = torch.Generator(device).manual_seed(seed)
    host = torch.Generator().manual_seed(seed)
    query_type, cache_type = getattr(torch, case.query), getattr(torch, case.cache)
    plain_type = query_type if query_type.itemsize > 1 else torch.bfloat16
    placed = _place(case.parts, host)
    tokens = _OTHER_TOKENS + max(int(rows[-1]) + 1 for rows, _ in placed)
    targets = torch.cat([rows for rows, _ in placed]).to(device)

    def of_targets(width: int, factor: float, mean: float = 0.0) -> Tensor:
        drawn = torch.randn(len(targets), width, generator=generator, device=device)
        whole = torch.full((tokens, width + 8), torch.nan, device=device)
        whole[targets, :width] = drawn * factor + mean
        return whole

    width = case.heads * case.head_dim
    query = of_targets(width, 2.0).to(query_type)[:, :width].unflatten(1, (case.heads, -1))
    residual = of_targets(case.hidden, 1.0, 0.3).to(plain_type)[:, : case.hidden]
    cache, tables, drawn = _fill_cache(case, cache_type, generator, host)
    keys, values = cache.split(case.head_dim, dim=3)
    traces = []
    for (rows, positions), table, both in zip(placed, tables, drawn, strict=True):
        weights = torch.rand(len(rows), generator=host) + 0.05
        traces.append(Trace(rows, positions, weights, table, *both.split(case.head_dim, dim=2)))
    form = AttentionForm(
        scale=case.head_dim**-0.5,
        sliding_window=case.window,
        soft_cap=case.soft_cap,
        alibi_slopes=_per_head(case, 0.3, device) if case.alibi else None,
        sinks=_per_head(case, 4.0, device) if case.sinks else None,
    )
    return Inputs(case, form, query, keys, values, residual, tuple(traces))


def _per_head(case: Case, largest: float, device: torch.device) -> Tensor:
    return torch.linspace(largest / 8, largest, case.heads, device=device)


def _place(parts: Sequence[Part], host: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Rows of each part among the step's tokens, and their positions; the last is a target."""
    placed, free = [], 0
    for part in parts:
        positions = torch.arange(part.context - part.rows, part.context)
        if part.gaps:
            others = torch.randperm(part.context - 1, generator=host)[: part.rows - 1]
            last = torch.tensor([part.context - 1])
            positions = torch.cat([others, last]).sort().values
        free += _OTHER_TOKENS
        rows = free + positions - positions[0]
        free = int(rows[-1]) + 1
        placed.append((rows, positions))
    return placed


def _fill_cache(
    case: Case, dtype: torch.dtype, generator: torch.Generator, host: torch.Generator
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The cache ``[blocks, G, block_size, 2d]``, block tables, and ``[N, G, 2d]`` of each part."""
    device, size, groups = generator.device, case.block_size, case.groups
    needed = [-(-part.context // size) for part in case.parts]
    total = sum(needed) + _SPARE_BLOCKS
    shape = (total, groups, size, 2 * case.head_dim)
    if case.layout == "NHD":
        shape = (total, size, groups, 2 * case.head_dim)
    cache = torch.full(shape, torch.nan, device=device).to(dtype)
    cache = cache.transpose(1, 2) if case.layout == "NHD" else cache
    order = torch.randperm(total, generator=host).int().to(device)
    tables, drawn = [], []
    for part, table in zip(case.parts, order.split([*needed, _SPARE_BLOCKS]), strict=False):
        width = (part.context, groups, 2 * case.head_dim)
        both = torch.randn(width, generator=generator, device=device).to(dtype)
        token = torch.arange(part.context, device=device)
        # Eight-bit floats cannot be indexed.
        target, source = (t.view(torch.uint8) if dtype.itemsize == 1 else t for t in (cache, both))
        target[table[token // size].long(), :, token % size] = source
        tables.append(table)
        drawn.append(both)
    return cache, tables, drawn
