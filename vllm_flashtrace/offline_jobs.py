"""Runs attributions on a ``vllm.LLM`` hop by hop, every hop of all of them as one batch.

Invariant: jobs are independent. One that fails keeps its error and drops out, and the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_flashtrace.config import FlashTraceConfig
from vllm_flashtrace.errors import FlashTraceError, TraceError
from vllm_flashtrace.postprocess.plan import TracePlan
from vllm_flashtrace.postprocess.result import build_result, failed_result
from vllm_flashtrace.records import Completion, TraceUsage


@dataclass(slots=True)
class TraceJob:
    """One attribution under way; without a plan it has failed already."""

    completion: Completion
    trace_id: str
    plan: TracePlan | None = None
    usage: TraceUsage = field(default_factory=TraceUsage)
    error: FlashTraceError | None = None

    def outcome(self) -> dict[str, Any]:
        """The attribution object once the job has run all its hops or failed."""
        if self.error is None and self.plan is not None:
            try:
                return build_result(
                    self.plan, self.plan.recursion.result(), self.usage, self.trace_id
                )
            except FlashTraceError as error:
                self.error = error
        return failed_result(self.trace_id, self.error or TraceError("internal_error", "no plan"))


def run_jobs(jobs: Sequence[TraceJob], llm: Any, config: FlashTraceConfig) -> None:
    """Runs all hops of all jobs; afterwards every job has its ``outcome``."""
    while _advance(jobs, llm, config):
        pass


def _advance(jobs: Sequence[TraceJob], llm: Any, config: FlashTraceConfig) -> bool:
    """Runs the next hop of every unfinished job; False when all are done."""
    from vllm_flashtrace.hop import trace_call

    calls = [
        (job, plan, trace_call(plan, weights, config, None))
        for job, plan in _unfinished(jobs)
        if (weights := plan.recursion.next_weights()) is not None
    ]
    limit = config.max_concurrent_traces
    for first in range(0, len(calls), limit):
        batch = calls[first : first + limit]
        began = time.monotonic()
        llm.generate(
            [call.prompt for _, _, call in batch],
            [call.params for _, _, call in batch],
            use_tqdm=False,
        )
        seconds = time.monotonic() - began
        for job, plan, call in batch:
            _collect(llm, job, plan, call.spec.nonce, seconds)
    return bool(calls)


def _collect(llm: Any, job: TraceJob, plan: TracePlan, nonce: str, seconds: float) -> None:
    from vllm_flashtrace.hop import decode_rpc, padded_scores, with_phases

    try:
        replies = llm.collective_rpc("flashtrace_collect", args=(nonce,))
        report = with_phases(decode_rpc(replies), seconds, 0.0)
        plan.recursion.add(*padded_scores(report, len(plan.token_ids)))
        job.usage.add(report)
    except FlashTraceError as error:
        job.error = error
    except ValueError as error:
        job.error = TraceError("bad_scores", str(error))


def _unfinished(jobs: Sequence[TraceJob]) -> Iterator[tuple[TraceJob, TracePlan]]:
    for job in jobs:
        if job.error is None and job.plan is not None:
            yield job, job.plan
