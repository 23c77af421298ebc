"""From the sums of a recorded trace to its scores: what is done in the step that finishes it.

Everything that grows with layers times tokens is queued on the device in that step, and what the
API server needs is copied to the host behind it, without waiting; only `run_hops` waits, for the
scores that the next hop begins with. Picking a result up later only reads the host's copy.

    `measure`          the proximity pass of all traces that end; leaves each layer's proximities
                       and their totals
    `TotalsExchange`   adds up the totals of the ranks that share the heads
    `score`            shares of the totals, summed over layers, on their way to the host
    `run_hops`         all of it, hop after hop, target after target, for a trace that has kept its
                       rows
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.base.logs import log_unexpected
from vllm_flashtrace.core import head_scores
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.kernels import (
    Accumulators,
    ProximityTrace,
    SumsTouchedError,
    sum_shares,
    touching_sums,
)
from vllm_flashtrace.trace.budget import ModelShape
from vllm_flashtrace.trace.wire import ModelPart, WireReport, tensor_bytes
from vllm_flashtrace.worker.step import HeadsGroup, RowGroup, Segment, Trace

if TYPE_CHECKING:
    from vllm_flashtrace.worker.traced_model import TracedModel

HOST_BYTES = 1 << 30
"""Most memory that a worker's results may take on the host while they wait for pick-up."""

MOST_IMBALANCE = 1e-3
"""How far column sums may be from what they must add up to, as a part of the rows' weights.

They must where a log-sum-exp is that of the kernels' own logits. The engine's attention multiplies
the same sixteen-bit numbers and only adds in another order, which makes about 1e-6 of a logit, and
logits are at most some hundreds.
"""

_ALIGNMENT = 16
_PAGE = 1 << 16


@dataclass(slots=True, eq=False)
class Measured:
    """A trace after its proximity pass, on the device.

    Attributes:
        trace: The trace; its column sums now hold the proximities.
        tokens: float32 ``[L, N]``, each token's proximity summed over this rank's heads.
        totals: float64 ``[L]``, `tokens` summed over tokens.
        residual: float64 ``[L]``, the proximity of the residual, the same on every rank.
        changes: float64 ``[2]``, L1 norms of ``x - r`` summed over the traced layers and over all
            layers; None where all are traced or the others are not seen.
        mass: See `RowSegment`; None where it is not measured.
        recorded: Mark at the end of the last recording step.
        own: float64 ``[L]``, `totals` and `residual` together, where they have been added up.
    """

    trace: Trace
    tokens: Tensor
    totals: Tensor
    residual: Tensor
    recorded: Any
    changes: Tensor | None = None
    mass: Tensor | None = None
    own: Tensor | None = None


def measure(
    segments: Sequence[Segment],
    model: TracedModel,
    on_failure: Callable[[str, BaseException], None],
) -> dict[str, Measured]:
    """Runs the proximity pass of all layers; must be called while the blocks are held.

    A layer's proximities take the place of its first head's column sums, which nobody needs then.
    Traces whose output projection is the same are measured together where the model can do that; if
    they fail before anything has changed, each is measured alone.

    Args:
        segments: Of traces whose last target row is recorded.
        model: The model that ran the step.
        on_failure: Called with the request id of a trace that failed, and why.

    Returns:
        By request id.
    """
    groups: dict[Any, list[Segment]] = defaultdict(list)
    for segment in segments:
        alone = segment.trace.spec.heads or not model.batched
        groups[segment.batch_row.req_id if alone else segment.trace.adapter].append(segment)
    measured: dict[str, Measured] = {}
    waiting = list(groups.values())
    for group in waiting:
        try:
            measured.update(_measure_together(group, model))
        except Exception as error:
            if len(group) > 1 and not isinstance(error, SumsTouchedError):
                log_unexpected("measuring traces together; each goes on alone", error)
                waiting += [[segment] for segment in group]
                continue
            for segment in group:
                touched = isinstance(error, SumsTouchedError)
                on_failure(segment.batch_row.req_id, (touched and error.__cause__) or error)
    return measured


def _measure_together(segments: Sequence[Segment], model: TracedModel) -> dict[str, Measured]:
    if segments[0].trace.spec.heads:
        return {s.batch_row.req_id: _measure_heads(s, model.head_weights) for s in segments}
    traces = [segment.trace for segment in segments]
    recorded = traces[0].clock.mark()
    _complete_sums(segments, model)
    size = (len(traces), 2, model.shape.num_layers)
    results = torch.empty(size, dtype=torch.float64, device=model.device)
    layers = model.shape.num_layers
    inputs = [
        ProximityTrace(
            _of_layers(segment.row_segment.sums, layers),
            segment.batch_row.block_tables[0],
            totals,
            residual,
            segment.trace.spec.exact_fraction,
        )
        for segment, (totals, residual) in zip(segments, results, strict=True)
    ]
    tables = [segment.batch_row.block_tables for segment in segments]
    for trace in traces:
        if trace.attention is not None:  # Proximities are about to take the place of the sums.
            trace.attention.copy_((trace.unscaled or trace.sums).column_sums)
    changes = [_changes(segment.row_segment.sums, model.shape) for segment in segments]
    model.replace_by_proximities(inputs, tables, traces[0].adapter)
    owns = results[:, 0] + results[:, 1]
    return {
        segment.batch_row.req_id: Measured(
            segment.trace,
            one.sums.column_sums[:, 0],
            one.totals,
            one.residual,
            recorded,
            change,
            segment.row_segment.mass,
            own,
        )
        for segment, one, change, own in zip(segments, inputs, changes, owns, strict=True)
    }


def _measure_heads(segment: Segment, weights: Tensor | None) -> Measured:
    """As `Measured` with ``sum_h theta_h c_h[j]`` in the place of proximities, and no residual."""
    if weights is None:
        raise ValueError("there are no weights of heads")
    trace, sums = segment.trace, segment.row_segment.sums.column_sums
    recorded = trace.clock.mark()
    if trace.attention is not None:
        trace.attention.copy_(sums)
    with touching_sums():
        tokens = head_scores(weights, sums, out=sums[:, 0])
    totals = tokens.sum(1, dtype=torch.float64)
    mass = segment.row_segment.mass
    return Measured(trace, tokens, totals, torch.zeros_like(totals), recorded, mass=mass)


def _of_layers(sums: Accumulators, layers: int) -> Accumulators:
    """The sums of the layers that are traced."""
    return sums._replace(residual=sums.residual[:layers], stream=sums.stream[:layers])


def _changes(sums: Accumulators, shape: ModelShape) -> Tensor | None:
    """`Measured.changes` of complete sums."""
    if not shape.other_layers:
        return None
    change = (sums.stream - sums.residual).abs().sum(dim=1, dtype=torch.float64)
    return torch.stack([change[: shape.num_layers].sum(), change.sum()])


def _complete_sums(segments: Sequence[Segment], model: TracedModel) -> None:
    """Makes ``x`` of all layers the sums of the stream behind the blocks."""
    lacking = [segment for segment in segments if segment.trace.stream_lacks_residual]
    if lacking:
        streams = [segment.row_segment.sums.stream for segment in lacking]
        if model.normed:
            torch._foreach_mul_(streams, [model.gains()] * len(streams))
        torch._foreach_add_(streams, [segment.row_segment.sums.residual for segment in lacking])
    for segment in lacking:
        segment.trace.stream_lacks_residual = False


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


def score(
    measured: Measured,
    totals: Tensor | None,
    part: ModelPart,
    buffers: HostBuffers,
    first_head: int = 0,
) -> FinishedTrace:
    """Makes the scores ``e_j`` of each token, summed over the layers of this stage.

    ``e_j = sum_h prox(f_jh) / (sum_jh prox(f_jh) + prox(r))`` (section 3.2), where the denominator
    runs over the heads of all ranks and the numerator over those of this one. With weights of heads
    ``e_j = sum_h theta_h c_h[j]``, which has no denominator: whoever takes the scores divides them
    by their sum, when ranks and stages are added up.

    Args:
        measured: The trace after its proximity pass; `tokens` is overwritten.
        totals: float64 ``[>= L]``, `Measured.totals` summed over all ranks; None where this rank
            has all the heads.
        part: What of the model it is of.
        buffers: Where the result goes.
        first_head: See `TracedModel`.

    Raises:
        TraceError: ``overloaded``: there is no room for it on the host.
        ValueError: It was recorded in no step.
    """
    trace = measured.trace
    scores = _scores(measured, totals)
    copied = _copy([[part] for part in scores], trace, buffers, measured.tokens)
    facts = TraceFacts.of(trace, part, first_head, changes=measured.changes is not None)
    return FinishedTrace(facts, copied, measured.recorded, trace.clock.mark())


def run_hops(
    segment: Segment, model: TracedModel, buffers: HostBuffers, spare_bytes: int
) -> FinishedTrace:
    """All hops of all targets of a trace whose rows are kept, as far as `FurtherHops` ask for them.

    The targets go from hop to hop side by side, as many at once as there is room for their sums.
    Must be called while the blocks are held, by a worker that has the whole model. Waits for each
    hop's scores that a next one's weights are made of.

    Args:
        segment: Of the trace, whose last row is there.
        model: The model that ran the step.
        buffers: Where the result goes.
        spare_bytes: What the sums of further targets may take besides the trace's own.

    Raises:
        TraceError: ``overloaded``: there is no room for it on the host.
    """
    trace = segment.trace
    recorded = trace.clock.mark()
    hops: list[list[tuple[Tensor, ...]]] = [[] for _ in trace.targets]
    waiting = [(index, target.weights, 1.0) for index, target in enumerate(trace.targets)]
    own = sum(sums.nbytes for sums in trace.sums)
    more = min(len(waiting) - 1, max(0, spare_bytes) // own)
    sums = [trace.sums, *(Accumulators(*map(torch.empty_like, trace.sums)) for _ in range(more))]
    while waiting:
        together, waiting = waiting[: len(sums)], waiting[len(sums) :]
        found = _weigh(segment, [weights for _, weights, _ in together], sums, model)
        for (index, _, mass), result in zip(together, found, strict=True):
            hops[index].append(result)
            further = trace.targets[index].further
            if further is not None and len(hops[index]) <= further.hops:
                weights, mass = further.after(result[0], mass)
                if weights is not None:
                    waiting.append((index, weights, mass))
    in_order = [hop for of_target in hops for hop in of_target]
    parts: list[list[Tensor]] = [list(part) for part in zip(*in_order, strict=True)]
    copied = _copy(parts, trace, buffers)
    ended = trace.clock.mark()
    counts = tuple(map(len, hops))
    changes = model.shape.other_layers > 0 and not trace.spec.heads
    facts = TraceFacts.of(trace, model.part, changes=changes)
    return FinishedTrace(facts, copied, recorded, ended, counts)


def _weigh(
    segment: Segment,
    targets: Sequence[TargetWeights],
    sums: Sequence[Accumulators],
    model: TracedModel,
) -> list[tuple[Tensor, ...]]:
    """One hop of each target over kept rows, see `_scores`; overwrites as many of the sums."""
    trace = segment.trace
    kept = trace.rows
    if kept is None:
        raise ValueError("the trace has kept no rows")
    groups = []
    recorded = HeadsGroup if trace.spec.heads else RowGroup
    for weights, own in zip(targets, sums, strict=False):
        for accumulator in own:
            accumulator.zero_()
        mass = None if trace.mass is None else torch.zeros_like(trace.mass)
        rows = kept.weighed(weights, segment.batch_row.block_tables[0], own, mass)
        hop = Segment(trace, segment.batch_row, rows)
        groups.append(recorded([hop], model.plan_rows([rows]), model.clock))
    groups[0].run(lambda _: model.weigh_together(kept, groups), timed=True)
    lacking = trace.stream_lacks_residual
    found = []
    for group in groups:
        measured = _measure_together(group.segments, model)
        found.append(_scores(measured[segment.batch_row.req_id], None))
        trace.stream_lacks_residual = lacking  # So do the sums of the next target, and of any hop.
    return found


def _scores(measured: Measured, totals: Tensor | None) -> tuple[Tensor, ...]:
    """Scores ``[length]``, this rank's proximities ``[L]`` and all ranks', see `score`.

    Behind them `Measured.mass` and `Measured.changes`, if there are any.
    """
    trace, tokens = measured.trace, measured.tokens
    own = measured.totals + measured.residual if measured.own is None else measured.own
    denominators = own if totals is None else totals[: len(own)] + measured.residual
    # Behind the last target, where nothing flows from, scores are 0.
    scores = torch.empty(trace.spec.length, device=tokens.device)
    # Weights of heads compare layers with each other; a layer's total is no unit of theirs.
    units = torch.ones_like(denominators) if trace.spec.heads else denominators
    sum_shares(tokens, units, scores, keep=trace.spec.layers)
    more = [part for part in (measured.mass, measured.changes) if part is not None]
    return scores, own, denominators, *more


def _copy(
    parts: Sequence[list[Tensor]], trace: Trace, buffers: HostBuffers, tokens: Tensor | None = None
) -> HostCopy:
    """Queues the copy of a trace's numbers: of each part one tensor a hop, and scores per layer."""
    weights = trace.weights_seen
    if weights is None:
        raise ValueError("the weights of no step were noted")
    stacked = [part[0][None] if len(part) == 1 else torch.stack(part) for part in parts]
    _, own, denominators, *_ = parts
    if own[0] is denominators[0] and len(own) == 1:
        stacked[2] = stacked[1]  # Which is then copied once.
    layers = [tokens] if tokens is not None and trace.spec.layers else []
    attention = [] if trace.attention is None else [trace.attention]
    return buffers.copy([*stacked, weights, *layers, *attention])


@dataclass(frozen=True, slots=True, eq=False)
class FinishedTrace:
    """A trace whose scores are on the host, or under way to it.

    Attributes:
        facts: What is to be told of the trace beside its scores.
        copied: float32 ``[hops, length]``, the scores; float64 ``[hops, L]``, the proximities of
            all tokens and the residual over this rank's heads; float64 ``[hops, L]``, over all
            ranks'; float32 ``[hops, L, H, 3]``, `Measured.mass`, and float64
            ``[hops, 2]``, `Measured.changes`, if there are any; int64 ``[2]``, see `WeightsSeen`;
            and, if the trace asked for them, the scores per layer, float32 ``[L, context]``, and
            the sums of attention, see `Trace.attention`.
        recorded: Mark at the end of the last recording step.
        ended: Mark after the scores.
        hops: How many hops each target has.
    """

    facts: TraceFacts
    copied: HostCopy
    recorded: Any
    ended: Any
    hops: tuple[int, ...] = (1,)

    def report(self) -> WireReport:
        """The trace's report, once `copied` has arrived.

        Raises:
            TraceError: ``weights_changed`` when not all steps had the same weights,
                ``recording_failed`` when a proximity is not finite or column sums do not add up,
                ``result_missing`` when a proximity of another rank is not finite.
        """
        facts = self.facts
        scores, own, denominators, *asked = self.copied.tensors
        mass = asked.pop(0) if facts.mass else None
        changes = asked.pop(0) if facts.changes else None
        weights = asked.pop(0)
        attention = asked.pop() if facts.attention else None
        _check_weights(weights)
        self._check(own, "recording_failed", "a proximity of layer {} is not finite")
        self._check(denominators, "result_missing", "another rank has no totals of layer {}")
        if mass is not None:
            self._check_mass(mass)
        per_layer = asked[0] if asked else None
        return WireReport(
            status="completed",
            scores=tensor_bytes(scores),
            hops=self.hops,
            layer_scores=b"" if per_layer is None else self._padded(per_layer),
            num_layers=0 if per_layer is None else len(per_layer),
            attention=b"" if attention is None else _bytes_of(attention),
            first_head=0 if attention is None else facts.first_head,
            num_heads=0 if attention is None else attention.shape[1],
            recomputed_tokens=facts.recomputed_tokens,
            cached_tokens=facts.cached_tokens,
            restarts=facts.restarts,
            seconds=self._seconds(),
            part=facts.part,
            weights=_weights_text(weights),
            changes=b"" if changes is None else tensor_bytes(changes, torch.float64),
        )

    def _padded(self, layers: Tensor) -> bytes:
        """The bytes of ``[L, length]``; a view of the host's copy, to be encoded at once."""
        if behind := self.facts.length - layers.shape[1]:
            layers = torch.nn.functional.pad(layers, (0, behind))
        return _bytes_of(layers)

    def _check(self, sums: Tensor, code: str, message: str) -> None:
        finite = sums.isfinite()
        if not bool(finite.all()):
            layer = self.facts.part.traced_layers[int((~finite).nonzero()[0, 1])]
            raise TraceError(code, message.format(layer))

    def _check_mass(self, mass: Tensor) -> None:
        expected, weights, added = mass.unbind(-1)
        imbalance = ((added - expected).abs() / weights).amax(dim=(0, 2))
        worst, layer = imbalance.max(dim=0)
        if not float(worst) <= MOST_IMBALANCE:
            number = self.facts.part.traced_layers[int(layer)]
            raise TraceError(
                "recording_failed",
                f"attention weights of layer {number} do not add up: off by {float(worst):.2g}",
            )

    def _seconds(self) -> dict[str, float]:
        facts = self.facts
        recording = facts.recording_seconds()
        return {
            "prefill": max(0.0, facts.clock.seconds(facts.started, self.recorded) - recording),
            "recording": recording,
            "proximity": facts.clock.seconds(self.recorded, self.ended),
        }


def _bytes_of(tensor: Tensor) -> bytes:
    """A view of a contiguous tensor's bytes, to be encoded at once."""
    return cast(bytes, tensor.view(torch.uint8).numpy().data.cast("B"))


@dataclass(frozen=True, slots=True, eq=False)
class FinishedScore:
    """What became of a `ScoreSpec`, on the host or under way to it.

    Attributes:
        part: What of the model the worker holds.
        copied: int64 ``[2]``, see `WeightsSeen`; and, where the logits are, float32 ``[P]``, the
            log-probabilities.
        recomputed_tokens: Tokens prefilled.
        cached_tokens: Tokens that came from the prefix cache.
    """

    part: ModelPart
    copied: HostCopy
    recomputed_tokens: int
    cached_tokens: int

    def report(self) -> WireReport:
        """Its report, once `copied` has arrived.

        Raises:
            TraceError: ``weights_changed`` when not all steps had the same weights,
                ``recording_failed`` when a log-probability is not finite.
        """
        weights, *log_probs = self.copied.tensors
        _check_weights(weights)
        if log_probs and not bool(log_probs[0].isfinite().all()):
            raise TraceError("recording_failed", "a log-probability is not finite")
        return WireReport(
            status="completed",
            log_probs=tensor_bytes(log_probs[0]) if log_probs else b"",
            recomputed_tokens=self.recomputed_tokens,
            cached_tokens=self.cached_tokens,
            part=self.part,
            weights=_weights_text(weights),
        )


def _check_weights(weights: Tensor) -> None:
    if int(weights[1]):
        raise TraceError(
            "weights_changed", "the model's weights changed while the trace was recorded"
        )


def _weights_text(weights: Tensor) -> str:
    return f"{int(weights[0]) % (1 << 64):016x}"


@dataclass(frozen=True, slots=True)
class TraceFacts:
    """What is kept of a trace beside its numbers; see `Trace` and `TracedModel`."""

    length: int
    recomputed_tokens: int
    cached_tokens: int
    restarts: int
    clock: Any
    started: Any
    recording_seconds: Callable[[], float]
    part: ModelPart
    first_head: int
    attention: bool
    changes: bool
    mass: bool

    @classmethod
    def of(
        cls, trace: Trace, part: ModelPart, first_head: int = 0, changes: bool = False
    ) -> TraceFacts:
        """Takes over from a trace of ``part`` of the model."""
        return cls(
            trace.spec.length,
            trace.recomputed_tokens,
            trace.cached_tokens,
            trace.restarts,
            trace.clock,
            trace.started,
            trace.recording.seconds,
            part,
            first_head,
            trace.attention is not None,
            changes,
            trace.mass is not None,
        )


@dataclass(frozen=True, slots=True, eq=False)
class HostCopy:
    """Tensors in one buffer of the host.

    Attributes:
        tensors: To be read once `arrived`.
        buffer: Goes back with `HostBuffers.give_back`.
        arrived: Tells, without waiting, whether the device has written all of them.
    """

    tensors: list[Tensor]
    buffer: Tensor
    arrived: Callable[[], bool]


def host_bytes(tokens: int, layers: int, heads: int = 0) -> int:
    """Host memory for the result of a trace of so many tokens, without scores per layer.

    Args:
        tokens: Its tokens.
        layers: Its layers.
        heads: Heads of a layer, where their mass is measured.
    """
    sizes = (4 * tokens, 8 * layers, 8 * layers, 12 * layers * heads, 16, 16)
    return sum(_rounded(size, _ALIGNMENT) for size in sizes)


class HostBuffers:
    """Memory of the host that results are copied to: page-locked where the device is a GPU.

    Page-locking stops the device, so a buffer is used again by later results, and is only freed
    when the bound leaves no room for a larger one.
    """

    def __init__(
        self, device: torch.device, evict: Callable[[], bool], limit_bytes: int = HOST_BYTES
    ) -> None:
        """Starts without a buffer.

        Args:
            device: Where results come from.
            evict: Gives back the buffer that has been taken for longest; False if none is.
            limit_bytes: Most bytes of all buffers together.
        """
        self._cuda = device.type == "cuda"
        self._evict = evict
        self._limit = limit_bytes
        self._free: list[Tensor] = []
        self._allocated = 0

    @property
    def allocated_bytes(self) -> int:
        """Size of all buffers, free or taken."""
        return self._allocated

    def reserve(self, count: int, nbytes: int) -> None:
        """Allocates buffers beforehand, as far as the bound lets it."""
        size = _rounded(nbytes, _PAGE)
        for _ in range(count):
            if self._allocated + size <= self._limit:
                self._free.append(self._allocate(size))

    def copy(self, tensors: Sequence[Tensor]) -> HostCopy:
        """Queues copies of tensors on the device; behind them is what `HostCopy.arrived` tells.

        Raises:
            TraceError: ``overloaded``: the buffers of other results leave no room.
        """
        starts, end = [], 0
        for tensor in tensors:
            starts.append(end)
            end += _rounded(tensor.nbytes, _ALIGNMENT)
        buffer = self._take(end)
        try:
            copies: list[Tensor] = []
            for place, (tensor, start) in enumerate(zip(tensors, starts, strict=True)):
                if place and tensor is tensors[place - 1]:
                    copies.append(copies[-1])
                    continue
                flat = buffer[start : start + tensor.nbytes].view(tensor.dtype)
                copies.append(flat.view(tensor.shape))
                # Row by row where rows lie apart: all at once would need a copy on the device.
                pairs = [(copies[-1], tensor)]
                if not tensor.is_contiguous():
                    pairs = list(zip(copies[-1], tensor, strict=True))
                for copy, source in pairs:
                    copy.copy_(source, non_blocking=True)
            return HostCopy(copies, buffer, self._mark())
        except BaseException:
            self._free.append(buffer)
            raise

    def give_back(self, copied: HostCopy) -> None:
        """Lets the next result have a copy's buffer; its tensors must not be read any more."""
        self._free.append(copied.buffer)

    def _take(self, nbytes: int) -> Tensor:
        while (buffer := self._found(nbytes)) is None:
            if not self._evict():
                raise TraceError(
                    "overloaded",
                    f"the trace's result of {nbytes} bytes has no room on the host, where all "
                    f"results together may take {self._limit} bytes",
                )
        return buffer

    def _found(self, nbytes: int) -> Tensor | None:
        """The smallest free buffer that will do, or a new one; None if there is no room for it."""
        size = _rounded(nbytes, _PAGE)
        best: tuple[int, int] | None = None
        for place, free in enumerate(self._free):
            has = free.nbytes
            if has >= size and (best is None or has < best[0]):
                best = has, place
                if has == size:
                    break
        if best is not None:
            return self._free.pop(best[1])
        if self._allocated - sum(free.nbytes for free in self._free) + size > self._limit:
            return None
        while self._allocated + size > self._limit:
            self._allocated -= self._free.pop().nbytes
        return self._allocate(size)

    def _allocate(self, size: int) -> Tensor:
        with torch.inference_mode(False):  # It is written to with and without.
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self._cuda)
        self._allocated += size
        return buffer

    def _mark(self) -> Callable[[], bool]:
        if not self._cuda:
            return _at_once
        event = torch.cuda.Event()
        event.record()
        return event.query


def _at_once() -> bool:
    return True


def _rounded(nbytes: int, unit: int) -> int:
    return -(-nbytes // unit) * unit
