"""Block tables as attention kernels read them.

vLLM's KV cache manager and its runners count blocks of the cache's block size. A backend whose
kernels need smaller blocks reads a cache that is viewed in such kernel blocks, through a table that
its ``AttentionGroup`` derives when metadata is built; this module derives the same table for the
recorder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vllm_flashtrace.base.errors import UnsupportedModelError


def kernel_block_table(block_table: torch.Tensor, groups: Sequence[Any]) -> torch.Tensor:
    """Ids of kernel blocks, in the order of the tokens they hold.

    Args:
        block_table: int32 ``[..., blocks]``, ids of the manager's blocks.
        groups: The ``AttentionGroup`` objects of the one KV cache group.

    Returns:
        ``block_table`` itself where kernels use the manager's blocks, else int32
        ``[..., blocks * kernel blocks per block]`` on the same device.

    Raises:
        UnsupportedModelError: Layers differ in the size of their kernel blocks, or the blocks of
            other layers lie between those of one.
    """
    if len({group.kernel_block_size for group in groups}) != 1:
        raise UnsupportedModelError(
            "traces are not supported with layers whose kernels use blocks of different sizes"
        )
    group = groups[0]
    if group.kernel_block_size is None:
        return block_table
    if group.kernel_block_stride:
        raise UnsupportedModelError("traces are not supported with packed kernel blocks")
    parts = group.kv_cache_spec.block_size // group.kernel_block_size
    part = torch.arange(parts, dtype=block_table.dtype, device=block_table.device)
    return (block_table.unsqueeze(-1) * parts + part).flatten(-2)
