"""Paged caches as an engine keeps them, with traps.

Invariant: every slot that the request does not own holds NaN, so a kernel that reads one shows it.
"""

from __future__ import annotations

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

LAYOUTS = {"HND": (0, 1, 2, 3), "NHD": (0, 2, 1, 3), "HDN": (0, 1, 3, 2), "HBND": (1, 0, 2, 3)}
"""Order in memory of the axes block, key/value head, slot, dimension."""


def paged_cache(
    vectors: Tensor, block_size: int, *, layout: str = "HND", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Spreads one request's vectors over blocks in random order, between blocks of others.

    Args:
        vectors: ``[N, G, d]``, of the type the cache gets, on any device.
        block_size: Slots of a block.
        layout: One of `LAYOUTS`.
        seed: Of the order of the blocks.

    Returns:
        cache: ``[num_blocks, G, block_size, d]`` on `DEVICE`, the second half of a cache twice as
            wide whose first half is NaN, so that no axis but the last can be contiguous.
        block_table: int32, two entries longer than needed, which name a block of another request.
    """
    tokens, groups, dim = vectors.shape
    needed = -(-tokens // block_size)
    order = torch.randperm(needed + 3, generator=torch.Generator().manual_seed(seed))
    owned, foreign = order[:needed], order[needed:]
    slots = torch.full((needed * block_size, groups, dim), torch.nan)
    slots[:tokens] = vectors.float().cpu()
    logical = torch.full((len(order), groups, block_size, 2 * dim), torch.nan)
    logical[owned, ..., dim:] = slots.view(needed, block_size, groups, dim).transpose(1, 2)
    axes = LAYOUTS[layout]
    stored = logical.permute(axes).to(vectors.dtype, memory_format=torch.contiguous_format)
    inverse = [axes.index(axis) for axis in range(4)]
    table = torch.cat([owned, foreign[:1].expand(2)]).int()
    return stored.to(DEVICE).permute(inverse)[..., dim:], table.to(DEVICE)
