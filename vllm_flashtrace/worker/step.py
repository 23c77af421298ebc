"""Records one engine step: adds the target rows in its batch to the sums of their traces.

A request may be prefilled in several chunks, be preempted and start again; its `Trace` holds the
sums between steps. A fault while recording fails the traces it concerns and nothing else: the step,
its other requests and the other traces go on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.base.logs import log_unexpected
from vllm_flashtrace.core.hops import rows_of
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.kernels import (
    Accumulators,
    KeptQueries,
    PagedRows,
    RowSegment,
    SumsTouchedError,
    add_row_sums,
    touching_sums,
)
from vllm_flashtrace.kernels.paged_attention import check_lse
from vllm_flashtrace.trace.budget import ModelShape
from vllm_flashtrace.trace.wire import TraceSpec

if TYPE_CHECKING:
    from vllm_flashtrace.worker.traced_model import Clock, TracedModel


class StepRecorder:
    """Adds one step's target rows to their traces' sums.

    Attributes:
        model: The model that runs the step.
        groups: The target rows that are still being recorded.
    """

    def __init__(
        self,
        batch: Sequence[BatchRow],
        traces: dict[str, Trace],
        model: TracedModel,
        on_failure: Callable[[str, BaseException], None],
    ) -> None:
        """Finds the target rows.

        Args:
            batch: The step's requests.
            traces: The traces that are being recorded, by request id.
            model: The model that runs the step.
            on_failure: Called with the request id of a trace that failed, and why.
        """
        self.model = model
        self._on_failure = on_failure
        self._updates = 0
        self._residuals = 0
        self._blocks = 0
        self._attentions = 0
        self._block_inputs = 0
        self._other_updates = 0
        self._other_residuals = 0
        self.groups: list[RowGroup] = []
        segments = []
        rows = [row for row in batch if row.req_id in traces]
        if rows:
            note_weights([traces[row.req_id].weights for row in rows], model.fingerprint.take())
        for row in rows:
            if segment := self._begin(traces[row.req_id], row):
                segments.append(segment)
        summed = [segment for segment in segments if segment.trace.rows is None]
        for members in _together(summed) if model.batched else [[s] for s in summed]:
            self._plan(members)
        if len(self.groups) == 1:
            self.groups[0].keep(model.keep_queries(self.groups[0].rows))
        for segment in segments:
            if segment.trace.rows is not None:
                self._plan([segment])

    @property
    def segments(self) -> list[Segment]:
        """The target rows that are still being recorded."""
        return [segment for group in self.groups for segment in group.segments]

    def record_block_input(self, hidden_states: torch.Tensor) -> None:
        """Computes the gates of a layer's rows, factors on their weights in its column sums.

        Args:
            hidden_states: ``[tokens, D]``, what goes into the layer's attention block.
        """
        layer = self._block_inputs
        self._block_inputs += 1
        self._each(lambda group: group.take_gates(self.model, layer, hidden_states))

    def record_attention(
        self, layer: int, query: torch.Tensor, lse: torch.Tensor | None = None
    ) -> None:
        """Adds one layer's column sums, or readies them for `record_block` or `flush`.

        Args:
            layer: Layer index.
            query: ``[tokens, H, d]``, the step's queries as the attention kernel saw them.
            lse: See `observer.ForwardObserver.on_attention`.
        """
        self._attentions += 1
        self._each(
            lambda group: group.add_attention(self.model, layer, query, lse),
            timed=lambda group: group.kept is None,
        )

    def record_update(self, update: torch.Tensor, residual: torch.Tensor) -> None:
        """Adds ``sum_i w_i x_prev_i`` to ``r`` of a layer, and what leads from ``r`` to ``x``.

        Args:
            update: ``[tokens, D]``, what the attention block adds to the stream.
            residual: ``[tokens, D]``, the stream in front of it.
        """
        layer = self._updates
        self._updates += 1

        def add(group: RowGroup) -> None:
            group.add_rows(layer, residual=residual, stream=update)
            for segment in group.segments:
                segment.trace.stream_lacks_residual = True

        self._each(add, timed=self._times_row_sums)

    def record_residual(self, residual: torch.Tensor) -> None:
        """Adds ``sum_i w_i x_prev_i`` to ``r`` or ``sum_i w_i x_mid_i`` to ``x`` of a layer.

        The stream is seen twice per layer, before and after the attention block's output has been
        added to it, in this order; where `record_block` sees what is added, before it alone.

        Args:
            residual: ``[tokens, D]``.
        """
        layer, after = (self._residuals, 0) if self.model.normed else divmod(self._residuals, 2)
        self._residuals += 1

        def add(group: RowGroup) -> None:
            if after:
                group.add_rows(layer, stream=residual)
            else:
                group.add_rows(layer, residual=residual)

        self._each(add, timed=self._times_row_sums)

    def record_other_update(self, update: torch.Tensor, residual: torch.Tensor) -> None:
        """As `record_update`, of a layer that is not traced."""
        layer = self.model.shape.num_layers + self._other_updates
        self._other_updates += 1
        self._each(lambda group: group.add_rows(layer, residual=residual, stream=update))

    def record_other_residual(self, residual: torch.Tensor) -> None:
        """As `record_residual`, of a layer that is not traced."""
        other, after = divmod(self._other_residuals, 2)
        layer = self.model.shape.num_layers + other
        self._other_residuals += 1
        of = "stream" if after else "residual"
        self._each(lambda group: group.add_rows(layer, **{of: residual}))

    def record_block(self, output: torch.Tensor) -> None:
        """Takes what a layer's attention block gives to the norm that it passes.

        Every row's ``1 / rms`` is a factor on its weight, with which the column sums that
        `record_attention` has readied are added, and ``sum_i w_i / rms_i u_i`` to ``x``, which
        lacks the norm's gain and ``r`` until the trace ends.

        Args:
            output: ``[tokens, D]``, the block's output ``u``.
        """
        layer = self._blocks
        self._blocks += 1

        def add(group: RowGroup) -> None:
            group.add_block(layer, output)
            for segment in group.segments:
                segment.trace.stream_lacks_residual = True

        # One after the other, since a call that fails is repeated, see `_tell_apart`.
        self._each(
            lambda group: group.scale_rows(self.model, layer, output),
            timed=lambda group: group.kept is None,
        )
        self._each(add, timed=self._times_row_sums)

    def flush(self) -> None:
        """Adds the column sums that wait for the step's end; requests must hold their blocks."""
        if any(group.kept is not None and group.kept.layers for group in self.groups):
            self._each(self.model.add_kept_column_sums)

    def note_adapters(self) -> None:
        """Takes note of the adapters' weights; to be called behind the forward pass.

        A runner may make a step's adapters active after it has shown the step's requests.
        """
        numbers: dict[int, torch.Tensor] = {}
        for segment in self.segments:
            adapter = segment.trace.adapter
            if adapter is None:
                continue
            try:
                if adapter not in numbers:
                    numbers[adapter] = self.model.adapter_number(adapter)
                segment.trace.adapter_weights.note(numbers[adapter])
            except Exception as error:
                self._fail([segment], error)

    def check_complete(self) -> None:
        """Fails the step's traces unless every layer was seen exactly once."""
        layers = self.model.shape.num_layers
        # Each layer is seen in one of three ways, see `taps`.
        ways = {(layers, 0, 0), (0, 2 * layers, 0), (0, layers, layers)}
        seen = (self._updates, self._residuals, self._blocks)
        block_inputs = layers if self.model.gate_width else 0
        others = self.model.shape.other_layers
        called = self._attentions == layers and self._block_inputs == block_inputs
        called &= (self._other_updates, self._other_residuals) in {(others, 0), (0, 2 * others)}
        if called and seen in ways:
            return
        message = (
            f"of {layers} layers {self._attentions} attention calls, {self._updates} updates, "
            f"{self._residuals} residual streams, {self._blocks} blocks and {self._block_inputs} "
            "inputs of blocks were seen"
        )
        if others:
            message += (
                f", of {others} others {self._other_updates} updates and {self._other_residuals} "
                "residual streams"
            )
        error = TraceError("recording_incomplete", message)
        for group in list(self.groups):
            self._fail(group.segments, error)
        self.groups.clear()

    def _begin(self, trace: Trace, row: BatchRow) -> Segment | None:
        try:
            rows = trace.begin_chunk(row)
            return None if rows is None else Segment(trace, row, rows)
        except Exception as error:
            self._on_failure(row.req_id, error)
            return None

    def _plan(self, segments: list[Segment]) -> None:
        if not segments:
            return
        try:
            self.groups.append(row_group(segments, self.model))
        except Exception as error:
            if len(segments) == 1:
                self._fail(segments, error)
            else:
                for segment in segments:
                    self._plan([segment])

    def _times_row_sums(self, _: RowGroup) -> bool:
        return self.model.clock.costs_nothing

    def _each(
        self,
        add: Callable[[RowGroup], None],
        timed: Callable[[RowGroup], bool] = lambda _: True,
    ) -> None:
        for group in list(self.groups):
            try:
                group.run(add, timed(group))
            except Exception as error:
                self.groups.remove(group)
                self._tell_apart(group, add, error)

    def _tell_apart(
        self, group: RowGroup, add: Callable[[RowGroup], None], error: Exception
    ) -> None:
        """Repeats a call that failed for each trace alone; those it fails for again have failed.

        Where it had begun to add, the fault is of all: a part would be counted twice. It is also
        where it has spoilt the device, since every repetition then fails.
        """
        if isinstance(error, SumsTouchedError):
            self._fail(group.segments, error.__cause__ or error)
            return
        if len(group.segments) == 1:
            self._fail(group.segments, error)
            return
        log_unexpected("recording traces together; each goes on alone", error)
        for index, segment in enumerate(group.segments):
            before = len(self.groups)
            self._plan([segment])
            for alone in self.groups[before:]:
                try:
                    alone.take_over(group, index)
                    add(alone)
                except Exception as own:
                    self.groups.remove(alone)
                    self._tell_apart(alone, add, own)

    def _fail(self, segments: Sequence[Segment], error: BaseException) -> None:
        for segment in segments:
            self._on_failure(segment.batch_row.req_id, error)


@dataclass(frozen=True, slots=True)
class BatchRow:
    """One request's place in a step.

    Attributes:
        req_id: The engine's request id.
        first_row: Its first row among the step's tokens.
        start: Absolute position of that row, i.e. tokens computed before this step.
        stop: Absolute position after its last row.
        block_tables: int32, ids of the request's KV blocks as the attention kernels count them, on
            the step's device; one for each group of `cache_groups.CacheGroups`.
    """

    req_id: str
    first_row: int
    start: int
    stop: int
    block_tables: Sequence[torch.Tensor]


class WeightsSeen:
    """Whether the weights were the same in all steps of one trace.

    Attributes:
        numbers: int64 ``[2]`` on the device: the number at the first step, and 0 for as long as it
            has been the same since. Never written to: those of several traces may be the same.
    """

    def __init__(self) -> None:
        self.numbers: torch.Tensor | None = None

    def note(self, number: torch.Tensor) -> None:
        """Takes note of a step's `WeightsFingerprint`; never waits for a GPU."""
        note_weights([self], number)


def note_weights(seen: Sequence[WeightsSeen], number: torch.Tensor) -> None:
    """As `WeightsSeen.note` for several at once, in one go for all with the same past."""
    noted: dict[int, torch.Tensor] = {}
    for each in seen:
        before = each.numbers
        if id(before) not in noted:
            if before is None:
                after = torch.stack([number, torch.zeros_like(number)])
            else:
                after = torch.stack([before[0], before[1] | (before[0] ^ number)])
            noted[id(before)] = after
        each.numbers = noted[id(before)]


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
    def weights_seen(self) -> torch.Tensor | None:
        """As `WeightsSeen.numbers`, of the model and the adapter; None if one was not noted."""
        model, adapter = self.weights.numbers, self.adapter_weights.numbers
        if self.adapter is None or model is None:
            return model
        if adapter is None:
            return None
        return torch.stack([model[0] ^ adapter[0], model[1] | adapter[1]])

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
            self.rows.lse_known = self.rows.lse is not None
        self.cached_tokens = start
        self.recomputed_tokens = 0


@dataclass(frozen=True, slots=True)
class Segment:
    """A trace's target rows within a step."""

    trace: Trace
    batch_row: BatchRow
    row_segment: RowSegment


def row_group(segments: list[Segment], model: TracedModel) -> RowGroup:
    """Readies segments for recording: of traces that keep rows one, or any number of others."""
    rows = model.plan_rows([segment.row_segment for segment in segments])
    kept, heads = segments[0].trace.rows, segments[0].trace.spec.heads
    if kept is None and heads:
        return HeadsGroup(segments, rows, model.clock)
    if kept is None:
        scales = None
        if model.normed:
            scales = _new_scales(model.shape.num_layers, len(rows), model.device)
        return RowGroup(segments, rows, model.clock, scales, _unscaled(segments, model))
    [segment] = segments
    return (KeptHeadsGroup if heads else KeptGroup)(segment, rows, model.clock, kept)


def _together(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Segments by what is recorded of them."""
    return [[s for s in segments if s.trace.spec.heads is heads] for heads in (False, True)]


def _unscaled(segments: Sequence[Segment], model: TracedModel) -> RowGroup | None:
    """Those whose column sums are also added up without factors on the weights, or None."""
    own = [
        replace(segment, row_segment=replace(segment.row_segment, sums=sums, mass=None))
        for segment in segments
        if (sums := segment.trace.unscaled) is not None
    ]
    if not own:
        return None
    rows = model.plan_rows([segment.row_segment for segment in own])
    return RowGroup(own, rows, model.clock)


class RowGroup:
    """Segments that are recorded in one call.

    Attributes:
        segments: The segments.
        rows: Their target rows.
        kept: Where their queries wait for the end of the step; None where they do not.
        scales: float32 ``[L, R]``, the factors on the rows' weights that layers have, where their
            blocks are normed; else None. Four bytes a row and layer.
        waiting: ``[R, H, d]``, a layer's queries that wait for these factors, or None.
        waiting_lse: float32 ``[H, R]``, their log-sum-exp, if it was told.
        gates: float32 ``[H, R]`` or ``[H, d, R]``, the gates of the layer that is being recorded,
            see `OutputGate`, or None.
        unscaled: Those whose column sums are also wanted without the factors, see `Trace`.
    """

    def __init__(
        self,
        segments: list[Segment],
        rows: PagedRows,
        clock: Clock,
        scales: Tensor | None = None,
        unscaled: RowGroup | None = None,
    ) -> None:
        """Begins to time their recording."""
        self.segments = segments
        self.rows = rows
        self.kept: KeptQueries | None = None
        self._rows_in: dict[tuple[int, int], PagedRows] = {}
        self.scales = scales
        self.waiting: Tensor | None = None
        self.waiting_lse: Tensor | None = None
        self.gates: Tensor | None = None
        self.unscaled = unscaled
        self._clock = clock
        self._pieces = Pieces(clock)
        for segment in segments:
            segment.trace.recording.include(self._pieces)

    def rows_in(self, place: int, rows: PagedRows) -> PagedRows:
        """Its rows with the block tables of one group of the KV cache.

        Args:
            place: The group's place in `cache_groups.CacheGroups`.
            rows: `rows`, or the same in a row.
        """
        if place == 0:
            return rows
        key = place, id(rows)  # Both live as long as this does.
        if key not in self._rows_in:
            tables = [segment.batch_row.block_tables[place] for segment in self.segments]
            self._rows_in[key] = rows.with_block_tables(tables)
        return self._rows_in[key]

    def run(self, add: Callable[[RowGroup], None], timed: bool) -> None:
        """Calls ``add`` with the group, and counts the time if it returns and is to be timed."""
        if not timed:
            add(self)
            return
        began = self._clock.mark()
        add(self)
        self._pieces.add(began, self._clock.mark())

    def keep(self, kept: KeptQueries | None) -> None:
        """Lets queries wait for the end of the step."""
        self.kept = kept
        if kept is not None:
            kept.scales = self.scales

    def take_over(self, group: RowGroup, index: int) -> None:
        """Goes on alone with one segment of a group, from where the group is."""
        if self.scales is not None and group.scales is not None:
            self.scales.copy_(group.rows.of_segment(group.scales, index))
        if group.gates is not None:
            self.gates = group.rows.of_segment(group.gates, index)
        if group.waiting is not None:
            first = group.rows.first_row(index)
            self.waiting = group.waiting[first : first + len(self.rows)]
        if group.waiting_lse is not None:
            self.waiting_lse = group.rows.of_segment(group.waiting_lse, index)
        if group.kept is not None:
            self.keep(group.kept.of_segment(index, self.rows))

    def take_gates(self, model: TracedModel, layer: int, hidden_states: Tensor) -> None:
        """Computes the gates with which the layer's column sums are added."""
        self.gates = model.row_gates(layer, self.rows, hidden_states)

    def add_attention(
        self, model: TracedModel, layer: int, query: Tensor, lse: Tensor | None
    ) -> None:
        """Adds a layer's column sums, or lets its queries wait for what else they need."""
        heads = model.heads_of(layer, query)
        if self.unscaled is None:
            self._add_attention(model, layer, heads, lse)
            return
        model.add_column_sums(layer, heads, self.unscaled, self.unscaled.rows, None, lse)
        with touching_sums():
            self._add_attention(model, layer, heads, lse)

    def _add_attention(
        self, model: TracedModel, layer: int, heads: Tensor, lse: Tensor | None
    ) -> None:
        if self.kept is not None and self.kept.keep(layer, heads, lse):
            return
        if self.scales is None:
            model.add_column_sums(layer, heads, self, self.rows, self.gates, lse)
        else:  # The memory of the step's queries may be used again before the block has run.
            self.waiting = _picked(heads, self.rows)
            self.waiting_lse = None if lse is None else lse.index_select(1, self.rows.places)

    def scale_rows(self, model: TracedModel, layer: int, output: Tensor) -> None:
        """Finds the rows' factors in a layer, and adds the column sums that wait for them."""
        assert self.scales is not None
        scales = _of_layer(self.scales, layer)
        model.row_scales(layer, self.rows, output, scales)
        if self.waiting is not None:
            factors = row_factors(scales, self.gates)
            rows, lse = self.rows.in_a_row, self.waiting_lse
            model.add_column_sums(layer, self.waiting, self, rows, factors, lse)
            self.waiting = self.waiting_lse = None

    def add_block(self, layer: int, output: Tensor) -> None:
        """Adds what a block gives to the norm behind it."""
        assert self.scales is not None
        self.add_rows(layer, stream=output, scales=_of_layer(self.scales, layer))

    def add_rows(
        self,
        layer: int,
        *,
        residual: Tensor | None = None,
        stream: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> None:
        """See `kernels.add_row_sums`."""
        add_row_sums(self.rows, layer, residual=residual, stream=stream, scales=scales)


class KeptGroup(RowGroup):
    """A segment whose rows are kept as they are, see `KeptRows`; nothing is added yet."""

    def __init__(self, segment: Segment, rows: PagedRows, clock: Clock, kept: KeptRows) -> None:
        """As `RowGroup`."""
        super().__init__([segment], rows, clock)
        self._kept = kept
        self._place = kept.place_of(segment.row_segment.positions)

    def take_gates(self, model: TracedModel, layer: int, hidden_states: Tensor) -> None:
        """Keeps the gates."""
        assert self._kept.gates is not None
        gates = model.row_gates(layer, self.rows, hidden_states)
        self._kept.gates[layer, ..., self._place] = gates

    def add_attention(
        self, model: TracedModel, layer: int, query: Tensor, lse: Tensor | None
    ) -> None:
        """Keeps the queries, and their log-sum-exp."""
        self._keep(self._kept.queries, layer, model.heads_of(layer, query))
        if self._kept.lse is None:
            return
        if lse is None:
            self._kept.lse_known = False
        else:
            check_lse(lse, self.rows)
            where = self.rows.adjacent
            picked = lse[:, self.rows.places if where is None else where]
            self._kept.lse[layer, :, self._place] = picked

    def scale_rows(self, model: TracedModel, layer: int, output: Tensor) -> None:
        """Keeps the rows' factors."""
        assert self._kept.scales is not None
        # Where they are kept need not be an address that kernels are compiled for.
        scales = torch.empty(len(self.rows), dtype=torch.float32, device=output.device)
        model.row_scales(layer, self.rows, output, scales)
        _of_layer(self._kept.scales, layer)[self._place] = scales

    def add_block(self, layer: int, output: Tensor) -> None:
        """Keeps what the block gives to the norm behind it."""
        self._keep(self._kept.stream, layer, output)

    def add_rows(
        self,
        layer: int,
        *,
        residual: Tensor | None = None,
        stream: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> None:
        """Keeps the rows of the stream."""
        if residual is not None:
            self._keep(self._kept.residual, layer, residual)
        if stream is not None:
            self._keep(self._kept.stream, layer, stream)

    def _keep(self, kept: Tensor, layer: int, rows: Tensor) -> None:
        where = self.rows.adjacent
        kept[layer, self._place] = rows[self.rows.places if where is None else where]


class _AttentionAlone:
    """Of traces with `TraceSpec.heads`: no factors on the weights of rows, and no stream."""

    def take_gates(self, model: TracedModel, layer: int, hidden_states: Tensor) -> None:
        """See `RowGroup`."""

    def scale_rows(self, model: TracedModel, layer: int, output: Tensor) -> None:
        """See `RowGroup`."""

    def add_block(self, layer: int, output: Tensor) -> None:
        """See `RowGroup`."""

    def add_rows(self, layer: int, **rows: Tensor | None) -> None:
        """See `RowGroup`."""


class HeadsGroup(_AttentionAlone, RowGroup):
    """Segments of whose rows nothing but the attention is recorded."""


class KeptHeadsGroup(_AttentionAlone, KeptGroup):
    """A segment of whose rows the queries are kept, and nothing else."""


def _of_layer(scales: Tensor | None, layer: int) -> Tensor:
    if scales is None:
        raise TraceError("recording_failed", "the norm behind a block was not expected")
    return scales[layer]


def row_factors(scales: Tensor | None, gates: Tensor | None) -> Tensor | None:
    """The factors on the weights of rows in a layer, see `AttentionInputs`; None for 1.

    Args:
        scales: float32 ``[R]``, those that all heads share, or None.
        gates: ``[H, R]`` or ``[H, d, R]``, those of each, or None.
    """
    if gates is None:
        return scales
    return gates.float() if scales is None else gates.float() * scales


def _picked(heads: Tensor, rows: PagedRows) -> Tensor:
    """A copy of the target rows' queries, in a row."""
    # Eight-bit floats cannot be indexed.
    stored = heads.view(torch.uint8) if heads.itemsize == 1 else heads
    return stored.index_select(0, rows.places).view(heads.dtype)


def _new_scales(layers: int, rows: int, device: torch.device) -> Tensor:
    """``[L, R]``; each layer's begin at an address that kernels are compiled for."""
    padded = -(-rows // 4) * 4
    with torch.inference_mode(False):  # They are written to with and without.
        return torch.empty(layers, padded, dtype=torch.float32, device=device)[:, :rows]


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
        lse_known: Whether it was told of all rows and layers up to here.
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
        self.lse_known = with_lse

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
        return self.lse[layer] if self.lse is not None and self.lse_known else None

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


class Pieces:
    """The pieces of recording of one step, which several traces share."""

    def __init__(self, clock: Clock) -> None:
        """Starts without a piece."""
        self._clock = clock
        self._marks: list[tuple[Any, Any]] = []
        self._seconds = 0.0

    @property
    def passed(self) -> bool:
        """Whether the device has passed all of them."""
        return not self._marks or self._clock.passed(self._marks[-1][1])

    def add(self, began: Any, ended: Any) -> None:
        """Adds the piece between two marks."""
        self._marks.append((began, ended))

    def seconds(self) -> float:
        """All pieces together; the device must have passed them."""
        self._seconds += sum(self._clock.seconds(*marks) for marks in self._marks)
        self._marks.clear()
        return self._seconds


class TimeSpent:
    """Time spent on recording a trace.

    A long trace has thousands of pieces, so those that the device has passed are added up step by
    step and not when the result is picked up.
    """

    def __init__(self) -> None:
        """Starts at 0."""
        self._seconds = 0.0
        self._steps: list[Pieces] = []

    def include(self, pieces: Pieces) -> None:
        """Counts what has been, and will be, added to ``pieces``."""
        self._steps.append(pieces)

    def fold(self) -> None:
        """Adds up the steps that are over; must not be called between those of a step's layers."""
        while self._steps and self._steps[0].passed:
            self._seconds += self._steps.pop(0).seconds()

    def seconds(self) -> float:
        """All of it; the device must have passed it."""
        return self._seconds + sum(pieces.seconds() for pieces in self._steps)
