"""The rows that a trace keeps as they are, for hops whose weights are not known yet."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.kernels import Accumulators, PagedRows, RowSegment
from vllm_flashtrace.trace.budget import ModelShape


class KeptRows:
    """What a trace's rows brought, so that any weights can be given to them when all are there.

    Each hop over the reasoning weighs the same rows anew, by the scores of the hop before, and each
    target rows of its own. With these and the keys and values in the cache, one prefill is enough.

    Attributes:
        positions: int64 ``[R]``, ascending, on the CPU.
        unweighed: float32 ``[R]``, ones, on the CPU.
        queries: ``[L, R, H, d]`` in the model's dtype, as the attention kernels saw them.
        residual: ``[L, R, D]``, the stream in front of the attention blocks.
        stream: ``[L, R, D]``, the stream behind them, or what they add to it; where that is
            normed, what they give to the norm.
        scales: float32 ``[L, R]``, ``1 / rms`` of what they give to the norm, or None.
        gates: ``[L, H, R]`` or ``[L, H, d, R]``, see `OutputGate`, or None.
        lse: float32 ``[L, H, R]``, the log-sum-exp of the queries, which each hop needs; or None.
        lse_told: Whether it was told of all rows and layers up to here.
    """

    def __init__(
        self,
        positions: Tensor,
        shape: ModelShape,
        head_dim: int,
        dtype: torch.dtype,
        device: Any,
        normed: bool = False,
        gate_width: int = 0,
        with_lse: bool = False,
        stream: bool = True,
    ) -> None:
        """Takes the memory; without `stream`, `residual` and `stream` have no rows."""
        self.positions = positions
        self.unweighed = torch.ones(len(positions))
        layers, rows = shape.num_layers, len(positions)
        stream_rows = rows if stream else 0
        empty = partial(torch.empty, dtype=dtype, device=device)
        with torch.inference_mode(False):  # They are written to with and without.
            self.queries = empty(layers, rows, shape.num_heads, head_dim)
            self.residual = empty(shape.stream_layers, stream_rows, shape.hidden_size)
            self.stream = empty(shape.stream_layers, stream_rows, shape.hidden_size)
            self.scales = empty(layers, rows, dtype=torch.float32) if normed else None
            gates = (layers, shape.num_heads, *([gate_width] if gate_width > 1 else []), rows)
            self.gates = empty(*gates) if gate_width else None
            lse = (layers, shape.num_heads, rows)
            self.lse = empty(*lse, dtype=torch.float32) if with_lse else None
        self.lse_told = with_lse

    @staticmethod
    def row_bytes(
        shape: ModelShape,
        head_dim: int,
        dtype: torch.dtype,
        normed: bool = False,
        gate_width: int = 0,
        with_lse: bool = False,
    ) -> int:
        """What a row takes."""
        width = shape.num_heads * (head_dim + gate_width)
        scale = torch.float32.itemsize * (normed + with_lse * shape.num_heads)
        stream = shape.stream_layers * 2 * shape.hidden_size * dtype.itemsize
        return shape.num_layers * (width * dtype.itemsize + scale) + stream

    @property
    def nbytes(self) -> int:
        """What all of them take."""
        more = [part.nbytes for part in (self.scales, self.gates, self.lse) if part is not None]
        return self.queries.nbytes + self.residual.nbytes + self.stream.nbytes + sum(more)

    def scales_of(self, layer: int, rows: PagedRows) -> Tensor | None:
        """The factors of rows that all heads share, as they lie here, float32 ``[R]``."""
        if self.scales is None:
            return None
        where = rows.adjacent
        return self.scales[layer, rows.places if where is None else where]

    def factors_of(self, layer: int, where: Tensor | slice) -> Tensor | None:
        """All factors of rows as they lie here, see `row_factors`."""
        scales = None if self.scales is None else self.scales[layer, where]
        return row_factors(scales, None if self.gates is None else self.gates[layer, ..., where])

    def place_of(self, positions: Tensor) -> slice:
        """Where consecutive ones of the positions are kept."""
        first = int(torch.searchsorted(self.positions, positions[0]))
        return slice(first, first + len(positions))

    def lse_of(self, layer: int) -> Tensor | None:
        """The log-sum-exp of all rows in a layer, float32 ``[H, R]``; None if it was not told."""
        return self.lse[layer] if self.lse is not None and self.lse_told else None

    def weighed(
        self,
        target: TargetWeights,
        block_table: Tensor,
        sums: Accumulators,
        mass: Tensor | None = None,
    ) -> RowSegment:
        """The rows of a target, as they lie here; their weights sum to 1."""
        target = target.normalised()
        rows = torch.searchsorted(self.positions, target.positions)
        return RowSegment(rows, target.positions, target.weights, block_table, sums, mass)


def row_factors(scales: Tensor | None, gates: Tensor | None) -> Tensor | None:
    """The factors on the weights of rows in a layer, see `AttentionInputs`; None for 1.

    Args:
        scales: float32 ``[R]``, those that all heads share, or None.
        gates: ``[H, R]`` or ``[H, d, R]``, those of each, or None.
    """
    if gates is None:
        return scales
    return gates.float() if scales is None else gates.float() * scales
