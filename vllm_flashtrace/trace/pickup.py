"""Picks up a finished trace from the workers and makes one report of their answers.

With tensor parallelism each rank gives the part of the scores that came through its own heads. The
parts add up: what ranks have to know of each other they exchange in the step that finishes a trace.
With pipeline parallelism each stage holds its own layers and needs nothing of the others: ``e_j``
is summed over layers, so the stages' scores add up. Sums of attention are put side by side: ranks
hold heads, and stages layers, of one whole.

No rank waits for another, or for its device: one that failed says so, and the trace fails with its
reason; one whose result is still on its way to the host is asked again.

A worker that is alone sends its answer with the output of the trace's request, see the patch
``trace_results``, and then needs no asking.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import msgspec
import torch

from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.base.records import ScoreReport, TraceReport
from vllm_flashtrace.trace.budget import AccumulatorBudget
from vllm_flashtrace.trace.wire import (
    SECRET_ENV,
    WireReport,
    coverage,
    decode_wire,
    misfit,
    secret_id,
    stages,
    tensor_of,
)

T = TypeVar("T")

WorkerCall = Callable[[str, tuple[Any, ...]], Sequence[Any]]
"""A ``collective_rpc``: takes a method's name and arguments, returns every worker's answer."""

AsyncWorkerCall = Callable[[str, tuple[Any, ...]], Awaitable[Sequence[Any]]]


CARRIED_KEY = "flashtrace"
"""Where ``kv_transfer_params`` of a trace request's output has the worker's answer."""

PENDING_SECONDS = 0.002
"""How long to wait before asking again for what is not on the host yet."""


def carried_answer(output: Any) -> bytes | None:
    """The worker's answer that a ``RequestOutput`` of a trace request carries, if it does."""
    answer = (getattr(output, "kv_transfer_params", None) or {}).get(CARRIED_KEY)
    return answer if isinstance(answer, bytes) else None


async def pick_up(
    nonce: str,
    call: AsyncWorkerCall,
    carried: bytes | None = None,
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> TraceReport:
    """Collects a trace's report; no worker keeps its result when this returns or raises TraceError.

    Args:
        nonce: The trace's nonce.
        call: Calls a method of all workers of the engine that ran the trace.
        carried: The only worker's answer, if it is here already.
        pause: Waits for a number of seconds.

    Raises:
        TraceError: The trace failed in a worker, or a worker does not know it.
    """
    wires = await _answers(nonce, call, carried, pause)
    members = [
        sorted(stage, key=lambda place: wires[place].first_head)
        for stage in stages([wire.part for wire in wires])
    ]
    _check_heads([[wires[place] for place in stage] for stage in members])
    covered = coverage([wires[stage[0]].part for stage in members])
    report = _merged(members, [wire.to_report() for wire in wires])
    return dataclasses.replace(report, coverage=covered)


async def pick_up_score(
    nonce: str,
    call: AsyncWorkerCall,
    carried: bytes | None = None,
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> ScoreReport:
    """As `pick_up`, of the tokens that a `ScoreSpec` names."""
    wires = await _answers(nonce, call, carried, pause)
    stages([wire.part for wire in wires])
    # The last stage has the logits, and of its ranks one or all.
    known = [wire for wire in wires if wire.log_probs]
    if not known:
        raise misfit("no worker has the log-probabilities")
    return ScoreReport(
        log_probs=tensor_of(known[0].log_probs, torch.float32),
        recomputed_tokens=known[0].recomputed_tokens,
        cached_tokens=known[0].cached_tokens,
        weights=" ".join(wire.weights for wire in wires),
    )


async def _answers(
    nonce: str,
    call: AsyncWorkerCall,
    carried: bytes | None,
    pause: Callable[[float], Awaitable[None]],
) -> list[WireReport]:
    """What all workers answer, none of them pending."""
    answers = [carried] if carried is not None else await call("flashtrace_collect", (nonce,))
    wires = await _decoded(answers, nonce, call)
    while any(wire.status == "pending" for wire in wires):
        await pause(PENDING_SECONDS)
        again = await call("flashtrace_collect", (nonce,))
        # The others have given their answers, each once.
        asked = [r for r, wire in zip(again, wires, strict=True) if wire.status == "pending"]
        answered = iter(await _decoded(asked, nonce, call))
        wires = [next(answered) if wire.status == "pending" else wire for wire in wires]
    return wires


def pick_up_now(nonce: str, call: WorkerCall, carried: bytes | None = None) -> TraceReport:
    """As `pick_up`, where calls to the workers block."""
    return _now(pick_up, nonce, call, carried)


def pick_up_score_now(nonce: str, call: WorkerCall, carried: bytes | None = None) -> ScoreReport:
    """As `pick_up_score`, where calls to the workers block."""
    return _now(pick_up_score, nonce, call, carried)


def _now(
    pick_up: Callable[..., Coroutine[Any, Any, T]],
    nonce: str,
    call: WorkerCall,
    carried: bytes | None,
) -> T:
    async def answered(method: str, args: tuple[Any, ...]) -> Sequence[Any]:
        return call(method, args)

    async def blocking(seconds: float) -> None:
        time.sleep(seconds)

    pickup = pick_up(nonce, answered, carried, blocking)
    try:
        pickup.send(None)  # Nothing in it suspends, so it needs no event loop.
    except StopIteration as done:
        report: T = done.value
        return report
    pickup.close()
    raise RuntimeError("a call that blocks has suspended")


def decode_status(replies: Sequence[Any]) -> dict[str, Any]:
    """One status of all workers: a refusal of any, the tightest budget, the largest counts.

    A worker with another secret than this process refuses too: it would take no part in what the
    others compute for a trace. What a worker says of itself (``worker``) is left out.
    """
    own = secret_id()
    merged: dict[str, Any] = {}
    budgets = []
    for reply in replies:
        status = msgspec.msgpack.decode(reply)
        budget = AccumulatorBudget.from_status(status)
        if budget is not None:
            budgets.append(budget)
        if status.pop("secret", own) != own:
            merged["refusal"] = f"a worker has another {SECRET_ENV} than the server"
        for key, value in status.items():
            if key == "worker":
                continue
            known = merged.get(key)
            if known is None:
                merged[key] = value
            elif key != "refusal" and value is not None:
                merged[key] = max(known, value)
    if budgets:
        merged |= AccumulatorBudget.tightest(budgets).to_status()
    return merged


async def _decoded(replies: Sequence[Any], nonce: str, call: AsyncWorkerCall) -> list[WireReport]:
    """All answers; raises the first failure, preferring a reason to a missing result."""
    wires: list[WireReport] = []
    failures: list[TraceError] = []
    for reply in replies:
        try:
            wires.append(decode_wire(reply))
        except TraceError as error:
            failures.append(error)
    if failures:
        if any(wire.status == "pending" for wire in wires):
            await call("flashtrace_discard", (nonce,))
        raise min(failures, key=lambda failure: failure.code == "result_missing")
    if not wires:
        raise TraceError("result_missing", "no worker answered")
    return wires


def _merged(members: Sequence[Sequence[int]], reports: Sequence[TraceReport]) -> TraceReport:
    """The parts of all workers as one report; costs are those of the slowest.

    Raises:
        TraceError: ``result_missing``: they are not of one trace.
    """
    first = reports[0]
    if len({report.scores.shape for report in reports}) > 1:
        raise misfit()
    per_stage = [[reports[i] for i in stage] for stage in members]
    phases = {name for report in reports for name in report.seconds}
    return TraceReport(
        scores=_sum([report.scores for report in reports]),
        **_kept_rows_scores(reports),
        layer_scores=_layer_scores(per_stage),
        attention=_attention(per_stage),
        recomputed_tokens=first.recomputed_tokens,
        cached_tokens=first.cached_tokens,
        restarts=first.restarts,
        seconds={name: max(report.seconds.get(name, 0.0) for report in reports) for name in phases},
        weights=" ".join(report.weights for report in reports),
        changes=_changes(per_stage),
    )


def _changes(per_stage: Sequence[Sequence[TraceReport]]) -> torch.Tensor | None:
    """Sums over stages, whose ranks have the same stream; None if any stage does not know.

    A stage all of whose layers are traced does not measure them, so that nothing is known then.
    """
    found = [stage[0].changes for stage in per_stage]
    known = [changes for changes in found if changes is not None]
    return _sum(known) if known and len(known) == len(found) else None


def _kept_rows_scores(reports: Sequence[TraceReport]) -> dict[str, Any]:
    """Of the only worker: several cannot go on to a next hop without the others' scores."""
    if len(reports) == 1:
        return {name: getattr(reports[0], name) for name in ("later_scores", "other_targets")}
    if any(report.later_scores or report.other_targets for report in reports):
        raise misfit("one of several workers has run further hops")
    return {}


def _layer_scores(per_stage: Sequence[Sequence[TraceReport]]) -> torch.Tensor | None:
    """Scores of all layers in order: ranks of a stage add up, stages follow each other."""
    layers = []
    missing = 0
    for stage in per_stage:
        parts = [report.layer_scores for report in stage if report.layer_scores is not None]
        missing += len(stage) - len(parts)
        if parts:
            layers.append(_sum(parts))
    if layers and missing:
        raise TraceError("result_missing", "a worker's scores per layer are missing")
    # This runs on the event loop: what is whole already is not copied.
    return layers[0] if len(layers) == 1 else torch.cat(layers) if layers else None


def _check_heads(per_stage: Sequence[Sequence[WireReport]]) -> None:
    """Raises ``result_missing`` if heads are missing, or there twice, where heads are given."""
    if not any(wire.num_heads for stage in per_stage for wire in stage):
        return
    totals = set()
    for stage in per_stage:
        reached = 0
        for wire in stage:
            if not wire.num_heads or wire.first_head != reached:
                raise misfit(f"head {reached} of layer {wire.part.first_layer} is not there once")
            reached += wire.num_heads
        totals.add(reached)
    if len(totals) > 1:
        raise misfit(f"stages have {', '.join(map(str, sorted(totals)))} heads")


def _attention(per_stage: Sequence[Sequence[TraceReport]]) -> torch.Tensor | None:
    """Sums of attention of all layers and heads; what is whole already is not copied."""
    stages = []
    for stage in per_stage:
        parts = [report.attention for report in stage if report.attention is not None]
        if parts:
            stages.append(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
    return stages[0] if len(stages) == 1 else torch.cat(stages) if stages else None


def _sum(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.stack(list(tensors)).sum(0)
