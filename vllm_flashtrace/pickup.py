"""How a finished trace is picked up from the workers, and how their answers become one.

With tensor parallelism each rank holds the proximities of its own heads. A token's score is its
share of a layer's proximity over all heads, so the ranks first give their totals per layer, get
the sums back, and answer with their parts of the scores. What travels is one number per layer and
then one per token, and no rank ever waits for another: a rank that failed says so, and the trace
fails with its reason.

Invariant: nothing stays behind in a worker after :func:`pick_up` has ended, however it ended.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import msgspec
import torch

from vllm_flashtrace.errors import TraceError
from vllm_flashtrace.records import TraceReport
from vllm_flashtrace.wire import WireReport, decode_report, decode_wire, tensor_bytes, tensor_of


class WorkerCall(NamedTuple):
    """A ``collective_rpc``: the method's name and its arguments."""

    method: str
    args: tuple[Any, ...]


PickUp = Generator[WorkerCall, Sequence[Any], TraceReport]


def pick_up(nonce: str) -> PickUp:
    """Yields calls to all workers, is sent their answers, and returns the trace's report.

    Args:
        nonce: The trace's nonce.

    Raises:
        TraceError: The trace failed in a worker, or a worker does not know it.
    """
    replies = yield WorkerCall("flashtrace_collect", (nonce,))
    try:
        wires = _decoded(replies)
        kept = any(wire.status == "partial" for wire in wires)
        if not kept and len(wires) == 1:
            return decode_report(replies[0])
        denominators = _denominators(wires)
    except TraceError:
        if len(replies) > 1:
            yield WorkerCall("flashtrace_discard", (nonce,))
        raise
    replies = yield WorkerCall(
        "flashtrace_collect", (nonce, tensor_bytes(denominators, torch.float64))
    )
    return _sum([decode_report(reply) for reply in replies])


def decode_status(replies: Sequence[Any]) -> dict[str, Any]:
    """One status of all workers: a refusal of any, the smallest budget, the largest counts.

    What a worker says of itself (``worker``) is left out.
    """
    merged: dict[str, Any] = {}
    for reply in replies:
        for key, value in msgspec.msgpack.decode(reply).items():
            if key == "worker":
                continue
            known = merged.get(key)
            if known is None:
                merged[key] = value
            elif key != "refusal" and value is not None:
                choose = min if key == "accumulator_budget_bytes" else max
                merged[key] = choose(known, value)
    return merged


def _decoded(replies: Sequence[Any]) -> list[WireReport]:
    """All answers; raises the first failure, preferring a reason to a missing result."""
    wires: list[WireReport] = []
    failures: list[TraceError] = []
    for reply in replies:
        try:
            wires.append(decode_wire(reply))
        except TraceError as error:
            failures.append(error)
    if failures:
        raise min(failures, key=lambda failure: failure.code == "result_missing")
    if not wires:
        raise TraceError("result_missing", "no worker answered")
    return wires


def _denominators(wires: Sequence[WireReport]) -> torch.Tensor:
    """The proximity of every head's tokens and, once, of the residual: float64 ``[L]``."""
    totals = [tensor_of(wire.totals, torch.float64) for wire in wires]
    residuals = [tensor_of(wire.residual, torch.float64) for wire in wires]
    statuses = {wire.status for wire in wires}
    if statuses != {"partial"} or len({len(one) for one in totals + residuals}) != 1:
        raise TraceError("result_missing", "the workers' results do not belong together")
    return torch.stack(totals).sum(0) + residuals[0]


def _sum(reports: Sequence[TraceReport]) -> TraceReport:
    """The parts of all ranks as one report; costs are those of the slowest."""
    first = reports[0]
    layers = [report.layer_scores for report in reports if report.layer_scores is not None]
    phases = {name for report in reports for name in report.seconds}
    return TraceReport(
        scores=torch.stack([report.scores for report in reports]).sum(0),
        layer_scores=torch.stack(layers).sum(0) if layers else None,
        recomputed_tokens=first.recomputed_tokens,
        cached_tokens=first.cached_tokens,
        restarts=first.restarts,
        seconds={name: max(report.seconds.get(name, 0.0) for report in reports) for name in phases},
    )
