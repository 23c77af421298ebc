"""Keys and values of latent attention, made part by part in a room like a paged cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from tests.kernels.attention import CPU, definition, relative_error
from tests.kernels.attention import Case as AttentionCase
from vllm_flashtrace.kernels import (
    Accumulators,
    AttentionForm,
    PagedRows,
    ProximityLayer,
    ProximityTrace,
    RowSegment,
    SumsTouchedError,
    replace_by_proximities,
)
from vllm_flashtrace.worker import gpu_latents, latents
from vllm_flashtrace.worker.gpu_latents import BLOCK, LatentRoom, read_latent_values
from vllm_flashtrace.worker.layers import HeadSizes

HEADS, LATENT, ROTATED, PLAIN, VALUE, HIDDEN = 5, 10, 4, 12, 6, 24
SIZES = HeadSizes(HEADS, HEADS, PLAIN + ROTATED, VALUE)
FORM = AttentionForm(0.3)
ONE_HEAD = BLOCK * SIZES.keys * 4
"""Bytes of a head's keys of up to 64 tokens in float32."""


class Layer:
    """What is read of vLLM's layer, with heads from ``first`` up to ``last``."""

    kv_lora_rank, qk_rope_head_dim = LATENT, ROTATED
    qk_nope_head_dim, v_head_dim, qk_head_dim = PLAIN, VALUE, PLAIN + ROTATED

    def __init__(
        self, dtype: torch.dtype = torch.float32, size: int = 16, first: int = 0, last: int = HEADS
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.num_heads = last - first
        cache = torch.randn(40, 2, size, LATENT + ROTATED, generator=generator)
        self.kv_cache = cache.to(dtype)[:, 1]  # Blocks of several layers follow one another.
        weight = torch.randn(HEADS, PLAIN + VALUE, LATENT, generator=generator)
        self.kv_b_proj = nn.Linear(LATENT, self.num_heads * (PLAIN + VALUE), bias=False)
        self.kv_b_proj.quant_method = UnquantizedLinearMethod()
        own = weight[first:last].flatten(0, 1).to(dtype)
        self.kv_b_proj.weight = nn.Parameter(own, requires_grad=False)

    def table(self, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(len(self.kv_cache), generator=generator).int()

    def expanded(self, table: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Keys ``[tokens, H, P + R]`` and values ``[tokens, H, V]``, in the cache's type."""
        cached = self.kv_cache[table.long()].flatten(0, 1)[:tokens]
        projected = (cached[:, :LATENT] @ self.kv_b_proj.weight.t()).view(tokens, -1, PLAIN + VALUE)
        rotated = cached[:, None, LATENT:].expand(-1, self.num_heads, -1)
        return torch.cat([projected[..., :PLAIN], rotated], -1), projected[..., PLAIN:]


def room_of(size: int, dtype: torch.dtype = torch.float32, heads: int = HEADS) -> LatentRoom:
    room = LatentRoom(SIZES._replace(queries=heads, groups=heads), dtype, CPU)
    if size:
        room.take(size)
    return room


def in_order(made: Tensor, tokens: int) -> Tensor:
    """``[blocks, heads, BLOCK, size]`` as ``[tokens, heads, size]``."""
    return made.transpose(1, 2).flatten(0, 1)[:tokens]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 16, 48, 128])
def test_as_the_layer_projects_them(
    size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latents are gathered 30 at a time, which begins and ends within blocks."""
    monkeypatch.setattr(latents, "_GATHERED", 30)
    layer, room = Layer(dtype, size), room_of(1 << 20, dtype)
    attention: Any = layer
    table, tokens = layer.table(), min(100, 40 * size)
    keys, values = layer.expanded(table, tokens)
    near = {"rtol": torch.finfo(dtype).eps, "atol": 16 * torch.finfo(dtype).eps}
    for heads in (slice(0, HEADS), slice(1, 3), slice(4, 5)):
        made = room.keys(attention, table, tokens, heads)
        assert made.dtype == dtype
        torch.testing.assert_close(in_order(made, tokens), keys[:, heads], **near)
    for first, last in ((0, tokens), (7, 9), (tokens - 3, tokens)):
        made = room.values(attention, table, first, last)
        torch.testing.assert_close(in_order(made, last - first), values[first:last], **near)
    read = read_latent_values(attention, table, tokens)
    assert read.dtype == torch.float32
    torch.testing.assert_close(read, values.float(), **near)


def rows_of(layer: Layer, heads: int = HEADS) -> tuple[Tensor, PagedRows]:
    """Queries, and the target rows of two requests."""
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(40, HEADS, SIZES.keys, generator=generator)
    segments = [
        RowSegment(
            rows,
            positions,
            torch.rand(len(rows), generator=generator) + 0.1,
            layer.table(seed),
            Accumulators(torch.zeros(2, heads, 200), torch.zeros(2, 8), torch.zeros(2, 8)),
        )
        for seed, rows, positions in (
            (0, torch.arange(3, 20), torch.arange(113, 130)),
            (1, torch.tensor([22, 25, 30]), torch.tensor([0, 40, 50])),
        )
    ]
    return query, PagedRows.build(segments, heads, heads, CPU)


def added(
    room: LatentRoom, layer: Layer, heads: slice = slice(0, HEADS), scaled: bool = False
) -> list[Tensor]:
    query, rows = rows_of(layer, layer.num_heads)
    attention: Any = layer
    scales = torch.linspace(0.5, 2, len(rows)) if scaled else None
    room.add_column_sums(1, attention, query[:, heads], rows, FORM, scales)
    return [segment.sums.column_sums for segment in rows.segments]


@pytest.fixture(params=["torch", "triton"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both forms of the kernels, those in Triton interpreted."""
    if request.param == "torch":
        yield
        return
    pytest.importorskip("triton")
    from tests.kernels.interpreter import interpreted
    from vllm_flashtrace.kernels.triton_column_sums import triton_column_sums
    from vllm_flashtrace.kernels.triton_proximity import triton_proximities

    monkeypatch.setattr(gpu_latents, "paged_column_sums", triton_column_sums)
    monkeypatch.setattr(gpu_latents, "replace_by_proximities", triton_proximities)
    with interpreted():
        yield


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("size", [0, 3 * ONE_HEAD, 7 * ONE_HEAD, 1 << 20])
def test_column_sums_in_parts(size: int) -> None:
    """The longest context takes three blocks."""
    layer = Layer()
    query, rows = rows_of(layer)
    cache = torch.full((2, HEADS, 128 + 64, SIZES.keys), torch.nan)
    for place, segment in enumerate(rows.segments):
        keys, _ = layer.expanded(segment.block_table, segment.columns)
        cache[place, :, : segment.columns] = keys.transpose(0, 1)
    segments = [
        RowSegment(s.rows, s.positions, s.weights, torch.tensor([place]).int(), s.sums)
        for place, s in enumerate(rows.segments)
    ]
    whole = AttentionCase(query, cache, PagedRows.build(segments, HEADS, HEADS, CPU))
    _, expected = definition(whole, FORM)
    for sums, exact in zip(added(room_of(size), layer), expected, strict=True):
        assert relative_error(sums[1, :, : exact.shape[1]], exact) < 1e-5
        assert not sums[1, :, exact.shape[1] :].any() and not sums[0].any()


def test_factors_of_rows_and_parts_change_no_bit() -> None:
    layer = Layer()
    whole, parts = (added(room_of(size), layer, scaled=True) for size in (1 << 20, 3 * ONE_HEAD))
    plain = added(room_of(1 << 20), layer)
    for one, other, unscaled in zip(whole, parts, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
        assert not torch.allclose(one, unscaled)


def test_ranks_have_the_sums_of_their_own_heads() -> None:
    """Every rank caches all latents, and has the rows of its heads of the up-projection."""
    whole = added(room_of(1 << 20), Layer())
    first = added(room_of(1 << 20, heads=2), Layer(last=2), slice(0, 2))
    second = added(room_of(1 << 20, heads=3), Layer(first=2), slice(2, HEADS))
    for sums, *halves in zip(whole, first, second, strict=True):
        torch.testing.assert_close(torch.cat(halves, 1), sums, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("size", [BLOCK * HEADS * VALUE * 4, 1 << 20])
def test_proximities_in_pieces(size: int, fraction: float) -> None:
    """Of all tokens together; pairs that are not exact lie between proximity and bound."""
    tokens, layer = 150, Layer()
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(HIDDEN, HEADS * VALUE, generator=generator)
    sums = Accumulators(
        torch.rand(3, HEADS, tokens, generator=generator),
        torch.randn(3, HIDDEN, generator=generator),
        torch.randn(3, HIDDEN, generator=generator),
    )

    def trace(fraction: float, table: Tensor) -> ProximityTrace:
        own = Accumulators(*(one.clone() for one in sums))
        totals, residual = torch.full((2, 3), torch.nan, dtype=torch.float64)
        return ProximityTrace(own, table, totals, residual, fraction)

    _, values = layer.expanded(layer.table(), tokens)
    one_block = values.transpose(0, 1)[None].contiguous()
    exact, bounds = (trace(share, torch.zeros(1).int()) for share in (1.0, 0.0))
    for whole in (exact, bounds):
        replace_by_proximities([ProximityLayer(1, one_block, weight, 0.5)], [whole])
    traces = [trace(fraction, layer.table()), trace(1.0, layer.table())]
    made: Any = type("Layer", (), {"attention": layer, "multiplier": 0.5})
    room_of(size).replace_by_proximities(made, 1, weight, traces)
    found, second = (one.sums.column_sums[1, 0] for one in traces)
    expected = exact.sums.column_sums[1, 0]
    torch.testing.assert_close(second, expected, rtol=1e-5, atol=1e-6)
    assert (found >= expected - 1e-5).all()
    assert (found <= bounds.sums.column_sums[1, 0] + 1e-5).all()
    assert torch.allclose(found, expected, 1e-5, 1e-6) == (fraction == 1)
    for one in traces:
        torch.testing.assert_close(one.totals[1], one.sums.column_sums[1, 0].double().sum())
        assert one.residual[1] == exact.residual[1]
        assert torch.equal(one.sums.column_sums[[0, 2]], sums.column_sums[[0, 2]])


def test_what_the_room_takes() -> None:
    """At most so much, but never less than a head of the longest context."""
    room, one = room_of(0), 1024 * SIZES.keys * 4
    assert room.bytes_for(1000, 1 << 30) == HEADS * one
    assert room.bytes_for(1000, 3 * one + 5) == 3 * one + 5
    assert room.bytes_for(1000, 7) == one
    assert room_of(0, torch.bfloat16).bytes_for(1000, 7) == one // 2


def test_a_fault_of_the_first_part_has_touched_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, room = Layer(), room_of(3 * ONE_HEAD)
    query, rows = rows_of(layer)
    attention: Any = layer
    calls: list[slice] = []
    stock = LatentRoom.keys

    def keys(self: LatentRoom, attention: Any, table: Tensor, tokens: int, heads: slice) -> Tensor:
        calls.append(heads)
        if len(calls) in (1, 3):
            raise MemoryError("none left")
        return stock(self, attention, table, tokens, heads)

    monkeypatch.setattr(LatentRoom, "keys", keys)
    with pytest.raises(MemoryError):
        room.add_column_sums(0, attention, query, rows, FORM, None)
    assert not any(segment.sums.column_sums.any() for segment in rows.segments)
    with pytest.raises(SumsTouchedError, match="none left"):
        room.add_column_sums(0, attention, query, rows, FORM, None)
