"""Attribution without a server: :class:`FlashTrace` around vLLM's ``LLM``.

Invariant: results come back in the order of the inputs, one per completion, and a trace that fails
is a result with status ``failed`` — its completion is still there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from vllm_flashtrace.attribution import Attribution
from vllm_flashtrace.config import SECTION, FlashTraceConfig
from vllm_flashtrace.environment import default_kv_cache_bytes, prepare_environment
from vllm_flashtrace.errors import FlashTraceError, TraceError, UnsupportedModelError
from vllm_flashtrace.postprocess.plan import TracePlan, plan_trace
from vllm_flashtrace.postprocess.result import build_result, failed_result
from vllm_flashtrace.prompts import (
    Messages,
    Prompt,
    as_prompts,
    completions_of,
    engine_input,
    is_chat,
)
from vllm_flashtrace.records import Completion, TraceUsage
from vllm_flashtrace.schema import FlashTraceRequest, parse_flashtrace_field


@dataclass(slots=True)
class _Job:
    """One attribution under way; without a plan it has failed already."""

    completion: Completion
    trace_id: str
    plan: TracePlan | None = None
    usage: TraceUsage = field(default_factory=TraceUsage)
    error: FlashTraceError | None = None


class FlashTrace:
    """Generates completions and tells which prompt tokens they came from.

    Example:
        >>> ft = FlashTrace("Qwen/Qwen3-0.6B", max_model_len=4096)
        >>> [answer] = ft.generate(["The code is 7306. What is the code?"])
        >>> answer.top(3)
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        llm: Any | None = None,
        flashtrace_config: Mapping[str, Any] | None = None,
        **engine_args: Any,
    ) -> None:
        """Starts an engine, or uses an existing one.

        Args:
            model: Model name or folder; required without ``llm``.
            llm: An existing ``vllm.LLM``. The plugin must have been active when it was made,
                which it is whenever this package is installed and ``VLLM_PLUGINS`` allows it.
            flashtrace_config: Options of :class:`~vllm_flashtrace.config.FlashTraceConfig`.
            **engine_args: Passed to ``vllm.LLM`` unchanged.

        Raises:
            UnsupportedModelError: The model cannot be traced exactly; the message says why.
            ValueError: Both or neither of ``model`` and ``llm`` were given, or an option is bad.
        """
        if (model is None) == (llm is None):
            raise ValueError("give either a model or an existing llm")
        if llm is None:
            llm = _start_engine(model, flashtrace_config, engine_args)
        elif flashtrace_config or engine_args:
            raise ValueError("engine arguments have no effect on an existing llm")
        self.llm = llm
        vllm_config = llm.llm_engine.vllm_config
        self.config = FlashTraceConfig.from_additional_config(vllm_config.additional_config)
        self._max_trace_tokens = vllm_config.model_config.max_model_len - 1
        self._tokenizer = llm.get_tokenizer()
        self._ids = (f"ft-offline-{i}" for i in count())
        if (refusal := self._refusal()) is not None:
            raise UnsupportedModelError(refusal)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Any | None = None,
        flashtrace: Mapping[str, Any] | bool = True,
        **chat_args: Any,
    ) -> list[Attribution]:
        """Completes prompts or chats and attributes every completion.

        Args:
            prompts: Strings, token id lists, or lists of chat messages; one or several.
            sampling_params: ``vllm.SamplingParams`` for all of them; ``n > 1`` gives ``n`` results
                per prompt.
            flashtrace: The ``flashtrace`` request field.
            **chat_args: Passed to ``LLM.chat`` for chats.

        Raises:
            InvalidRequestError: The ``flashtrace`` field is bad; nothing is generated.
            TypeError: A prompt is of none of these forms.
        """
        request = self._parse(flashtrace)
        completions = self._complete(as_prompts(prompts), sampling_params, chat_args)
        return self._attribute(request, completions)

    def attribute(
        self,
        prompt: Prompt,
        completion: str | Sequence[int],
        flashtrace: Mapping[str, Any] | bool = True,
    ) -> Attribution:
        """Attributes text that already exists.

        Args:
            prompt: A string, token ids, or chat messages that the completion answers.
            completion: The generated text, or its token ids.
            flashtrace: The ``flashtrace`` request field.
        """
        request = self._parse(flashtrace)
        [prompt] = as_prompts([prompt])
        if isinstance(completion, str):
            generated = list(self._tokenizer.encode(completion, add_special_tokens=False))
            text = completion
        else:
            generated = list(completion)
            text = self._tokenizer.decode(generated, skip_special_tokens=True)
        record = Completion(
            prompt_token_ids=self._prompt_ids(prompt),
            generated_token_ids=generated,
            text=text,
            prompt_text=prompt if isinstance(prompt, str) else None,
            messages=prompt if is_chat(prompt) else None,
        )
        return self._attribute(request, [record])[0]

    def _parse(self, flashtrace: Mapping[str, Any] | bool) -> FlashTraceRequest:
        value = dict(flashtrace) if isinstance(flashtrace, Mapping) else flashtrace
        request = parse_flashtrace_field(value, self.config.limits)
        if request is None:
            raise ValueError("flashtrace must be true or an object of options")
        return request

    def _refusal(self) -> str | None:
        from vllm_flashtrace.hop import decode_status

        try:
            return decode_status(self.llm.collective_rpc("flashtrace_status"))["refusal"]
        except Exception as error:
            return f"the engine runs without the FlashTrace plugin ({error})"

    def _complete(
        self, prompts: Sequence[Prompt], sampling_params: Any, chat_args: Mapping[str, Any]
    ) -> list[Completion]:
        """Generates; chats and plain prompts each go to the engine as one batch."""
        chats = [i for i, prompt in enumerate(prompts) if is_chat(prompt)]
        plain = [i for i, prompt in enumerate(prompts) if not is_chat(prompt)]
        outputs: dict[int, Any] = {}
        if chats:
            conversations = [[dict(message) for message in prompts[i]] for i in chats]  # type: ignore[arg-type]
            answers = self.llm.chat(conversations, sampling_params, use_tqdm=False, **chat_args)
            outputs.update(zip(chats, answers, strict=True))
        if plain:
            inputs = [engine_input(prompts[i]) for i in plain]
            answers = self.llm.generate(inputs, sampling_params, use_tqdm=False)
            outputs.update(zip(plain, answers, strict=True))
        return [
            completion
            for i, prompt in enumerate(prompts)
            for completion in completions_of(outputs[i], prompt)
        ]

    def _attribute(
        self, request: FlashTraceRequest, completions: Sequence[Completion]
    ) -> list[Attribution]:
        """Runs all attributions hop by hop, every hop as one batch."""
        jobs = [self._plan(request, completion) for completion in completions]
        while self._advance(jobs):
            pass
        return [Attribution(_outcome(job), text=job.completion.text) for job in jobs]

    def _plan(self, request: FlashTraceRequest, completion: Completion) -> _Job:
        job = _Job(completion, next(self._ids))
        try:
            job.plan = plan_trace(
                request,
                completion,
                self._tokenizer,
                render=self._render,
                max_trace_tokens=self._max_trace_tokens,
                auto_threshold=self.config.auto_threshold,
                max_hops=self.config.max_hops,
            )
        except FlashTraceError as error:
            job.error = error
        return job

    def _advance(self, jobs: Sequence[_Job]) -> bool:
        """Runs the next hop of every unfinished job; False when all are done."""
        from vllm_flashtrace.hop import trace_call

        calls = [
            (job, plan, trace_call(plan, weights, self.config, None))
            for job, plan in _unfinished(jobs)
            if (weights := plan.recursion.next_weights()) is not None
        ]
        limit = self.config.max_concurrent_traces
        for first in range(0, len(calls), limit):
            batch = calls[first : first + limit]
            began = time.monotonic()
            self.llm.generate(
                [call.prompt for _, _, call in batch],
                [call.params for _, _, call in batch],
                use_tqdm=False,
            )
            seconds = time.monotonic() - began
            for job, plan, call in batch:
                self._collect(job, plan, call.spec.nonce, seconds)
        return bool(calls)

    def _collect(self, job: _Job, plan: TracePlan, nonce: str, seconds: float) -> None:
        from vllm_flashtrace.hop import decode_rpc, padded_scores, with_phases

        try:
            replies = self.llm.collective_rpc("flashtrace_collect", args=(nonce,))
            report = with_phases(decode_rpc(replies), seconds, 0.0)
            plan.recursion.add(*padded_scores(report, len(plan.token_ids)))
            job.usage.add(report)
        except FlashTraceError as error:
            job.error = error
        except ValueError as error:
            job.error = TraceError("bad_scores", str(error))

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return list(self._tokenizer.encode(prompt))
        if is_chat(prompt):
            return list(self._tokenizer.encode(self._render(prompt), add_special_tokens=False))
        return [int(token) for token in prompt]  # type: ignore[arg-type]

    def _render(self, messages: Messages) -> str:
        rendered = self._tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
        return str(rendered)


def _start_engine(
    model: str | None, config: Mapping[str, Any] | None, engine_args: dict[str, Any]
) -> Any:
    if config is not None:
        additional = {**(engine_args.get("additional_config") or {}), SECTION: dict(config)}
        engine_args = {**engine_args, "additional_config": additional}
    FlashTraceConfig.from_additional_config(engine_args.get("additional_config"))
    prepare_environment()
    if not {"kv_cache_memory_bytes", "gpu_memory_utilization"} & engine_args.keys():
        engine_args = {**engine_args, "kv_cache_memory_bytes": default_kv_cache_bytes()}
    from vllm import LLM

    return LLM(model=model, **engine_args)


def _unfinished(jobs: Sequence[_Job]) -> Iterator[tuple[_Job, TracePlan]]:
    for job in jobs:
        if job.error is None and job.plan is not None:
            yield job, job.plan


def _outcome(job: _Job) -> dict[str, Any]:
    """The attribution object of a job that has run all its hops or failed."""
    if job.error is None and job.plan is not None:
        try:
            return build_result(job.plan, job.plan.recursion.result(), job.usage, job.trace_id)
        except FlashTraceError as error:
            job.error = error
    return failed_result(job.trace_id, job.error or TraceError("internal_error", "no plan"))
