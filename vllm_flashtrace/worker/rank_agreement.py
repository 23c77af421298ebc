"""What the ranks of one model must do alike, and so decide by the scheduler's output alone.

    `TargetSteps`      which steps compute target rows, and which traces they finish
    `replays_pieces`   whether such steps are padded for piecewise graphs
    `TotalsExchange`   adds up the totals of the ranks that share the heads

A rank on which something has failed, or that cannot trace at all, goes on with all three: else the
others would wait for it, or compute a batch of another size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_flashtrace.base.logs import log_unexpected
from vllm_flashtrace.trace.wire import target_range

_READY = "_flashtrace_trace_graphs"


class TargetSteps:
    """Tells the steps that compute target rows from what the scheduler says, and nothing else.

    Ranks of a tensor- or pipeline-parallel model must agree on how a step runs: one that replays a
    CUDA graph pads its batch, and its collectives, to another size than one that runs code. A trace
    that failed on one rank only, for want of memory say, therefore counts until its request ends.

    Attributes:
        finishing: Requests whose last target row is in the step, in the scheduler's order.
    """

    finishing: Sequence[str]

    def __init__(self) -> None:
        self._targets: dict[str, range] = {}
        self.finishing = ()

    def includes(self, scheduler_output: SchedulerOutput) -> bool:
        """Whether a step, whose output must be given once and in order, computes target rows."""
        self.finishing = finishing = []
        for req_id in scheduler_output.finished_req_ids:
            self._targets.pop(req_id, None)
        computed: dict[str, int] = {}
        for new in scheduler_output.scheduled_new_reqs:
            computed[new.req_id] = new.num_computed_tokens
            params = new.sampling_params
            target = target_range(params.extra_args) if params is not None else None
            if target is not None:
                self._targets[new.req_id] = target
        if not self._targets:
            return False
        cached = scheduler_output.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        records = False
        for req_id, tokens in scheduler_output.num_scheduled_tokens.items():
            target, start = self._targets.get(req_id), computed.get(req_id, 0)
            if target is not None and start < target.stop and start + tokens > target.start:
                records = True
                if start + tokens >= target.stop:
                    finishing.append(req_id)
        return records


def replays_pieces(holder: Any) -> bool:
    """Whether steps with target rows are to be padded for piecewise graphs.

    Args:
        holder: What `announce` was called with.
    """
    return bool(getattr(holder, _READY, False))


def announce(holder: Any) -> None:
    """Lets steps be padded from now on; to be called on all ranks or on none.

    Args:
        holder: A V1 runner, or a V2 runner's CUDA graph manager.
    """
    setattr(holder, _READY, True)


class TotalsExchange:
    """Adds up the ranks' totals per layer: one all-reduce for all traces that a step finishes.

    Invariant: every rank calls `add_up` for the same steps with the same number of traces, which
    follow from the scheduler's output alone. A rank that has failed a trace gives NaN, so that no
    rank has a result and none waits for another.
    """

    def __init__(
        self,
        all_reduce: Callable[[Tensor], Tensor],
        layers: int,
        most_traces: int,
        device: torch.device,
    ) -> None:
        """Takes the memory of the exchange, so that none is lacking later.

        Args:
            all_reduce: Sums a float32 tensor ``[n]`` over the ranks.
            layers: Layers of this pipeline stage, or more.
            most_traces: Most traces that a step can finish.
            device: Where totals are.
        """
        self._all_reduce = all_reduce
        with torch.inference_mode(False):  # It is written to with and without.
            self._rows = torch.zeros(most_traces, layers, device=device)

    def add_up(self, totals: Sequence[Tensor | None]) -> list[Tensor]:
        """Sums over the ranks, float64 ``[layers]`` for each trace, of which the first L count.

        Args:
            totals: This rank's totals ``[L]`` of each trace; None where it has none.
        """
        rows = self._rows[: len(totals)]
        rows.fill_(torch.nan)
        for row, own in zip(rows, totals, strict=True):
            if own is not None:
                try:
                    row[: len(own)].copy_(own)
                except Exception as error:  # The others wait for this rank.
                    log_unexpected("exchanging totals", error)
        # In one dimension: some of vLLM's forms of it take two to be the model's activations.
        return list(self._all_reduce(rows.flatten()).view_as(rows).double())
