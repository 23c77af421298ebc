"""Two collectives of experts that vLLM's communicator of CPUs lacks, by Gloo.

Without them vLLM itself cannot run a mixture-of-experts model data parallel on CPUs.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, distributed
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts


class ExpertCollectives:
    """``--worker-extension-cls`` of servers; adds nothing to a worker, but loads this module."""


def _all_gatherv(
    self: Any, input_: Tensor | list[Tensor], dim: int = 0, sizes: list[int] | None = None
) -> Tensor | list[Tensor]:
    """The rows of all ranks, of each as many as ``sizes`` says."""
    assert dim == 0 and sizes is not None
    if isinstance(input_, list):
        return [_all_gatherv(self, each, dim, sizes) for each in input_]  # type: ignore[misc]
    assert len(input_) == sizes[self.rank_in_group]
    padded = input_.new_zeros(max(sizes), *input_.shape[1:])
    padded[: len(input_)] = input_
    rows = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(rows, padded, group=self.device_group)
    return torch.cat([each[:size] for each, size in zip(rows, sizes, strict=True)])


def _reduce_scatterv(
    self: Any, input_: Tensor, dim: int = -1, sizes: list[int] | None = None
) -> Tensor:
    """This rank's rows of the sum over all ranks."""
    assert dim == 0 and sizes is not None and len(input_) == sum(sizes)
    total = input_.clone()
    distributed.all_reduce(total, group=self.device_group)
    return total.split(sizes)[self.rank_in_group].clone()


CpuCommunicator.all_gatherv = _all_gatherv
CpuCommunicator.reduce_scatterv = _reduce_scatterv


_apply = CPUUnquantizedExperts.apply


def _apply_own_experts(self: Any, *args: Any, **kwargs: Any) -> None:
    """The kernel, given the numbers that this rank's experts have here.

    By itself it reads other ranks' experts behind the end of its weights; they count nothing here.
    """
    bound = inspect.signature(_apply).bind(self, *args, **kwargs)
    if (places := bound.arguments["expert_map"]) is not None:
        own = places[bound.arguments["topk_ids"].long()]
        bound.arguments["topk_weights"] = bound.arguments["topk_weights"] * (own >= 0)
        bound.arguments["topk_ids"] = own.clamp(min=0).to(bound.arguments["topk_ids"].dtype)
    _apply(*bound.args, **bound.kwargs)


CPUUnquantizedExperts.apply = _apply_own_experts
