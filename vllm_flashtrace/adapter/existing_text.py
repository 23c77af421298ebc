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

from vllm_flashtrace.adapter.rendering import (
    ReasoningFinder,
    make_reasoning_parser,
    make_render,
    reasoning_markers,
    tokenize_completion,
)
from vllm_flashtrace.errors import InvalidRequestError
from vllm_flashtrace.records import Completion
from vllm_flashtrace.serving.recorder import engine_context, engine_input_type
from vllm_flashtrace.tracer import EngineContext

Render = Callable[[Sequence[Mapping[str, Any]]], str | None]


@dataclass(frozen=True, slots=True)
class ExistingText:
    """A finished completion that no engine request of ours produced.

    Attributes:
        completion: Its exact tokens.
        context: Engine context of its trace.
        render: Renders other messages like its prompt; None for plain text.
        reasoning_parser: Finds its reasoning; None when nothing says where it is.
    """

    completion: Completion
    context: EngineContext
    render: Render | None = None
    reasoning_parser: ReasoningFinder | None = None


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
    reasoning, content = _answer(messages)
    prior = messages[:-1]
    request = _build(ChatCompletionRequest, {**options, "messages": [dict(m) for m in prior]})
    rendered = await handler.render_chat_request(request)
    if isinstance(rendered, ErrorResponse):
        return rendered
    _, (engine_input,) = rendered
    _require_tokens(engine_input)
    text, span = content, None
    if reasoning is not None:
        head, tail = _around_reasoning(
            engine_input.get("prompt"), reasoning_markers(handler, request)
        )
        text = f"{head}{reasoning}{tail}{content}"
        span = (len(head), len(head) + len(reasoning))
    prompt_token_ids = list(engine_input["prompt_token_ids"])
    parser = make_reasoning_parser(handler, request)
    finder = parser(prompt_token_ids) if parser else None
    if span is not None:
        known = [span]

        def finder(text: str, token_ids: Sequence[int]) -> list[tuple[int, int]]:
            return known

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
        reasoning_parser=finder,
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


def _answer(messages: Sequence[Mapping[str, Any]]) -> tuple[str | None, str]:
    """Reasoning and content of the last message."""
    index = len(messages) - 1
    last = messages[index]
    where = f"messages.{index}"
    if last.get("role") != "assistant":
        raise InvalidRequestError(
            f"{where}.role",
            f"{where}.role must be 'assistant', the answer to attribute; got {last.get('role')!r}",
        )
    if last.get("tool_calls"):
        raise InvalidRequestError(
            f"{where}.tool_calls",
            f"{where}.tool_calls: the text of generated tool calls depends on the model's own "
            "format; give the generated text as content",
        )
    content = last.get("content")
    if not isinstance(content, str) or not content:
        raise InvalidRequestError(
            f"{where}.content", f"{where}.content must be non-empty text, got {content!r}"
        )
    reasoning = last.get("reasoning_content") or last.get("reasoning")
    if reasoning is not None and not isinstance(reasoning, str):
        raise InvalidRequestError(
            f"{where}.reasoning_content",
            f"{where}.reasoning_content must be text, got {reasoning!r}",
        )
    return reasoning, content


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
        param = ".".join(str(part) for part in first["loc"][:2])
        raise InvalidRequestError(param, f"{param}: {first['msg']}") from error


def _require_tokens(engine_input: Any) -> None:
    kind = engine_input_type(engine_input)
    if kind != "token":
        raise InvalidRequestError(
            "messages",
            f"messages: only text can be attributed (engine input type {kind!r})",
            code="unsupported_input",
        )
