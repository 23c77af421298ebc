"""The tiles of a cache block are found in any order that has them, and in no other."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

BLOCK_SIZE, HEAD_SIZE = 32, 64


@st.composite
def tiled_offsets(draw: st.DrawFn) -> torch.Tensor:
    """Offsets ``[block_size, head_size]`` of a block whose digits are stored in any order."""
    sizes: list[int] = []
    for length in (BLOCK_SIZE, HEAD_SIZE):
        tile = draw(st.sampled_from([1, 2, 4, 16]))
        sizes += [length // tile, tile]
    stored = draw(st.permutations(range(4)))
    places = torch.arange(math.prod(sizes)).view([sizes[axis] for axis in stored])
    back = [stored.index(axis) for axis in range(4)]
    return places.permute(back).reshape(BLOCK_SIZE, HEAD_SIZE)


@settings(deadline=None)
@given(tiled_offsets())
def test_found_digits_rebuild_the_order(offsets: torch.Tensor) -> None:
    from vllm_flashtrace.worker.cpu_cache import BlockOrder

    order = BlockOrder.from_offsets(offsets)
    assert order is not None
    stored = torch.arange(BLOCK_SIZE * HEAD_SIZE).view(order.sizes)
    plain = stored.permute(*order.positions, *order.dims)
    assert torch.equal(plain.reshape(BLOCK_SIZE, HEAD_SIZE), offsets)


def test_an_order_without_tiles_is_refused() -> None:
    from vllm_flashtrace.worker.cpu_cache import BlockOrder

    generator = torch.Generator().manual_seed(0)
    anything = torch.randperm(BLOCK_SIZE * HEAD_SIZE, generator=generator)
    assert BlockOrder.from_offsets(anything.view(BLOCK_SIZE, HEAD_SIZE)) is None
    swapped = torch.arange(BLOCK_SIZE * HEAD_SIZE).view(BLOCK_SIZE, HEAD_SIZE)
    swapped = swapped[torch.tensor([0, 2, 1, *range(3, BLOCK_SIZE)])]
    assert BlockOrder.from_offsets(swapped) is None
