"""One trace while its request is prefilled: its sums, or the rows that it keeps, between steps."""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.core.hops import rows_of
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.kernels import Accumulators, RowSegment
from vllm_flashtrace.trace.wire import TraceSpec
from vllm_flashtrace.worker.clock import TimeSpent
from vllm_flashtrace.worker.fingerprint import WeightsSeen, numbers_of
from vllm_flashtrace.worker.kept_rows import KeptRows
from vllm_flashtrace.worker.step_rows import BatchRow
from vllm_flashtrace.worker.traced_model import TracedModel


class Trace:
    """One trace request's sums ``c``, ``r`` and ``x`` of every layer, while it is prefilled.

    Invariant: the sums hold each target position up to ``next_position`` exactly once, whatever the
    chunks, restarts and preemptions; `begin_chunk` fails the trace where that cannot be kept.

    Attributes:
        spec: What was asked for.
        adapter: Id of the LoRA adapter that the request is computed with, or None.
        targets: What is explained.
        target: Weights of the only hop, that sum to 1; None where rows are kept.
        rows: Where its rows are kept for several hops or targets, or None.
        first: Lowest position to be recorded.
        context: Number of tokens up to the last target.
        next_position: Where the next chunk is expected to begin.
        cached_tokens: Tokens that came from the prefix cache, or through a KV connector.
        recomputed_tokens: Tokens prefilled.
        restarts: How often recording began again after a preemption.
        started: Mark before the first chunk, or None.
        recording: Time spent on recording; on a GPU, on column sums.
        clock: Sets and reads those marks.
        sums: float32 ``[L, H, context]``, ``[L, D]`` and ``[L, D]``, see `Accumulators`; where
            ``spec.heads``, the column sums of attention itself, whatever factors its rows have.
        attention: float16 ``[L, H, context]``, if asked for: gets the column sums of attention
            itself when the trace is complete.
        unscaled: Where these are added up, if the weights of `sums` have a factor for each row and
            layer; else None.
        mass: See `RowSegment`; None where it is not measured.
        stream_lacks_residual: Whether ``x`` still is what the blocks add, without ``r`` and the
            gain of norms behind blocks.
        weights: Whether the model's weights were the same in all chunks.
        adapter_weights: Whether the adapter's were in all chunks with target rows.
    """

    def __init__(
        self,
        spec: TraceSpec,
        model: TracedModel,
        adapter: int | None = None,
    ) -> None:
        if spec.heads and model.head_weights is None:
            raise TraceError("recording_failed", "this worker has no weights of heads")
        self.spec = spec
        self.adapter = adapter
        self.targets = spec.traced_targets()
        self.context = max(target.weights.last for target in self.targets) + 1
        self.target: TargetWeights | None = None
        self.rows: KeptRows | None = None
        if spec.keeps_rows:
            positions = rows_of(self.targets)
            self.rows = model.keep_rows(positions, spec.heads)
            self.first = int(positions[0])
        else:
            self.target = self.targets[0].weights.normalised()
            self.first = self.target.first
        self.next_position = 0
        self.cached_tokens = 0
        self.recomputed_tokens = 0
        self.restarts = 0
        self._touched = False  # Whether the sums may be others than 0.
        self.stream_lacks_residual = False
        self.weights = WeightsSeen()
        self.adapter_weights = WeightsSeen()
        self.clock = model.clock
        self.started: Any = None
        self.recording = TimeSpent()
        shape = model.shape
        layers, heads, hidden = shape.num_layers, shape.num_heads, shape.hidden_size
        zeros = partial(torch.zeros, dtype=torch.float32, device=model.device)
        self.sums = Accumulators(
            zeros(layers, heads * (1 if spec.heads else shape.sums_per_head), self.context),
            zeros(shape.stream_layers, hidden),
            zeros(shape.stream_layers, hidden),
        )
        self.mass = zeros(layers, heads, 3) if model.measures_mass else None
        self.attention: Tensor | None = None
        self.unscaled: Accumulators | None = None
        if spec.attention:
            if spec.keeps_rows:
                raise ValueError("sums of attention are of one target without further hops")
            columns = layers, heads, self.context
            self.attention = torch.empty(columns, dtype=torch.float16, device=model.device)
            if model.scaled and not spec.heads:
                self.unscaled = self.sums._replace(column_sums=zeros(*columns))

    @cached_property
    def nbytes(self) -> int:
        """Size in bytes of the accumulators, the sums of attention and the rows that are kept."""
        more = 0 if self.rows is None else self.rows.nbytes
        more += 0 if self.attention is None else self.attention.nbytes
        more += 0 if self.unscaled is None else self.unscaled.column_sums.nbytes
        more += 0 if self.mass is None else self.mass.nbytes
        return more + sum(accumulator.nbytes for accumulator in self.sums)

    @property
    def weights_seen(self) -> Tensor | None:
        """As `WeightsSeen.numbers`, of the model and the adapter; None if one was not noted."""
        return numbers_of(self.weights, None if self.adapter is None else self.adapter_weights)

    @property
    def complete(self) -> bool:
        """Whether every target position has been recorded."""
        return self.next_position >= self.context

    def begin_chunk(self, row: BatchRow) -> RowSegment | None:
        """The target rows of a chunk that is about to be computed, or None if it has none.

        A request that is preempted starts again from a prefix-cache hit, which for a trace ends at
        or before its first target: everything recorded so far is then dropped.

        Raises:
            TraceError: ``recording_gap`` when target positions were computed unseen.
        """
        if self.started is None:
            self.started = self.clock.mark()
        self.recording.fold()
        if row.start != self.next_position:
            if row.start > self.first:
                raise TraceError(
                    "recording_gap",
                    f"positions {self.next_position} to {row.start} were computed without "
                    "recording",
                )
            self._restart(row.start)
        self.next_position = row.stop
        # Behind the last token there may be places for drafts.
        self.recomputed_tokens += min(row.stop, self.spec.length) - row.start
        if self.rows is not None:  # They are weighed when all of them are there.
            positions, weights = self.rows.positions, self.rows.unweighed
        else:
            assert self.target is not None
            positions, weights = self.target.positions, self.target.weights
        # NumPy, because this is done for every trace of every step.
        first, last = positions.numpy().searchsorted((row.start, row.stop)).tolist()
        if first == last:
            return None
        self._touched = True
        positions = positions[first:last]
        return RowSegment(
            rows=positions - (row.start - row.first_row),
            positions=positions,
            weights=weights[first:last],
            block_table=row.block_tables[0],
            sums=self.sums,
            mass=self.mass,
        )

    def _restart(self, start: int) -> None:
        self.restarts += self.next_position > 0
        if self._touched:
            for accumulator in self.sums:
                accumulator.zero_()
            if self.unscaled is not None:
                self.unscaled.column_sums.zero_()
            if self.mass is not None:
                self.mass.zero_()
        self._touched = False
        if self.rows is not None:
            self.rows.lse_told = self.rows.lse is not None
        self.cached_tokens = start
        self.recomputed_tokens = 0
