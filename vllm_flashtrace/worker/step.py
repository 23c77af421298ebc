"""Records one engine step: shows the target rows in its batch what its layers show of them.

A request may be prefilled in several chunks, be preempted and start again; its `Trace` holds the
sums between steps. A fault while recording fails the traces it concerns and nothing else: the step,
its other requests and the other traces go on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.base.logs import log_unexpected
from vllm_flashtrace.kernels import SumsTouchedError
from vllm_flashtrace.worker.fingerprint import note_weights
from vllm_flashtrace.worker.recorded_trace import Trace
from vllm_flashtrace.worker.row_groups import RowGroup, Segment, row_group
from vllm_flashtrace.worker.step_rows import BatchRow
from vllm_flashtrace.worker.traced_model import TracedModel


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


def _together(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Segments by what is recorded of them."""
    return [[s for s in segments if s.trace.spec.heads is heads] for heads in (False, True)]
