"""Attribution without a server: :class:`FlashTrace` around vLLM's ``LLM``."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, Self, TypeGuard

from vllm_flashtrace.api.attribution import Attribution
from vllm_flashtrace.api.request import FlashTraceRequest, parse_flashtrace_field
from vllm_flashtrace.base.errors import (
    FlashTraceError,
    InvalidRequestError,
    TraceError,
    UnsupportedModelError,
)
from vllm_flashtrace.base.records import Completion
from vllm_flashtrace.offline.engine import (
    engine_refusal,
    noting_inputs,
    offline_output_parser,
    start_engine,
    stop_engine,
)
from vllm_flashtrace.offline.jobs import TraceJob, run_jobs
from vllm_flashtrace.text.guard import require_messages
from vllm_flashtrace.text.plan import plan_targets
from vllm_flashtrace.text.prompt_images import has_media, image_urls, refuse_media
from vllm_flashtrace.text.sources import find_sources
from vllm_flashtrace.text.tool_calls import call_arguments
from vllm_flashtrace.text.verification import Verification
from vllm_flashtrace.trace.config import FlashTraceConfig

if TYPE_CHECKING:
    from vllm_flashtrace.trace.multimodal import PromptImages

Messages = Sequence[Mapping[str, Any]]
Prompt = str | Sequence[int] | Messages


class FlashTrace:
    """Generates completions and tells which prompt tokens they came from.

    Example:
        >>> with FlashTrace("Qwen/Qwen3-0.6B", max_model_len=4096) as ft:
        ...     [answer] = ft.generate(["The code is 7306. What is the code?"])
        >>> answer.top(3)
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        llm: Any = None,
        flashtrace_config: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        tool_call_parser: str | None = None,
        **engine_args: Any,
    ) -> None:
        """Starts an engine, or uses an existing one.

        Args:
            model: Model name or folder; required without ``llm``.
            llm: An existing ``vllm.LLM``. The plugin must have been active when it was made,
                which it is whenever this package is installed and ``VLLM_PLUGINS`` allows it.
            flashtrace_config: Options of :class:`~vllm_flashtrace.trace.config.FlashTraceConfig`.
            chat_template: Renders chats instead of the tokenizer's own template.
            tool_call_parser: Name of vLLM's parser that finds generated tool calls, for targets
                such as ``{"tool_call": 0, "argument": "to"}``. Reasoning is found by the engine's
                own ``reasoning_parser``, if it has one.
            **engine_args: Passed to ``vllm.LLM`` unchanged.

        Raises:
            UnsupportedModelError: The model cannot be traced exactly; the message says why.
            ValueError: Both or neither of ``model`` and ``llm`` were given, or an option is bad.
        """
        if (model is None) == (llm is None):
            raise ValueError("give either a model or an existing llm")
        self._owns_engine = model is not None
        if model is not None:
            llm = start_engine(model, flashtrace_config, engine_args)
        elif flashtrace_config or engine_args:
            raise ValueError("engine arguments have no effect on an existing llm")
        self.llm: Any = llm
        if (refusal := engine_refusal(self.llm)) is not None:
            self.close()  # The caller gets no object to close.
            raise UnsupportedModelError(refusal)
        vllm_config = self.llm.llm_engine.vllm_config
        self.config = FlashTraceConfig.from_additional_config(vllm_config.additional_config)
        self._max_trace_tokens = vllm_config.model_config.max_model_len - 1
        self._tokenizer = self.llm.get_tokenizer()
        self._chat_template = chat_template
        self._make_parser = self._output_parser(tool_call_parser)
        self._reads_tool_calls = tool_call_parser is not None
        self._ids = (f"ft-offline-{i}" for i in count())

    def close(self) -> None:
        """Stops the engine if this object started it; an existing ``llm`` goes on.

        Closing again does nothing.
        """
        if self._owns_engine:
            self._owns_engine = False
            stop_engine(self.llm)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Any | None = None,
        flashtrace: Mapping[str, Any] | bool = True,
        *,
        lora_request: Any | None = None,
        **chat_args: Any,
    ) -> list[Attribution]:
        """Completes prompts or chats and attributes every completion.

        Args:
            prompts: Strings, token id lists, or lists of chat messages; one or several.
            sampling_params: ``vllm.SamplingParams`` for all of them; ``n > 1`` gives ``n`` results
                per prompt.
            flashtrace: The ``flashtrace`` request field.
            lora_request: ``vllm.lora.request.LoRARequest`` of the adapter for all of them.
            **chat_args: Passed to ``LLM.chat`` for chats.

        Returns:
            One attribution per completion, in the order of the prompts. Where there is none, say
            because nothing was generated, its ``status`` is ``failed`` or ``skipped`` and its
            ``error`` says why; the completion's text is there all the same.

        Raises:
            InvalidRequestError: The ``flashtrace`` field is bad, or a prompt does not have one of
                its sources; nothing is generated.
            TypeError: A prompt is of none of these forms.
        """
        given = as_prompts(prompts)
        request = self._parse(flashtrace, given)
        chat_args["lora_request"] = lora_request
        jobs = self._complete(given, sampling_params, chat_args)
        return self._attribute(request, jobs)

    def attribute(
        self,
        prompt: Prompt,
        completion: str | Sequence[int],
        flashtrace: Mapping[str, Any] | bool = True,
        *,
        lora_request: Any | None = None,
    ) -> Attribution:
        """Attributes text that already exists.

        Args:
            prompt: A string, token ids, or chat messages that the completion answers.
            completion: The generated text, or its token ids.
            flashtrace: The ``flashtrace`` request field.
            lora_request: The adapter that is to explain it.

        Returns:
            The attribution; see :meth:`generate` for its ``status``.

        Raises:
            InvalidRequestError: The ``flashtrace`` field is bad, or the prompt does not have one of
                its sources.
            TypeError: The prompt is of none of these forms.
        """
        [prompt] = as_prompts([prompt])
        request = self._parse(flashtrace, [prompt])
        if isinstance(completion, str):
            generated = list(self._tokenizer.encode(completion, add_special_tokens=False))
            text = completion
        else:
            generated = list(completion)
            text = self._tokenizer.decode(generated, skip_special_tokens=True)
        token_ids, rendered = self._prompt_input(prompt)
        record = Completion(
            prompt_token_ids=token_ids,
            generated_token_ids=generated,
            text=text,
            **texts_of(prompt),
        )
        job = self._job(record, rendered, lora_request)
        return self._attribute(request, [job])[0]

    def _parse(
        self, flashtrace: Mapping[str, Any] | bool, prompts: Sequence[Prompt] = ()
    ) -> FlashTraceRequest:
        value = dict(flashtrace) if isinstance(flashtrace, Mapping) else flashtrace
        request = parse_flashtrace_field(value, self.config.limits)
        if request is None:
            raise ValueError("flashtrace must be true or an object of options")
        if request.mode == "deferred":
            raise InvalidRequestError(
                "flashtrace.mode", "flashtrace.mode 'deferred' needs a server, got it offline"
            )
        if request.guard is not None and not self._reads_tool_calls:
            raise InvalidRequestError(
                "flashtrace.guard",
                "flashtrace.guard needs FlashTrace(tool_call_parser=...), got none",
            )
        for prompt in prompts:
            known = Completion((), (), "", **texts_of(prompt))
            refuse_media(known.messages or (), "messages")
            if request.guard is not None:
                require_messages(known)
            find_sources(request, known)
        return request

    def _complete(
        self, prompts: Sequence[Prompt], sampling_params: Any, chat_args: Mapping[str, Any]
    ) -> list[TraceJob]:
        """Generates; chats and plain prompts each go to the engine as one batch."""
        chats = [i for i, prompt in enumerate(prompts) if is_chat(prompt)]
        plain = [i for i, prompt in enumerate(prompts) if not is_chat(prompt)]
        outputs: dict[int, Any] = {}
        inputs: dict[int, Any] = {}
        if chats:
            conversations = [[dict(message) for message in prompts[i]] for i in chats]  # type: ignore[arg-type]
            if self._chat_template is not None:
                chat_args = {"chat_template": self._chat_template, **chat_args}
            with noting_inputs(self.llm) as noted:
                answers = self.llm.chat(conversations, sampling_params, use_tqdm=False, **chat_args)
            inputs.update(zip(chats, noted, strict=True))
            outputs.update(zip(chats, answers, strict=True))
        if plain:
            given = [engine_input(prompts[i]) for i in plain]
            answers = self.llm.generate(
                given, sampling_params, use_tqdm=False, lora_request=chat_args["lora_request"]
            )
            outputs.update(zip(plain, answers, strict=True))
        return [
            self._job(completion, inputs.get(i), chat_args["lora_request"])
            for i, prompt in enumerate(prompts)
            for completion in completions_of(outputs[i], prompt)
        ]

    def _job(self, completion: Completion, rendered: Any, lora_request: Any | None) -> TraceJob:
        """The attribution of a completion to the prompt that vLLM's renderer has made."""
        job = TraceJob(completion, next(self._ids), lora_request=lora_request)
        try:
            job.images = self._images(rendered)
        except TraceError as error:
            job.error = error
        if job.images is not None:
            job.completion = replace(completion, images=job.images.in_prompt)
        return job

    def _images(self, rendered: Any) -> PromptImages | None:
        from vllm_flashtrace.trace.multimodal import PromptImages, check_images

        images = PromptImages.of(rendered)
        if images is not None:
            config = self.llm.llm_engine.vllm_config
            check_images(config)
            if getattr(config.lora_config, "default_mm_loras", None):
                raise TraceError(
                    "unsupported_input",
                    "traces of images are not supported offline with adapters that belong to them",
                )
        return images

    def _attribute(
        self,
        request: FlashTraceRequest,
        jobs: Sequence[TraceJob],
    ) -> list[Attribution]:
        for job in jobs:
            if job.error is None:
                self._plan(request, job)
        run_jobs(jobs, self.llm, self.config)
        return [
            Attribution(
                job.outcome(),
                text=job.completion.text,
                image_urls=image_urls(job.completion.messages, len(job.completion.images)),
            )
            for job in jobs
        ]

    def _plan(self, request: FlashTraceRequest, job: TraceJob) -> None:
        completion = job.completion
        parser = self._make_parser(completion.prompt_token_ids) if self._make_parser else None
        try:
            job.plans = plan_targets(
                request,
                completion,
                self._tokenizer,
                reasoning_parser=parser,
                render=self._render,
                max_trace_tokens=self._max_trace_tokens,
                auto_threshold=self.config.auto_threshold,
                max_hops=self.config.max_hops,
                max_targets=self.config.limits.max_targets,
            )
        except FlashTraceError as error:
            job.error = error
        if request.verify:
            job.verify = partial(
                Verification,
                tokenizer=self._tokenizer,
                render=self._render,
                max_requests=self.config.max_verify_requests,
            )

    def _prompt_input(self, prompt: Prompt) -> tuple[list[int], Any]:
        """Token ids of a prompt, and what vLLM's renderer makes of a chat with images."""
        if isinstance(prompt, str):
            return list(self._tokenizer.encode(prompt)), None
        if not is_chat(prompt):
            return [int(token) for token in prompt], None  # type: ignore[arg-type]
        if not has_media(prompt):
            text = self._render(prompt)
            return list(self._tokenizer.encode(text, add_special_tokens=False)), None
        rendered = self._rendered(prompt)
        return list(rendered["prompt_token_ids"]), rendered

    def _rendered(self, messages: Messages) -> Any:
        """A chat as ``LLM.chat`` renders it."""
        from vllm.renderers import ChatParams

        renderer = self.llm.renderer
        template = self._chat_template or self.llm.chat_template
        params = ChatParams(
            chat_template=template,
            chat_template_kwargs={"add_generation_prompt": True, "tokenize": False},
        )
        tokens = renderer.default_chat_tok_params.with_kwargs(add_special_tokens=False)
        conversation = [dict(message) for message in messages]
        _, [rendered] = renderer.render_chat([conversation], params, tokens, skip_mm_cache=True)
        return rendered

    def _render(self, messages: Messages) -> str:
        rendered = self._tokenizer.apply_chat_template(
            with_decoded_arguments(messages),
            chat_template=self._chat_template,
            tokenize=False,
            add_generation_prompt=True,
        )
        return str(rendered)

    def _output_parser(self, tool_call_parser: str | None) -> Any | None:
        try:
            return offline_output_parser(self.llm, tool_call_parser)
        except ValueError:
            self.close()  # The caller gets no object to close.
            raise


def is_chat(prompt: Any) -> TypeGuard[Messages]:
    """Whether ``prompt`` is a list of chat messages."""
    return _is_list_of(prompt, Mapping)


def is_token_ids(prompt: Any) -> TypeGuard[Sequence[int]]:
    """Whether ``prompt`` is a list of token ids."""
    return _is_list_of(prompt, int)


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One or several prompts as a list.

    Raises:
        TypeError: Something in it is not a prompt.
    """
    single = isinstance(prompts, str) or is_chat(prompts) or is_token_ids(prompts)
    several: list[Any] = [prompts] if single else list(prompts)
    for prompt in several:
        if not (isinstance(prompt, str) or is_chat(prompt) or is_token_ids(prompt)):
            raise TypeError(
                "a prompt is a string, a non-empty list of token ids, or a list of messages; "
                f"got {prompt!r:.80}"
            )
    return several


def engine_input(prompt: Prompt) -> dict[str, Any]:
    """A plain prompt in the form ``vllm.LLM.generate`` takes."""
    return {"prompt": prompt} if isinstance(prompt, str) else {"prompt_token_ids": list(prompt)}


def texts_of(prompt: Prompt) -> dict[str, Any]:
    """What a `Completion` keeps of the prompt as the client gave it."""
    if isinstance(prompt, str):
        return {"prompt_text": prompt}
    return {"messages": prompt} if is_chat(prompt) else {}


def completions_of(output: Any, prompt: Prompt) -> list[Completion]:
    """The completions in a vLLM ``RequestOutput``, in the order of their index."""
    return [
        Completion(
            prompt_token_ids=list(output.prompt_token_ids),
            generated_token_ids=list(choice.token_ids),
            text=choice.text,
            **texts_of(prompt),
        )
        for choice in sorted(output.outputs, key=lambda choice: choice.index)
    ]


def with_decoded_arguments(messages: Messages) -> list[dict[str, Any]]:
    """A copy of the messages in the form that chat templates take.

    Clients send the arguments of tool calls as JSON text, templates expect them as an object.
    """
    copied = [copy.deepcopy(dict(message)) for message in messages]
    for message in copied:
        for call in message.get("tool_calls") or ():
            function = call.get("function") if isinstance(call, Mapping) else None
            arguments = function.get("arguments") if isinstance(function, dict) else None
            if isinstance(function, dict) and isinstance(arguments, str):
                known = call_arguments(arguments)
                if known or arguments.strip() in ("", "{}"):
                    function["arguments"] = dict(known)
    return copied


def _is_list_of(value: Any, kind: type) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str | bytes)
        and len(value) > 0
        and all(isinstance(item, kind) and not isinstance(item, bool) for item in value)
    )
