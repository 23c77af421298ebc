"""From the sums of a recorded trace to its scores: what is done in the step that finishes it.

Everything that grows with layers times tokens is queued on the device in that step, and what the
API server needs is copied to the host behind it, without waiting; only `run_hops` waits, for the
scores that the next hop begins with. Picking a result up later only reads the host's copy.

    `measure`    the proximity pass of all traces that end; leaves each layer's proximities and
                 their totals, which ranks that share the heads add up in between
    `score`      shares of the totals, summed over layers, on their way to the host
    `run_hops`   both, hop after hop, target after target, for a trace that has kept its rows
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
from vllm_flashtrace.trace.wire import ModelPart
from vllm_flashtrace.worker.host_buffers import HostBuffers, HostCopy
from vllm_flashtrace.worker.recorded_trace import Trace
from vllm_flashtrace.worker.reports import FinishedTrace, TraceFacts
from vllm_flashtrace.worker.row_groups import HeadsGroup, RowGroup, Segment
from vllm_flashtrace.worker.traced_model import TracedModel


@dataclass(slots=True, eq=False)
class Measured:
    """A trace after its proximity pass, on the device.

    Attributes:
        trace: The trace; its column sums now hold the proximities.
        tokens: float32 ``[L, N]``, each token's proximity summed over this rank's heads.
        totals: float64 ``[L]``, `tokens` summed over tokens.
        residual: float64 ``[L]``, the proximity of the residual, the same on every rank.
        own: float64 ``[L]``, `totals` and `residual` together.
        changes: float64 ``[2]``, L1 norms of ``x - r`` summed over the traced layers and over all
            layers; None where all are traced or the others are not seen.
        mass: See `RowSegment`; None where it is not measured.
        recorded: Mark at the end of the last recording step.
    """

    trace: Trace
    tokens: Tensor
    totals: Tensor
    residual: Tensor
    own: Tensor
    recorded: Any
    changes: Tensor | None = None
    mass: Tensor | None = None


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
            own,
            recorded,
            change,
            segment.row_segment.mass,
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
    return Measured(trace, tokens, totals, torch.zeros_like(totals), totals, recorded, mass=mass)


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
    facts = TraceFacts.of(
        trace, part, first_head, shared=totals is not None, changes=measured.changes is not None
    )
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

    def weigh(_: RowGroup) -> None:
        model.weigh_together(kept, groups)
        for group in groups:
            group.add_kept_rows(kept)

    groups[0].run(weigh, timed=True)
    lacking = trace.stream_lacks_residual
    found = []
    for group in groups:
        measured = _measure_together(group.segments, model)
        found.append(_scores(measured[segment.batch_row.req_id], None))
        trace.stream_lacks_residual = lacking  # So do the sums of the next target, and of any hop.
    return found


def _scores(measured: Measured, totals: Tensor | None) -> tuple[Tensor, ...]:
    """Scores ``[length]``, see `score`, and `Measured.own`.

    Behind them the same of all ranks, where others share the heads, `Measured.mass` and
    `Measured.changes`, if there are any.
    """
    trace, tokens = measured.trace, measured.tokens
    denominators = measured.own
    if totals is not None:
        denominators = totals[: len(measured.residual)] + measured.residual
    # Behind the last target, where nothing flows from, scores are 0.
    scores = torch.empty(trace.spec.length, device=tokens.device)
    # Weights of heads compare layers with each other; a layer's total is no unit of theirs.
    units = torch.ones_like(denominators) if trace.spec.heads else denominators
    sum_shares(tokens, units, scores, keep=trace.spec.layers)
    more = [part for part in (measured.mass, measured.changes) if part is not None]
    of_all_ranks = [] if totals is None else [denominators]
    return scores, measured.own, *of_all_ranks, *more


def _copy(
    parts: Sequence[list[Tensor]], trace: Trace, buffers: HostBuffers, tokens: Tensor | None = None
) -> HostCopy:
    """Queues the copy of a trace's numbers: of each part one tensor a hop, and scores per layer."""
    weights = trace.weights_seen
    if weights is None:
        raise ValueError("the weights of no step were noted")
    stacked = [part[0][None] if len(part) == 1 else torch.stack(part) for part in parts]
    layers = [tokens] if tokens is not None and trace.spec.layers else []
    attention = [] if trace.attention is None else [trace.attention]
    return buffers.copy([*stacked, weights, *layers, *attention])
