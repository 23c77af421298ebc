"""Text that already exists, tokenised as if the served model had just generated it.

Invariant: the prompt goes through vLLM's own rendering for the matching route, and the completion
gets no token that the caller did not give.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from vllm_flashtrace.base.errors import InvalidRequestError
from vllm_flashtrace.base.records import Completion
from vllm_flashtrace.server.existing_answer import given_parser, read_answer, text_with_calls
from vllm_flashtrace.server.recording_client import engine_context, engine_input_type
from vllm_flashtrace.server.rendering import (
    make_reasoning_parser,
    make_render,
    reasoning_markers,
    tokenize_completion,
)
from vllm_flashtrace.text.parsed_output import OutputParser
from vllm_flashtrace.trace.tracer import EngineContext

Render = Callable[[Sequence[Mapping[str, Any]]], str | None]


@dataclass(frozen=True, slots=True)
class ExistingText:
    """A finished completion that no engine request of ours produced.

    Attributes:
        completion: Its exact tokens.
        context: Engine context of its trace.
        render: Renders other messages like its prompt; None for plain text.
        reasoning_parser: Takes it apart; None when nothing says where its parts are.
    """

    completion: Completion
    context: EngineContext
    render: Render | None = None
    reasoning_parser: OutputParser | None = None


async def engine_options(handler: Any, request: Any, raw_request: Any) -> dict[str, Any]:
    """What vLLM's handler would pass to ``EngineClient.generate`` for such a request.

    Args:
        handler: vLLM's chat or completion handler.
        request: Has ``model`` and ``priority``.
        raw_request: The HTTP request, for its headers.
    """
    return {
        "lora_request": handler.models.lora_requests.get(request.model),
        "priority": handler._get_priority(request, raw_request),
        "trace_headers": await handler._get_trace_headers(raw_request.headers),
        "data_parallel_rank": handler._get_data_parallel_rank(raw_request),
    }


async def existing_chat(
    handler: Any,
    messages: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    engine_options: Mapping[str, Any],
) -> ExistingText | ErrorResponse:
    """Tokenises a conversation whose last message is the assistant's answer.

    Args:
        handler: vLLM's chat handler.
        messages: At least two; the last has role ``assistant``.
        options: Further fields of the chat request that shape its prompt.
        engine_options: Keyword arguments of ``EngineClient.generate`` for the trace.

    Returns:
        The text, or vLLM's own error (unknown model, bad messages).

    Raises:
        InvalidRequestError: The conversation cannot be an answered one.
    """
    answer = read_answer(messages)
    prior = messages[:-1]
    request = _build(ChatCompletionRequest, {**options, "messages": [dict(m) for m in prior]})
    rendered = await handler.render_chat_request(request)
    if isinstance(rendered, ErrorResponse):
        return rendered
    _, (engine_input,) = rendered
    _require_tokens(engine_input)
    markers = reasoning_markers(handler, request)
    if answer.tool_calls:
        closed = {"messages": [dict(m) for m in messages], "add_generation_prompt": False}
        render = make_render(handler, _build(ChatCompletionRequest, {**options, **closed}))
        text, reasoning_from = text_with_calls(
            answer, messages, engine_input.get("prompt"), render, markers[0]
        )
    else:
        head, tail = "", ""
        if answer.reasoning is not None:
            head, tail = _around_reasoning(engine_input.get("prompt"), markers)
        text, reasoning_from = f"{head}{answer.reasoning or ''}{tail}{answer.content}", len(head)
    prompt_token_ids = list(engine_input["prompt_token_ids"])
    make_parser = make_reasoning_parser(handler, request)
    server_parser = make_parser(prompt_token_ids) if make_parser else None
    completion = Completion(
        prompt_token_ids=prompt_token_ids,
        generated_token_ids=await tokenize_completion(handler, text, "messages"),
        text=text,
        messages=prior,
    )
    return ExistingText(
        completion=completion,
        context=engine_context(engine_input, engine_options),
        render=make_render(handler, request),
        reasoning_parser=given_parser(answer, reasoning_from, server_parser),
    )


async def existing_plain(
    handler: Any,
    prompt: str | Sequence[int],
    generated: str | Sequence[int],
    options: Mapping[str, Any],
    engine_options: Mapping[str, Any],
) -> ExistingText | ErrorResponse:
    """Tokenises a prompt and its completion; see :func:`existing_chat`.

    Args:
        handler: vLLM's completion handler.
        prompt: Text, tokenised with special tokens as ``/v1/completions`` does, or token ids.
        generated: Text, tokenised without special tokens, or token ids.
        options: Further fields of the completion request that shape its prompt.
        engine_options: Keyword arguments of ``EngineClient.generate`` for the trace.
    """
    # max_tokens: nothing will be generated, so no room has to be left for it.
    request = _build(CompletionRequest, {**options, "prompt": prompt, "max_tokens": None})
    if not isinstance(prompt, str):
        handler.renderer.validate_token_ids(list(prompt), parameter="prompt")
    rendered = await handler.render_completion_request(request)
    if isinstance(rendered, ErrorResponse):
        return rendered
    (engine_input,) = rendered
    _require_tokens(engine_input)
    if isinstance(generated, str):
        text, token_ids = generated, await tokenize_completion(handler, generated, "completion")
    else:
        token_ids = list(generated)
        handler.renderer.validate_token_ids(token_ids, parameter="completion")
        text = handler.renderer.tokenizer.decode(token_ids, skip_special_tokens=True)
    completion = Completion(
        prompt_token_ids=list(engine_input["prompt_token_ids"]),
        generated_token_ids=token_ids,
        text=text,
        prompt_text=prompt if isinstance(prompt, str) else None,
    )
    return ExistingText(completion, engine_context(engine_input, engine_options))


def _around_reasoning(prompt: str | None, markers: tuple[str, str]) -> tuple[str, str]:
    """What a model writes before and after its reasoning.

    Some chat templates end the prompt with the opening marker already.
    """
    opening, closing = markers
    tail = f"\n{closing}\n\n"
    if prompt is not None and prompt.rstrip().endswith(opening):
        return ("" if prompt.endswith("\n") else "\n"), tail
    return f"{opening}\n", tail


def _build(model: type, fields: Mapping[str, Any]) -> Any:
    try:
        return model(**fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        path = first["loc"][:2]
        # vLLM checks tool calls on their own, so the path begins at the list of them.
        from_body = isinstance(path[0], str) if path else False
        param = ".".join(map(str, path)) if from_body else "messages"
        raise InvalidRequestError(param, f"{param}: {first['msg']}") from error


def _require_tokens(engine_input: Any) -> None:
    kind = engine_input_type(engine_input)
    if kind != "token":
        raise InvalidRequestError(
            "messages",
            f"messages: only text can be attributed (engine input type {kind!r})",
            code="unsupported_input",
        )
