"""What the engine was given and what it answered, for one traced request.

The recorder only watches: every output reaches vLLM's handler as the very object that the engine
produced, in the same order.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from vllm.sampling_params import RequestOutputKind

from vllm_flashtrace.base.errors import InvalidRequestError, TraceError
from vllm_flashtrace.trace.engines import noting_ranks
from vllm_flashtrace.trace.multimodal import PromptImages, as_sent, check_images
from vllm_flashtrace.trace.tracer import EngineContext

BeforeGenerate = Callable[[Any, PromptImages | None], None]

TEXT, IMAGES = "token", "multimodal"
"""Kinds of engine input that are traced."""


@dataclass(slots=True)
class RecordedChoice:
    """What was generated for one choice so far.

    Attributes:
        token_ids: Every generated id, a final EOS or stop text included.
        text: The generated text, stop strings cut off, before any parser splits it.
    """

    token_ids: list[int] = field(default_factory=list)
    text: str = ""


@dataclass(slots=True)
class RecordedPrompt:
    """One ``generate()`` call: its input, its context and its choices.

    Attributes:
        input_type: vLLM's kind of engine input; `TEXT` is a plain sequence of tokens, and `IMAGES`
            one in which some stand for images.
        context: What a trace request must share with this one to hit its prefix cache.
        prompt_token_ids: The exact prompt, empty until the engine's first output.
        choices: By index within the call.
        ranks: The engine of each choice, in their order; empty if there is only one engine.
    """

    input_type: str
    context: EngineContext
    prompt_token_ids: list[int] = field(default_factory=list)
    choices: dict[int, RecordedChoice] = field(default_factory=dict)
    ranks: list[int] = field(default_factory=list)

    def context_of(self, choice: int) -> EngineContext:
        """What a trace request must share with one choice: also the engine that served it."""
        if choice >= len(self.ranks):
            return self.context
        return replace(self.context, data_parallel_rank=self.ranks[choice])

    def add(self, output: Any, delta: bool) -> None:
        """Takes one ``RequestOutput``.

        Args:
            output: Its prompt ids are present on the first output only when streaming.
            delta: Whether each completion holds only what is new since the previous output.
        """
        if output.prompt_token_ids is not None and not self.prompt_token_ids:
            self.prompt_token_ids = list(output.prompt_token_ids)
        for completion in output.outputs:
            choice = self.choices.setdefault(completion.index, RecordedChoice())
            if delta:
                choice.token_ids.extend(completion.token_ids)
                choice.text += completion.text
            else:
                choice.token_ids = list(completion.token_ids)
                choice.text = completion.text


class RecordingClient:
    """An engine client for one request: ``generate`` is recorded, the rest is the real client's.

    Attributes:
        prompts: One record per ``generate()`` call, in call order, which is prompt order.
    """

    def __init__(self, client: Any, before_generate: BeforeGenerate) -> None:
        """Wraps ``client``.

        Args:
            client: vLLM's ``EngineClient``.
            before_generate: Sees the sampling parameters and the images of each call and may
                refuse it by raising; vLLM's handlers let that through to the caller.
        """
        self._client = client
        self._before_generate = before_generate
        self.prompts: list[RecordedPrompt] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        """Starts a recorded generation, with the arguments of ``EngineClient.generate``.

        This is a plain function, so that a refusal is raised where vLLM's handler makes the call
        and not when a stream that has already been promised is first read.
        """
        options = {**kwargs, "request_id": request_id}
        record = RecordedPrompt(
            input_type=engine_input_type(prompt),
            context=engine_context(prompt, options, self._client.vllm_config),
        )
        self._before_generate(sampling_params, record.context.images)
        self.prompts.append(record)
        outputs = self._client.generate(as_sent(prompt), sampling_params, request_id, **kwargs)
        return _record(outputs, record, sampling_params.output_kind == RequestOutputKind.DELTA)


async def _record(
    outputs: AsyncGenerator[Any, None], record: RecordedPrompt, delta: bool
) -> AsyncGenerator[Any, None]:
    # aclosing: a stream that the client drops must abort the engine's request at once, not when
    # the garbage collector finds the inner generator.
    async with aclosing(outputs):
        while True:
            # Not around the yield: what runs there belongs to others.
            with noting_ranks(record.ranks):
                output = await anext(outputs, None)
            if output is None:
                return
            record.add(output, delta)
            yield output


def engine_input_type(prompt: Any) -> str:
    """The ``type`` of a rendered engine input: token, embeds, multimodal or enc_dec."""
    return str(prompt.get("type", "unknown")) if isinstance(prompt, Mapping) else "unknown"


def engine_context(prompt: Any, generate_kwargs: Mapping[str, Any], config: Any) -> EngineContext:
    """The context that a trace request must share with a generation.

    Args:
        prompt: Rendered engine input; carries the cache salt and the images.
        generate_kwargs: Keyword arguments of ``EngineClient.generate``, ``request_id`` among them
            if there was a generation.
        config: The engine's ``VllmConfig``.

    Raises:
        InvalidRequestError: The messages hold something that is neither text nor an image, or
            images that this engine's traces do not support.
    """
    images = None
    if engine_input_type(prompt) == IMAGES:
        try:
            images = PromptImages.of(prompt)
            check_images(config)
        except TraceError as error:
            raise InvalidRequestError(
                "messages", f"messages: {error.message}", code=error.code
            ) from error
    return EngineContext(
        cache_salt=prompt.get("cache_salt") if isinstance(prompt, Mapping) else None,
        lora_request=generate_kwargs.get("lora_request"),
        priority=generate_kwargs.get("priority", 0),
        trace_headers=generate_kwargs.get("trace_headers"),
        data_parallel_rank=generate_kwargs.get("data_parallel_rank"),
        request_id=generate_kwargs.get("request_id"),
        images=images,
    )
