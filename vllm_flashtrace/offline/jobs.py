"""Runs attributions on a ``vllm.LLM``: the next trace request of all of them as one batch.

One that fails keeps its error and drops out, and the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_flashtrace.base.errors import FlashTraceError, TraceError
from vllm_flashtrace.base.records import (
    Completion,
    ScoredText,
    ScoreReport,
    TraceReport,
    TraceUsage,
)
from vllm_flashtrace.text.plan import TracePlan, surprise_text, weigh_by_surprise
from vllm_flashtrace.text.result import build_result, failed_result
from vllm_flashtrace.text.verification import Verification
from vllm_flashtrace.trace import pickup
from vllm_flashtrace.trace.budget import AccumulatorBudget
from vllm_flashtrace.trace.config import FlashTraceConfig

if TYPE_CHECKING:
    from vllm_flashtrace.trace.hop import EngineContext, TraceCall, Visit
    from vllm_flashtrace.trace.multimodal import PromptImages


@dataclass(slots=True)
class TraceJob:
    """One attribution under way; without plans of its targets it has failed already.

    Attributes:
        verify: Makes the texts that verify it, once all hops are run; None if nothing is to be.
        verifications: What these say of each target.
    """

    completion: Completion
    trace_id: str
    plans: list[TracePlan] = field(default_factory=list)
    visits: list[Visit] = field(default_factory=list)
    usage: TraceUsage = field(default_factory=TraceUsage)
    error: FlashTraceError | None = None
    lora_request: Any | None = None
    images: PromptImages | None = None
    verify: Callable[[list[TracePlan]], Verification] | None = None
    verifications: Sequence[Mapping[str, Any]] = ()

    @property
    def context(self) -> EngineContext:
        """What its requests share with the completion."""
        from vllm_flashtrace.trace.hop import EngineContext

        return EngineContext(lora_request=self.lora_request, images=self.images)

    def outcome(self) -> dict[str, Any]:
        """The attribution object once the job has run all its hops or failed."""
        if self.error is None and self.plans:
            try:
                return build_result(
                    self.plans, self.usage, self.trace_id, verifications=self.verifications
                )
            except FlashTraceError as error:
                self.error = error
        return failed_result(self.trace_id, self.error or TraceError("internal_error", "no plan"))


@dataclass(frozen=True, slots=True)
class _Call:
    """The next trace request of a job: a hop, or all that are left of some targets."""

    job: TraceJob
    trace: TraceCall


def run_jobs(jobs: Sequence[TraceJob], llm: Any, config: FlashTraceConfig) -> None:
    """Runs all hops of all jobs; afterwards every job has its ``outcome``."""
    from vllm_flashtrace.trace.hop import visits

    status = pickup.decode_status(llm.collective_rpc("flashtrace_status"))
    budget = AccumulatorBudget.from_status(status)
    places = config.concurrent_traces(llm.llm_engine.vllm_config)
    for job in jobs:
        job.visits = visits(job.plans, budget)
    _weigh([job for job in jobs if job.plans], llm, places)
    while _advance(jobs, llm, config, places, budget):
        pass
    for job in jobs:
        if job.error is None and job.plans and job.verify is not None:
            _verify(job, job.verify(job.plans), llm, places)


def _weigh(jobs: Sequence[TraceJob], llm: Any, places: int) -> None:
    """Weights the tokens of targets by how little the model expected them, where asked for."""
    weighed = [job for job in jobs if job.plans[0].request.weighting == "surprise"]
    texts = [surprise_text(job.plans) for job in weighed]
    began = time.monotonic()
    reports = score_texts(llm, texts, [job.context for job in weighed], places)
    for job, text, report in zip(weighed, texts, reports, strict=True):
        try:
            if isinstance(report, FlashTraceError):
                raise report
            job.usage.add_score(report)
            job.usage.weights = report.weights
            weigh_by_surprise(job.plans, text, report.log_probs)
            job.usage.seconds["weighting"] = time.monotonic() - began
        except FlashTraceError as error:
            job.error = error


def _verify(job: TraceJob, verification: Verification, llm: Any, places: int) -> None:
    """Scores the texts that verify an attribution."""
    began = time.monotonic()
    texts = verification.texts
    reports = score_texts(llm, texts, [job.context] * len(texts), places)
    for report in reports:
        if isinstance(report, ScoreReport):
            job.usage.add_score(report)
    job.usage.seconds["verify"] = time.monotonic() - began
    job.verifications = verification.results(reports, job.usage.weights)


def score_texts(
    llm: Any,
    texts: Sequence[ScoredText],
    contexts: Sequence[EngineContext],
    places: int,
) -> list[ScoreReport | FlashTraceError]:
    """Log-probabilities of tokens; a text that fails has its error in place of a report.

    Args:
        llm: A ``vllm.LLM``.
        texts: The texts, and which of their tokens are scored.
        contexts: What each shares with the completion that it is of.
        places: How many go to the engine at once.
    """
    from vllm_flashtrace.trace.scoring import checked, score_call

    reports: list[ScoreReport | FlashTraceError] = []
    for start in range(0, len(texts), places):
        batch, shared = texts[start : start + places], contexts[start : start + places]
        calls = [score_call(text, context) for text, context in zip(batch, shared, strict=True)]
        outputs = run_requests(
            llm,
            [call.prompt for call in calls],
            [call.params for call in calls],
            [context.lora_request for context in shared],
        )
        for text, call, output in zip(batch, calls, outputs, strict=True):
            try:
                carried = pickup.carried_answer(output)
                found = pickup.pick_up_score_now(call.spec.nonce, _worker_call(llm), carried)
                reports.append(checked(found, text))
            except FlashTraceError as error:
                reports.append(error)
    return reports


def _advance(
    jobs: Sequence[TraceJob],
    llm: Any,
    config: FlashTraceConfig,
    places: int,
    budget: AccumulatorBudget | None,
) -> bool:
    """Runs the next trace request of every unfinished job; False when all are done."""
    calls = [call for job in jobs if (call := _next_call(job, config)) is not None]
    for batch in _batches(calls, places, budget):
        began = time.monotonic()
        outputs = run_requests(
            llm,
            [call.trace.prompt for call in batch],
            [call.trace.params for call in batch],
            [call.job.lora_request for call in batch],
        )
        seconds = time.monotonic() - began
        for call, output in zip(batch, outputs, strict=True):
            _collect(llm, call, output, seconds)
    return bool(calls)


def _next_call(job: TraceJob, config: FlashTraceConfig) -> _Call | None:
    """The next request of an unfinished job; a job's requests run one after the other."""
    if job.error is None:
        for visit in job.visits:
            if (call := visit.next_call(config, job.context)) is not None:
                return _Call(job, call)
    return None


def _batches(
    calls: Sequence[_Call], places: int, budget: AccumulatorBudget | None
) -> Iterator[list[_Call]]:
    """Cuts ``calls`` into batches that fit the engine; what never fits fails its job."""
    batch: list[_Call] = []
    held = 0
    for call in calls:
        cost = 0
        if budget is not None:
            spec = call.trace.spec
            try:
                budget.check(spec.length, attention=spec.attention)
            except TraceError as error:
                call.job.error = error
                continue
            cost = budget.cost(spec.length, spec.kept_rows, attention=spec.attention)
        full = len(batch) == places or (budget is not None and held + cost > budget.limit_bytes)
        if batch and full:
            yield batch
            batch, held = [], 0
        batch.append(call)
        held += cost
    if batch:
        yield batch


def run_requests(
    llm: Any, prompts: Sequence[Any], params: Sequence[Any], lora_requests: Sequence[Any]
) -> list[Any]:
    """Runs engine requests of ours as one batch, as ``LLM.generate`` does; outputs in their order.

    That takes no input whose images vLLM's renderer has prepared, so a batch with images is handed
    to the engine itself.

    Args:
        llm: A ``vllm.LLM``.
        prompts: Tokens, or rendered engine inputs.
        params: Sampling parameters of each.
        lora_requests: The adapter of each, or None.
    """
    if not any("type" in prompt for prompt in prompts):
        outputs: list[Any] = llm.generate(
            prompts, params, use_tqdm=False, lora_request=lora_requests
        )
        return outputs
    from vllm import RequestOutput

    engine, added = llm.llm_engine, []
    try:
        for prompt, own, lora_request in zip(prompts, params, lora_requests, strict=True):
            number = str(next(llm.request_counter))
            added.append(engine.add_request(number, prompt, own, lora_request=lora_request))
    except BaseException:
        engine.abort_request(added, internal=True)
        raise
    outputs = llm.wait_for_completion(RequestOutput, use_tqdm=False)
    return outputs


def _collect(llm: Any, call: _Call, output: Any, seconds: float) -> None:
    from vllm_flashtrace.trace.hop import take_report

    try:
        report = pick_up_now(llm, call.trace.spec.nonce, output)
        take_report(call.trace, call.job.usage, report, seconds)
    except FlashTraceError as error:
        call.job.error = error


def pick_up_now(llm: Any, nonce: str, output: Any) -> TraceReport:
    """A trace's report, as its request's output or the workers of a ``vllm.LLM`` have it."""
    return pickup.pick_up_now(nonce, _worker_call(llm), pickup.carried_answer(output))


def _worker_call(llm: Any) -> pickup.WorkerCall:
    return lambda method, args: llm.collective_rpc(method, args=args)
