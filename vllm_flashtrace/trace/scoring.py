"""Engine requests that score tokens: their log-probabilities, each given all before it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from vllm import SamplingParams, TokensPrompt

from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.base.records import ScoredText, ScoreReport
from vllm_flashtrace.trace.engines import Engines
from vllm_flashtrace.trace.hop import EngineContext, engine_input, run_request, while_alive
from vllm_flashtrace.trace.pickup import pick_up_score
from vllm_flashtrace.trace.wire import ScoreSpec


@dataclass(frozen=True, slots=True)
class ScoreCall:
    """A request that scores tokens.

    Attributes:
        spec: Which tokens.
        prompt: All tokens up to the last of them.
        params: Carries the spec.
    """

    spec: ScoreSpec
    prompt: TokensPrompt
    params: SamplingParams


def score_call(text: ScoredText, context: EngineContext) -> ScoreCall:
    """The engine request for a text.

    Args:
        text: The text, and which of its tokens are scored.
        context: What it shares with the completion; the images, if any, are in the text, too.
    """
    token_ids = text.token_ids[: text.positions[-1] + 1]
    spec = ScoreSpec.create(text.positions, len(token_ids))
    return ScoreCall(spec, *engine_input(token_ids, spec, context))


async def run_score(
    engines: Engines,
    text: ScoredText,
    context: EngineContext,
    request_id: str,
    trace_headers: Mapping[str, str] | None,
) -> tuple[ScoreReport, int | None]:
    """Scores a text on vLLM's asynchronous engine; see `run_hop` for the arguments.

    Returns:
        The report, and the data parallel rank that made it.

    Raises:
        TraceError: ``engine_dead``, ``aborted``, or what a worker says went wrong.
        asyncio.CancelledError: The engine's request is aborted.
    """
    call = score_call(text, context)

    async def run() -> tuple[ScoreReport, int | None]:
        done = await run_request(
            engines, call.prompt, call.params, context, request_id, trace_headers
        )
        call_worker = functools.partial(engines.call, done.rank)
        return await pick_up_score(call.spec.nonce, call_worker, done.carried), done.rank

    report, rank = await while_alive(engines, run())
    return checked(report, text), rank


def checked(report: ScoreReport, text: ScoredText) -> ScoreReport:
    """The report, if it is of as many tokens as were asked for.

    Raises:
        TraceError: ``result_missing``.
    """
    found, asked = len(report.log_probs), len(text.positions)
    if found != asked:
        raise TraceError("result_missing", f"{found} of {asked} tokens were scored")
    return report
