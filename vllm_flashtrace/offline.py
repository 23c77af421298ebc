"""Attribution without a server: :class:`FlashTrace` around vLLM's ``LLM``.

Invariant: results come back in the order of the inputs, one per completion, and a trace that fails
is a result with status ``failed`` — its completion is still there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_flashtrace.attribution import Attribution
from vllm_flashtrace.config import SECTION, FlashTraceConfig
from vllm_flashtrace.environment import prepare_environment
from vllm_flashtrace.errors import FlashTraceError, TraceError, UnsupportedModelError
from vllm_flashtrace.records import Completion, TraceUsage
from vllm_flashtrace.schema import FlashTraceRequest, parse_flashtrace_field

Messages = Sequence[Mapping[str, Any]]
Prompt = str | Sequence[int] | Messages


@dataclass(slots=True)
class _Job:
    """One attribution under way."""

    completion: Completion
    trace_id: str
    plan: Any = None
    usage: TraceUsage | None = None
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
            ValueError: Both or neither of ``model`` and ``llm`` were given.
        """
        if (model is None) == (llm is None):
            raise ValueError("give either a model or an existing llm")
        if llm is None:
            llm = _start_engine(model, flashtrace_config, engine_args)
        elif flashtrace_config or engine_args:
            raise ValueError("engine arguments have no effect on an existing llm")
        self.llm = llm
        self.config = FlashTraceConfig.from_additional_config(
            llm.llm_engine.vllm_config.additional_config
        )
        self._tokenizer = llm.get_tokenizer()
        self._counter = 0
        refusal = self._refusal()
        if refusal is not None:
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
        """
        request = self._parse(flashtrace)
        several = [prompts] if _is_single(prompts) else list(prompts)
        completions: list[Completion] = []
        for prompt in self._complete(several, sampling_params, chat_args):
            completions.extend(prompt)
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
            messages=prompt if _is_chat(prompt) else None,
        )
        return self._attribute(request, [record])[0]

    def _parse(self, flashtrace: Mapping[str, Any] | bool) -> FlashTraceRequest:
        limits = self.config.limits
        value = dict(flashtrace) if isinstance(flashtrace, Mapping) else flashtrace
        request = parse_flashtrace_field(value, limits)
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
    ) -> list[list[Completion]]:
        """Generates; plain prompts and chats each go to the engine as one batch."""
        chats = [i for i, prompt in enumerate(prompts) if _is_chat(prompt)]
        plain = [i for i in range(len(prompts)) if i not in set(chats)]
        results: dict[int, list[Completion]] = {}
        if chats:
            conversations: Any = [[dict(message) for message in prompts[i]] for i in chats]  # type: ignore[arg-type]
            outputs = self.llm.chat(conversations, sampling_params, use_tqdm=False, **chat_args)
            for i, output in zip(chats, outputs, strict=True):
                results[i] = _completions(output, messages=conversations[chats.index(i)])
        if plain:
            inputs: list[Any] = [
                {"prompt": p} if isinstance(p, str) else {"prompt_token_ids": list(p)}
                for p in (prompts[i] for i in plain)
            ]
            outputs = self.llm.generate(inputs, sampling_params, use_tqdm=False)
            for i, output in zip(plain, outputs, strict=True):
                prompt = prompts[i]
                text = prompt if isinstance(prompt, str) else None
                results[i] = _completions(output, prompt_text=text)
        return [results[i] for i in range(len(prompts))]

    def _attribute(
        self, request: FlashTraceRequest, completions: Sequence[Completion]
    ) -> list[Attribution]:
        """Runs all attributions hop by hop, every hop as one batch."""
        from vllm_flashtrace.postprocess.result import build_result, failed_result

        jobs = [self._job(request, completion) for completion in completions]
        while self._advance(jobs):
            pass
        attributions = []
        for job in jobs:
            data: dict[str, Any] | None = None
            if job.error is None:
                try:
                    data = build_result(
                        job.plan, job.plan.recursion.result(), job.usage, job.trace_id
                    )
                except FlashTraceError as error:
                    job.error = error
            if job.error is not None:
                data = failed_result(job.trace_id, job.error)
            attributions.append(Attribution(data, text=job.completion.text))
        return attributions

    def _job(self, request: FlashTraceRequest, completion: Completion) -> _Job:
        from vllm_flashtrace.postprocess.plan import plan_trace

        self._counter += 1
        job = _Job(completion, f"ft-offline-{self._counter}", usage=TraceUsage())
        try:
            job.plan = plan_trace(
                request,
                completion,
                self._tokenizer,
                render=self._render,
                max_trace_tokens=self.llm.llm_engine.vllm_config.model_config.max_model_len - 1,
                auto_threshold=self.config.auto_threshold,
                max_hops=self.config.max_hops,
            )
        except FlashTraceError as error:
            job.error = error
        return job

    def _advance(self, jobs: Sequence[_Job]) -> bool:
        """Runs the next hop of every unfinished job; False when all are done."""
        from vllm_flashtrace.hop import (
            decode_rpc,
            padded_scores,
            trace_call,
            with_phases,
        )

        calls = []
        for job in jobs:
            if job.error is None and (weights := job.plan.recursion.next_weights()) is not None:
                calls.append((job, trace_call(job.plan, weights, self.config, None)))
        if not calls:
            return False
        limit = self.config.max_concurrent_traces
        for first in range(0, len(calls), limit):
            batch = calls[first : first + limit]
            began = time.monotonic()
            self.llm.generate(
                [call.prompt for _, call in batch],
                [call.params for _, call in batch],
                use_tqdm=False,
            )
            seconds = time.monotonic() - began
            for job, call in batch:
                try:
                    replies = self.llm.collective_rpc("flashtrace_collect", args=(call.spec.nonce,))
                    report = with_phases(decode_rpc(replies), seconds, 0.0)
                    job.plan.recursion.add(*padded_scores(report, len(job.plan.token_ids)))
                    job.usage.add(report)
                except FlashTraceError as error:
                    job.error = error
                except ValueError as error:
                    job.error = TraceError("bad_scores", str(error))
        return True

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return list(self._tokenizer.encode(prompt))
        if _is_chat(prompt):
            rendered = self._render(prompt)  # type: ignore[arg-type]
            return list(self._tokenizer.encode(rendered, add_special_tokens=False))
        return [int(token) for token in prompt]  # type: ignore[call-overload]

    def _render(self, messages: Messages) -> str:
        rendered = self._tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
        return str(rendered)


def _start_engine(
    model: str | None, config: Mapping[str, Any] | None, engine_args: dict[str, Any]
) -> Any:
    prepare_environment()
    from vllm import LLM

    if config is not None:
        additional = dict(engine_args.get("additional_config") or {})
        additional[SECTION] = dict(config)
        engine_args["additional_config"] = additional
    return LLM(model=model, **engine_args)


def _completions(
    output: Any, *, prompt_text: str | None = None, messages: Messages | None = None
) -> list[Completion]:
    return [
        Completion(
            prompt_token_ids=list(output.prompt_token_ids),
            generated_token_ids=list(choice.token_ids),
            text=choice.text,
            prompt_text=prompt_text,
            messages=messages,
        )
        for choice in output.outputs
    ]


def _is_chat(prompt: Any) -> bool:
    return (
        not isinstance(prompt, str)
        and isinstance(prompt, Sequence)
        and len(prompt) > 0
        and isinstance(prompt[0], Mapping)
    )


def _is_single(prompts: Any) -> bool:
    return (
        isinstance(prompts, str)
        or _is_chat(prompts)
        or (isinstance(prompts, Sequence) and len(prompts) > 0 and isinstance(prompts[0], int))
    )
