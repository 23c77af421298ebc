"""The traces of one HTTP request, and what all requests of an API server share.

A request with the ``flashtrace`` field is accepted whole or refused with an `InvalidRequestError`
before anything is generated; the field is never dropped silently. A trace that fails leaves its
completion untouched.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from vllm_flashtrace.api.request import (
    FIELD,
    FlashTraceRequest,
    RequestLimits,
    parse_flashtrace_field,
)
from vllm_flashtrace.base.errors import InvalidRequestError, TraceError
from vllm_flashtrace.base.logs import log_unexpected
from vllm_flashtrace.base.records import Completion, Document, PromptImage
from vllm_flashtrace.server.deferred import DeferredAttributions
from vllm_flashtrace.server.large_objects import Carried, carried, plain
from vllm_flashtrace.server.recording_client import IMAGES, TEXT, RecordedPrompt
from vllm_flashtrace.text.prompt_texts import Render
from vllm_flashtrace.text.sources import check_written, find_sources
from vllm_flashtrace.trace.tracer import AsyncTracer, EngineContext, in_text_thread
from vllm_flashtrace.trace.wire import EXTRA_ARGS_KEY

Attribution = dict[str, Any]

# Keys of `vllm_xargs` that clients must not set: internal trace requests travel under them.
RESERVED_XARGS = frozenset({EXTRA_ARGS_KEY, "flashtrace_trace"})


class TraceSession:
    """Runs one trace per choice of a request.

    Each is a task, which is finished or cancelled, and awaited, when :meth:`close` returns; a
    deferred trace is handed over whole and is no task of the request.
    """

    def __init__(
        self, service: TraceService, facts: RequestFacts, prompts: Sequence[RecordedPrompt]
    ) -> None:
        self._service = service
        self._facts = facts
        self._prompts = prompts
        self._tasks: dict[int, asyncio.Task[Attribution]] = {}

    def start(self, index: int) -> None:
        """Starts the trace of choice ``index``, whose generation is over; at most once."""
        if index not in self._tasks:
            self._tasks[index] = asyncio.create_task(
                self._trace(index), name=f"flashtrace-choice-{index}"
            )

    @property
    def flashtrace(self) -> FlashTraceRequest:
        """What the request asks for."""
        return self._facts.flashtrace

    def done(self, index: int) -> bool:
        """Whether the trace of choice ``index`` has ended."""
        return self._tasks[index].done()

    async def result(self, index: int, *, whole: bool = False) -> Carried:
        """Waits for the attribution of choice ``index``.

        Args:
            index: Of the choice.
            whole: The object itself, also a large one; else what a response carries that is sent
                at once and kept nowhere.
        """
        attribution = await self._tasks[index]
        return await asyncio.to_thread(plain, attribution) if whole else carried(attribution)

    async def citations(self, index: int) -> list[dict[str, Any]] | None:
        """The citations of choice ``index``; None if none were asked for or there is no trace."""
        if self.flashtrace.citations is None:
            return None
        citations: list[dict[str, Any]] | None = (await self._tasks[index]).get("citations")
        return citations

    async def close(self) -> None:
        """Cancels what still runs and waits until it has stopped."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def attach(self, choices: Sequence[Any]) -> None:
        """Traces all ``choices`` of a finished response at once and sets their ``flashtrace``."""
        attributions = await self.all_of([choice.index for choice in choices])
        for choice, attribution in zip(choices, attributions, strict=True):
            choice.flashtrace = attribution

    async def all_of(self, indices: Sequence[int], *, whole: bool = False) -> list[Carried]:
        """Traces finished choices at once and waits for all of them, as :meth:`result` does."""
        try:
            for index in indices:
                self.start(index)
            return [await self.result(index, whole=whole) for index in indices]
        finally:
            await self.close()

    async def _trace(self, index: int) -> Attribution:
        trace_id = new_trace_id()
        try:
            return await self._attribute(index, trace_id)
        except Exception as error:
            # The completion is already paid for: whatever goes wrong here must not take it away.
            log_unexpected("an attribution", error)
            failure = TraceError("internal_error", f"{type(error).__name__}: {error}")
            return self._service.tracer.lost(trace_id, failure, route=self._facts.route)

    async def _attribute(self, index: int, trace_id: str) -> Attribution:
        prompt_index, choice_index = divmod(index, self._facts.choices_per_prompt)
        prompt = self._prompts[prompt_index]
        context = prompt.context_of(choice_index)
        refusal = self._nothing_to_trace(prompt, choice_index)
        if refusal is not None:
            return self._service.tracer.lost(
                trace_id, refusal, context, route=self._facts.route, status="skipped"
            )
        finder = self._facts.reasoning_parser
        return await self._service.attribute(
            self._facts.flashtrace,
            self._completion(prompt_index, choice_index),
            context,
            reasoning_parser=finder(prompt.prompt_token_ids) if finder else None,
            render=self._facts.render,
            trace_id=trace_id,
            route=self._facts.route,
        )

    def _nothing_to_trace(self, prompt: RecordedPrompt, choice_index: int) -> TraceError | None:
        if prompt.input_type not in (TEXT, IMAGES):
            return TraceError(
                "unsupported_input",
                f"the prompt is neither text nor images (engine input type {prompt.input_type!r})",
            )
        choice = prompt.choices.get(choice_index)
        if not self._facts.generates or choice is None or not choice.token_ids:
            return TraceError("nothing_generated", "no token was generated for this choice")
        return None

    def _completion(self, prompt_index: int, choice_index: int) -> Completion:
        prompt = self._prompts[prompt_index]
        choice = prompt.choices[choice_index]
        texts = self._facts.prompt_texts
        return Completion(
            prompt_token_ids=prompt.prompt_token_ids,
            generated_token_ids=choice.token_ids,
            text=choice.text,
            prompt_text=texts[prompt_index] if prompt_index < len(texts) else None,
            messages=self._facts.messages,
            documents=self._facts.documents,
            images=images_of(prompt.context),
        )


def images_of(context: EngineContext) -> Sequence[PromptImage]:
    """The images of a prompt, by what its trace shares with it."""
    return () if context.images is None else context.images.in_prompt


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """What the HTTP request says about the completions that the engine cannot know.

    Attributes:
        flashtrace: The validated ``flashtrace`` field.
        choices_per_prompt: ``n``; choice ``i`` belongs to prompt ``i // n``.
        prompt_texts: The client's own prompt strings, one per prompt, None where it sent ids.
        messages: The client's chat messages, None for a plain completion.
        generates: False when the client only wants its prompt echoed.
        render: Renders chat messages as this request's prompt was rendered, or None.
        reasoning_parser: Makes the reasoning finder for given prompt token ids, or None.
        route: Route of the request, for metrics and logs.
        documents: Documents that came with the messages.
    """

    flashtrace: FlashTraceRequest
    choices_per_prompt: int
    prompt_texts: Sequence[str | None] = ()
    messages: Sequence[Mapping[str, Any]] | None = None
    generates: bool = True
    render: Callable[..., Any] | None = None
    reasoning_parser: Callable[[Sequence[int]], Any] | None = None
    route: str = "/v1/chat/completions"
    documents: Sequence[Document] = ()

    async def check_sources(self) -> None:
        """Refuses sources that the messages or the prompts do not hold, before the generation.

        Raises:
            InvalidRequestError: Naming the source.
        """
        for prompt_text in (None,) if self.messages is not None else self.prompt_texts:
            known = Completion((), (), "", prompt_text, self.messages, self.documents)
            await check_sources(self.flashtrace, known, self.render)


async def check_sources(
    request: FlashTraceRequest, completion: Completion, render: Render | None = None
) -> None:
    """Refuses sources that a text does not hold; in a thread, for a separator may take its time.

    Args:
        request: The client's options.
        completion: The completion, or what is known of it before it is generated.
        render: Renders messages as the prompt was rendered; documents are looked for in it.

    Raises:
        InvalidRequestError: Naming the source.
    """

    def check() -> None:
        check_written(find_sources(request, completion), completion.messages, render)

    if request.sources is not None:
        await in_text_thread(check)


@dataclass(frozen=True, slots=True)
class TraceService:
    """Attribution service of one API server process.

    Attributes:
        tracer: Runs the traces.
        limits: Bounds that a request is checked against.
        deferred: Attributions that outlive their requests.
        unsupported: Why the served model cannot be traced, None when it can.
    """

    tracer: AsyncTracer
    limits: RequestLimits
    deferred: DeferredAttributions
    unsupported: str | None = None

    def parse_request(self, request: Any, value: Any) -> FlashTraceRequest | None:
        """Validates the field of a request, and that nothing else in it poses as the field.

        Args:
            request: vLLM's model of the request.
            value: The field as sent; None where the request has none.

        Returns:
            None when no attribution is asked for, and where another engine will decode: that one
            explains the answer, of which this one only prefills the prompt.

        Raises:
            InvalidRequestError: Naming the field and its value.
        """
        refuse_reserved_xargs(request)
        parsed = self.parse_field(value)
        if (getattr(request, "kv_transfer_params", None) or {}).get("do_remote_decode"):
            return None
        if parsed is not None and getattr(request, "use_beam_search", False):
            raise InvalidRequestError(
                "use_beam_search",
                f"use_beam_search=true cannot be combined with {FIELD}: beams are searched by "
                "inner requests that cannot be traced",
            )
        return parsed

    def parse_field(self, value: Any) -> FlashTraceRequest | None:
        """Validates one value of the field; None for null and false.

        Raises:
            InvalidRequestError: A bad value, or a model that cannot be traced.
        """
        parsed = parse_flashtrace_field(value, self.limits)
        if parsed is not None and self.unsupported is not None:
            raise InvalidRequestError(
                FIELD,
                f"{FIELD}: the served model cannot be traced: {self.unsupported}",
                code="unsupported_model",
            )
        return parsed

    async def attribute(
        self,
        request: FlashTraceRequest,
        completion: Completion,
        context: EngineContext,
        *,
        trace_id: str,
        route: str,
        **options: Any,
    ) -> dict[str, Any]:
        """Attributes a completion now, or later if ``request`` is deferred.

        Args:
            request: What is asked for.
            completion: The completion to explain.
            context: What the trace shares with it.
            trace_id: Fresh id of the attribution.
            route: Route of the HTTP request.
            options: Further arguments of :meth:`AsyncTracer.attribute`.

        Returns:
            The attribution object; of a deferred one, the ``queued`` object at once.
        """
        job = partial(
            self.tracer.attribute,
            request,
            completion,
            context,
            trace_id=trace_id,
            route=route,
            **options,
        )
        if request.mode != "deferred":
            return await job()
        try:
            return await self.deferred.submit(trace_id, job)
        except TraceError as error:
            return self.tracer.lost(trace_id, error, context, route=route)

    async def close(self) -> None:
        """Ends what outlives the requests; the last thing that is called."""
        await self.deferred.close()


def service_of(state: Any) -> TraceService | None:
    """The service of an application by its ``app.state``; None where the plugin is off."""
    return getattr(state, "flashtrace", None)


def new_trace_id() -> str:
    """A fresh public id of one attribution; whoever knows it may fetch a deferred one."""
    return f"ft-{secrets.token_hex(16)}"


def refuse_reserved_xargs(request: Any) -> None:
    """Keeps clients from reaching the key under which internal trace requests travel.

    Raises:
        InvalidRequestError: ``vllm_xargs`` holds a reserved key.
    """
    # The batch request model does not declare the field; it may still be sent.
    xargs = getattr(request, "vllm_xargs", None)
    if not isinstance(xargs, dict):
        return
    for key in sorted(RESERVED_XARGS.intersection(xargs)):
        raise InvalidRequestError(
            f"vllm_xargs.{key}", f"vllm_xargs.{key} is reserved for internal use"
        )
