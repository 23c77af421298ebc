"""The accumulators of one trace while its request is prefilled.

Invariant: after any number of chunks, restarts and preemptions, the accumulators hold each target
position exactly once, or the trace has failed. They cost O(layers * heads * context) floats.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.core.scores import LayerSums
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.trace.wire import TraceSpec
from vllm_flashtrace.worker.clock import Clock, HostClock


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of the traced model on this worker; heads are those of its tensor-parallel rank."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    hidden_size: int


@dataclass(frozen=True, slots=True)
class TargetRows:
    """Target positions that one chunk computes.

    Attributes:
        offsets: int64 ``[R]``, rows of the chunk.
        positions: int64 ``[R]``, absolute positions.
        weights: float32 ``[R]``.
    """

    offsets: torch.Tensor
    positions: torch.Tensor
    weights: torch.Tensor


class Trace:
    """One trace request's sums, ``c``, ``r`` and ``x`` of every layer (arXiv 2602.01914, 3.2)."""

    def __init__(
        self,
        spec: TraceSpec,
        weights: TargetWeights,
        shape: ModelShape,
        device: torch.device,
        clock: Clock | None = None,
        adapter: int | None = None,
    ) -> None:
        self.spec = spec
        self.adapter = adapter
        self.target = weights.normalised()
        self.context = self.target.last + 1
        self.next_position = 0
        self.cached_tokens = 0
        self.recomputed_tokens = 0
        self.restarts = 0
        self.clock: Clock = clock if clock is not None else HostClock()
        self.started: Any = None
        self.recordings: list[tuple[Any, Any]] = []
        layers, heads, hidden = shape.num_layers, shape.num_heads, shape.hidden_size
        zeros = partial(torch.zeros, dtype=torch.float32, device=device)
        self.column_sums = zeros(layers, heads, self.context)
        self.residual = zeros(layers, hidden)
        self.stream = zeros(layers, hidden)

    @property
    def nbytes(self) -> int:
        """Size of the accumulators in bytes."""
        return self.column_sums.nbytes + self.residual.nbytes + self.stream.nbytes

    @property
    def complete(self) -> bool:
        """Whether every target position has been recorded."""
        return self.next_position >= self.context

    def begin_chunk(self, start: int, stop: int) -> TargetRows:
        """Notes that positions ``[start, stop)`` are about to be computed.

        A request that is preempted starts again from a prefix-cache hit, which for a trace ends at
        or before its first target: everything recorded so far is then dropped.

        Raises:
            TraceError: ``recording_gap`` when target positions were computed unseen.
        """
        if self.started is None:
            self.started = self.clock.mark()
        if start != self.next_position:
            if start > self.target.first:
                raise TraceError(
                    "recording_gap",
                    f"positions {self.next_position} to {start} were computed without recording",
                )
            self._restart(start)
        inside = (self.target.positions >= start) & (self.target.positions < stop)
        positions = self.target.positions[inside]
        self.next_position = stop
        self.recomputed_tokens += stop - start
        return TargetRows(positions - start, positions, self.target.weights[inside])

    def layer_sums(self, layer: int) -> LayerSums:
        """The three sums of one layer."""
        return LayerSums(self.column_sums[layer], self.residual[layer], self.stream[layer])

    def _restart(self, start: int) -> None:
        self.restarts += self.next_position > 0
        self.column_sums.zero_()
        self.residual.zero_()
        self.stream.zero_()
        self.cached_tokens = start
        self.recomputed_tokens = 0
