"""Cases on which the kernels are compared with float64: settings, random inputs and the oracle.

Every value of every feature occurs, and features that meet in one kernel (type and head size, heads
and block size, form and segments) occur together. What no trace of a step owns is NaN: free blocks,
slots behind the last token, queries and residuals of tokens that are not target rows. The oracle is
written straight from the definitions and shares nothing with the package.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import cycle
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_flashtrace.kernels import (
    Accumulators,
    AttentionForm,
    AttentionInputs,
    PagedRows,
    RowSegment,
)

HEAD_SIZES = (64, 80, 96, 128, 192, 256)
RATIOS = (1, 4, 5, 7, 8)
BLOCK_SIZES = (16, 32, 128, 48)
LAYERS, LAYER = 2, 1
UNTOUCHED = 7.0
"""What accumulators hold where nothing may be added."""
_SPARE_COLUMNS, _SPARE_BLOCKS, _OTHER_TOKENS = 3, 3, 2
_BLOCK_DOUBLES = 1 << 24


class Part(NamedTuple):
    """One trace in a step: target rows at the end of a context, adjacent or with gaps."""

    rows: int
    context: int
    gaps: bool = False

    def __str__(self) -> str:
        return f"{self.rows}/{self.context}{'~' if self.gaps else ''}"


@dataclass(frozen=True, slots=True)
class Case:
    """One setting of everything a kernel may meet.

    Attributes:
        query: Type of queries, and of the weight and the residual if it has at least 16 bits.
        cache: Type of keys and values.
        head_dim: Head size d.
        groups: Key/value heads G.
        shared: Query heads of each.
        block_size: Tokens of a block.
        layout: ``HND`` or ``NHD``, the order of heads and slots in memory.
        window: Sliding window, or None.
        soft_cap: Logit cap, 0 for none.
        sinks: Whether heads have sinks.
        alibi: Whether heads have slopes.
        parts: The traces of the step.
        hidden: Size D of the stream.
        value_scale: Factor on cached values.
    """

    query: str = "bfloat16"
    cache: str = "bfloat16"
    head_dim: int = 128
    groups: int = 2
    shared: int = 4
    block_size: int = 16
    layout: str = "HND"
    window: int | None = None
    soft_cap: float = 0.0
    sinks: bool = False
    alibi: bool = False
    parts: tuple[Part, ...] = (Part(70, 300), Part(5, 150))
    hidden: int = 512
    value_scale: float = 1.0

    @property
    def name(self) -> str:
        """What differs from the default case."""
        values = [(f.name, getattr(self, f.name), f.default) for f in fields(self)]
        changed = {name: value for name, value, usual in values if value != usual}
        if "parts" in changed:
            changed["parts"] = ",".join(map(str, self.parts))
        return " ".join(f"{name}={value}" for name, value in changed.items()) or "default"

    @property
    def heads(self) -> int:
        """Query heads H."""
        return self.groups * self.shared

    @property
    def tolerance(self) -> float:
        """Largest relative error: 1e-5 where all is float32, else 1e-3."""
        return 1e-5 if self.query == self.cache == "float32" else 1e-3


_FORMS: tuple[dict[str, object], ...] = (
    {"window": 33},
    {"window": 1},
    {"soft_cap": 20.0},
    {"sinks": True},
    {"alibi": True},
    {"window": 100, "sinks": True},
    {"window": 64, "soft_cap": 20.0},
    {"soft_cap": 20.0, "alibi": True, "sinks": True, "window": 77},
)
_SEGMENTS = (
    (Part(1, 1),),
    (Part(1, 700), Part(300, 300), Part(17, 129)),
    (Part(8, 16384),),
    (Part(2048, 2048),),
    (Part(90, 600, gaps=True), Part(60, 200, gaps=True)),
    (Part(300, 5000), Part(3, 9000)),
)
_EIGHT_BITS = (
    ("bfloat16", "float8_e4m3fn"),
    ("float16", "float8_e5m2"),
    ("bfloat16", "float8_e5m2"),
    ("float8_e4m3fn", "float8_e4m3fn"),
    ("float32", "bfloat16"),
)


def full_grid() -> list[Case]:
    """All cases, on a GPU a few minutes, most of them compilation."""
    return list(dict.fromkeys(_full_grid()))


def _full_grid() -> Iterator[Case]:
    base = Case()
    yield base
    ratios, sizes, layouts = cycle(RATIOS), cycle(BLOCK_SIZES), cycle(("NHD", "HND", "HND"))
    for dtype in ("bfloat16", "float16", "float32"):
        for head_dim in HEAD_SIZES:
            case = replace(base, query=dtype, cache=dtype, head_dim=head_dim, shared=next(ratios))
            yield replace(case, block_size=next(sizes), layout=next(layouts))
    for query, cache in _EIGHT_BITS:
        for head_dim, value_scale in ((64, 0.37), (96, 1.0), (128, 2.5), (256, 0.37)):
            case = replace(base, query=query, cache=cache, head_dim=head_dim)
            yield replace(case, layout=next(layouts), value_scale=value_scale)
    for ratio in RATIOS:
        for block_size in BLOCK_SIZES:
            layout = next(layouts)
            yield replace(base, shared=ratio, block_size=block_size, layout=layout, head_dim=64)
    for form in _FORMS:
        for dtype, parts in (("bfloat16", base.parts), ("float32", _SEGMENTS[1])):
            case = replace(base, query=dtype, cache=dtype, parts=parts, head_dim=64)
            yield replace(case, **form)
    for parts in _SEGMENTS:
        yield replace(base, parts=parts)
        yield replace(base, parts=parts, query="float32", cache="float32", head_dim=64)
        yield replace(base, parts=parts, window=200, sinks=True, layout="NHD")
    for hidden in (96, 4096, 5120):
        yield replace(base, hidden=hidden)


def small_grid() -> list[Case]:
    """A few cases that Triton's interpreter gets through in seconds."""
    small = Case(head_dim=16, shared=2, hidden=48, parts=(Part(9, 40), Part(2, 21)))
    exact = replace(small, query="float32", cache="float32")
    everything = replace(exact, window=7, soft_cap=20.0, sinks=True, alibi=True)
    return [
        replace(exact, block_size=48, shared=5, groups=1),
        replace(small, cache="float8_e4m3fn", value_scale=0.37, layout="NHD", parts=(Part(3, 30),)),
        replace(everything, parts=(Part(6, 35, gaps=True),)),
    ]


@dataclass(frozen=True, slots=True)
class Trace:
    """One trace of the step, tensors as in `RowSegment`; keys and values ``[N, G, d]``, unpaged."""

    rows: Tensor
    positions: Tensor
    weights: Tensor
    block_table: Tensor
    keys: Tensor
    values: Tensor


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

    def attention(self, rows: PagedRows) -> AttentionInputs:
        """The layer as these rows see it."""
        return AttentionInputs(self.query, self.key_cache, rows, self.form)

    def accumulators(self) -> list[Accumulators]:
        """Zeros where sums of layer `LAYER` go, `UNTOUCHED` elsewhere."""

        def held(*size: int) -> Tensor:
            return self.query.new_full((LAYERS, *size), UNTOUCHED, dtype=torch.float32)

        result = []
        for part in self.case.parts:
            columns = held(self.case.heads, part.context + _SPARE_COLUMNS)
            sums = Accumulators(columns, held(self.case.hidden), held(self.case.hidden))
            sums.column_sums[LAYER, :, : part.context] = 0
            sums.residual[LAYER] = sums.stream[LAYER] = 0
            result.append(sums)
        return result

    def paged_rows(self, sums: Sequence[Accumulators], *, half: int | None = None) -> PagedRows:
        """The traces' rows; ``half`` 0 or 1 gives every second row, from there on."""
        pick = slice(half, None, 1 if half is None else 2)
        segments = [
            RowSegment(t.rows[pick], t.positions[pick], t.weights[pick], t.block_table, own)
            for t, own in zip(self.traces, sums, strict=True)
            if len(t.rows[pick])
        ]
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

    def per_head(largest: float) -> Tensor:
        return torch.linspace(largest / 8, largest, case.heads, device=device)

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
        alibi_slopes=per_head(0.3) if case.alibi else None,
        sinks=per_head(4.0) if case.sinks else None,
    )
    return Inputs(case, form, query, keys, values, residual, tuple(traces))


def _place(parts: Sequence[Part], host: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Rows of each part among the step's tokens, and their positions; the last is a target."""
    placed, free = [], 0
    for part in parts:
        positions = torch.arange(part.context - part.rows, part.context)
        if part.gaps:
            others = torch.randperm(part.context - 1, generator=host)[: part.rows - 1]
            positions = torch.cat([others, torch.tensor([part.context - 1])]).sort().values
        rows = free + _OTHER_TOKENS + positions - positions[0]
        free = int(rows[-1]) + 1
        placed.append((rows, positions))
    return placed


def _fill_cache(
    case: Case, dtype: torch.dtype, generator: torch.Generator, host: torch.Generator
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The cache ``[blocks, G, block_size, 2d]``, block tables, and ``[N, G, 2d]`` of each part."""
    device, size, width = generator.device, case.block_size, 2 * case.head_dim
    needed = [-(-part.context // size) for part in case.parts]
    total = sum(needed) + _SPARE_BLOCKS
    nhd = case.layout == "NHD"
    shape = (total, size, case.groups, width) if nhd else (total, case.groups, size, width)
    cache = torch.full(shape, torch.nan, device=device).to(dtype)
    cache = cache.transpose(1, 2) if nhd else cache
    order = torch.randperm(total, generator=host).int().to(device)
    tables, drawn = [], []
    for part, table in zip(case.parts, order.split([*needed, _SPARE_BLOCKS]), strict=False):
        part_size = (part.context, case.groups, width)
        both = torch.randn(part_size, generator=generator, device=device).to(dtype)
        token = torch.arange(part.context, device=device)
        # Eight-bit floats cannot be indexed.
        target, source = (t.view(torch.uint8) if dtype.itemsize == 1 else t for t in (cache, both))
        target[table[token // size].long(), :, token % size] = source
        tables.append(table)
        drawn.append(both)
    return cache, tables, drawn


def lse_and_column_sums(
    query: Tensor, keys: Tensor, positions: Tensor, weights: Tensor, form: AttentionForm
) -> tuple[Tensor, Tensor]:
    """Log-sum-exps ``[R, H]`` and weighted column sums ``[H, N]`` of one trace's rows, in float64.

    Args:
        query: ``[R, H, d]``, any type that converts to float64.
        keys: ``[N, G, d]``, likewise.
        positions: int64 ``[R]``.
        weights: ``[R]``.
        form: How logits are made.
    """
    query, keys, weights = (t.float().double() for t in (query, keys, weights))
    heads, context = query.shape[1], len(keys)
    keys = keys.repeat_interleave(heads // keys.shape[1], dim=1).permute(1, 2, 0)  # [H, d, N]
    sums = keys.new_zeros(heads, context)
    parts = []
    step = max(1, _BLOCK_DOUBLES // (heads * context))
    for first in range(0, len(query), step):
        rows = slice(first, first + step)
        logits = _logits(query[rows].transpose(0, 1) @ keys, positions[rows], form)  # [H, B, N]
        denominators = logits
        if form.sinks is not None:
            sinks = form.sinks.double()[:, None, None].expand(-1, logits.shape[1], 1)
            denominators = torch.cat([logits, sinks], dim=2)
        lse = torch.logsumexp(denominators, dim=2)  # [H, B]
        sums += (weights[rows][None, :, None] * torch.exp(logits - lse[:, :, None])).sum(dim=1)
        parts.append(lse.t())
    return torch.cat(parts), sums


def _logits(dots: Tensor, positions: Tensor, form: AttentionForm) -> Tensor:
    """Logits ``[H, B, N]`` of dot products, ``-inf`` where a row does not see a key."""
    logits = dots * form.scale
    if form.soft_cap:
        logits = form.soft_cap * torch.tanh(logits / form.soft_cap)
    distances = positions[:, None] - torch.arange(logits.shape[2], device=logits.device)
    if form.alibi_slopes is not None:
        logits = logits - form.alibi_slopes.double()[:, None, None] * distances
    hidden = distances < 0
    if form.sliding_window is not None:
        hidden |= distances >= form.sliding_window
    return logits.masked_fill(hidden, float("-inf"))


def pair_proximities(
    column_sums: Tensor, values: Tensor, weight: Tensor, stream: Tensor, value_scale: float
) -> tuple[Tensor, Tensor]:
    """Proximity and bound of every head and token, ``[H, N]``, in float64.

    ``max(0, |x|_1 - |x - z|_1)`` and ``max(0, sign(x) . z)``, of column sums ``[H, N]``, cached
    values ``[N, G, d]``, a weight ``[D, H*d]`` and a stream ``[D]``.
    """
    heads, tokens = column_sums.shape
    values = values.float().double() * value_scale
    column_sums, stream = column_sums.double(), stream.double()
    by_head = weight.float().double().unflatten(1, (heads, -1)).permute(1, 2, 0)  # [H, d, D]
    signs = torch.where(stream < 0, -1.0, 1.0).to(stream.dtype)
    exact, bounds = torch.empty_like(column_sums), torch.empty_like(column_sums)
    step = max(1, _BLOCK_DOUBLES // len(stream))
    for head in range(heads):
        group = head // (heads // values.shape[1])
        for first in range(0, tokens, step):
            part = slice(first, first + step)
            contribution = column_sums[head, part, None] * (values[part, group] @ by_head[head])
            exact[head, part] = stream.abs().sum() - (stream - contribution).abs().sum(dim=1)
            bounds[head, part] = contribution @ signs
    return exact.clamp_(min=0), bounds.clamp_(min=0)
