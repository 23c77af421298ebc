"""Text that already exists, tokenised as if the served model had just generated it.

The prompt goes through vLLM's own rendering for the matching route, and the completion gets no
token that the caller did not give. Reasoning and tool calls that the client gives are written as
the model would write them; where the text does not show them unmistakably it is refused with HTTP
400, never approximated.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from vllm_flashtrace.api.checks import shown
from vllm_flashtrace.base.errors import InvalidRequestError
from vllm_flashtrace.base.records import Completion
from vllm_flashtrace.server.http_errors import field_path, refused_field
from vllm_flashtrace.server.recording_client import (
    IMAGES,
    TEXT,
    engine_context,
    engine_input_type,
)
from vllm_flashtrace.server.rendering import (
    Render,
    make_reasoning_parser,
    make_render,
    reasoning_markers,
    tokenize_completion,
    without_image_cache,
)
from vllm_flashtrace.server.session import images_of
from vllm_flashtrace.text.generated import OutputParser, ParsedCall, ParsedOutput
from vllm_flashtrace.text.prompt_images import refuse_media
from vllm_flashtrace.text.sources import chat_documents
from vllm_flashtrace.text.tool_calls import locate_calls
from vllm_flashtrace.trace.tracer import EngineContext

# Stands for an answer where only what the template writes around it matters.
_PROBE = "The answer ends here."


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
    refuse_media(prior, "messages")
    request = _build(ChatCompletionRequest, {**options, "messages": [dict(m) for m in prior]})
    seeing = copy.copy(handler)
    seeing.online_renderer = without_image_cache(handler.online_renderer)
    rendered = await seeing.render_chat_request(request)
    if isinstance(rendered, ErrorResponse):
        return rendered
    _, (engine_input,) = rendered
    context = _context(handler, engine_input, engine_options)
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
        documents=chat_documents(options.get("documents")),
        images=images_of(context),
    )
    return ExistingText(
        completion=completion,
        context=context,
        render=make_render(handler, request),
        reasoning_parser=given_parser(answer, reasoning_from, server_parser, markers),
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
    context = _context(handler, engine_input, engine_options)
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
    return ExistingText(completion, context)


def _build(model: type, fields: Mapping[str, Any]) -> Any:
    try:
        return model(**fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = field_path(first["loc"])
        if first["loc"] and isinstance(first["loc"][0], str):
            raise refused_field(first, path) from error
        # vLLM checks tool calls on their own, so their path begins at the list of them.
        refused = refused_field(first, f"tool_calls.{path}")
        raise InvalidRequestError("messages", f"messages: {refused.message}") from error


def _context(handler: Any, engine_input: Any, engine_options: Mapping[str, Any]) -> EngineContext:
    kind = engine_input_type(engine_input)
    if kind not in (TEXT, IMAGES):
        raise InvalidRequestError(
            "messages",
            f"messages: only text and images can be attributed (engine input type {kind!r})",
            code="unsupported_input",
        )
    return engine_context(engine_input, engine_options, handler.engine_client.vllm_config)


def _around_reasoning(prompt: str | None, markers: tuple[str, str]) -> tuple[str, str]:
    """What a model writes before and after its reasoning.

    Some chat templates end the prompt with the opening marker already.
    """
    opening, closing = markers
    tail = f"\n{closing}\n\n"
    if prompt is not None and prompt.rstrip().endswith(opening):
        return ("" if prompt.endswith("\n") else "\n"), tail
    return f"{opening}\n", tail


@dataclass(frozen=True, slots=True)
class Answer:
    """The parts of the assistant's message.

    Attributes:
        where: The message's path in the request body.
        content: Its content, empty if there are tool calls only.
        reasoning: Its reasoning, if given.
        tool_calls: Its tool calls.
    """

    where: str
    content: str
    reasoning: str | None
    tool_calls: tuple[ParsedCall, ...]


def read_answer(messages: Sequence[Mapping[str, Any]]) -> Answer:
    """Reads the last message.

    Raises:
        InvalidRequestError: It is not the assistant's, or a part of it is missing or malformed.
    """
    index = len(messages) - 1
    last = messages[index]
    where = f"messages.{index}"
    if last.get("role") != "assistant":
        raise InvalidRequestError(
            f"{where}.role",
            f"{where}.role must be 'assistant', the answer to attribute, "
            f"got {shown(last.get('role'))}",
        )
    tool_calls = _tool_calls(last.get("tool_calls"), where)
    content = last.get("content")
    if tool_calls and content is None:
        content = ""
    if not isinstance(content, str) or not (content or tool_calls):
        raise InvalidRequestError(
            f"{where}.content", f"{where}.content must be non-empty text, got {shown(content)}"
        )
    reasoning = last.get("reasoning_content") or last.get("reasoning")
    if reasoning is not None and not isinstance(reasoning, str):
        raise InvalidRequestError(
            f"{where}.reasoning_content",
            f"{where}.reasoning_content must be text, got {shown(reasoning)}",
        )
    return Answer(where, content, reasoning, tool_calls)


def text_with_calls(
    answer: Answer,
    messages: Sequence[Mapping[str, Any]],
    prompt: str | None,
    render: Render,
    opening: str,
) -> tuple[str, int]:
    """The generated text of an answer with tool calls: what the chat template makes of it.

    Args:
        answer: The last message.
        messages: All messages.
        prompt: The rendered prompt that the answer follows; None if it has no text form.
        render: Renders messages without the opening of a further turn.
        opening: The text that opens reasoning.

    Returns:
        The text, and where its reasoning begins (0 without reasoning).

    Raises:
        InvalidRequestError: The template does not write the calls, or writes them in a way that
            does not show where the answer begins and ends and which call is where.
    """
    whole = render(messages) if prompt is not None else None
    closing = _closing(messages, render) if whole is not None else None
    if prompt is None or whole is None or closing is None or not whole.startswith(prompt):
        raise _uncertain(answer, "the chat template does not show where the answer begins")
    text = whole.removeprefix(prompt)
    if not text.endswith(closing):
        raise _uncertain(answer, "the chat template does not show where the answer ends")
    text = text.removesuffix(closing)
    start, end = 0, 0
    if answer.reasoning is not None:
        opened = len(text) - len(text.lstrip())
        opened += len(opening) if text.startswith(opening, opened) else 0
        start = text.find(answer.reasoning.strip(), opened)
        if start < 0:
            raise InvalidRequestError(
                f"{answer.where}.reasoning_content",
                f"{answer.where}.reasoning_content: the chat template does not write it beside "
                "tool calls",
            )
        end = start + len(answer.reasoning.strip())
    if answer.content.strip() not in text[end:]:
        raise _uncertain(answer, "the chat template does not write the content beside them")
    if locate_calls(text, end, answer.tool_calls) is None:
        raise _uncertain(answer, "the text that the chat template makes does not show them")
    return text, start


def given_parser(
    answer: Answer,
    reasoning_from: int,
    server_parser: OutputParser | None,
    markers: tuple[str, str],
) -> OutputParser | None:
    """A parser that answers with what the client gave, and asks the server's for the rest.

    A stored answer without reasoning has none, as the server itself would have sent it, though a
    parser for models that open their reasoning in the prompt takes all of it for reasoning. One
    that holds reasoning markers is text as it was generated, and the server's parser reads it.

    Args:
        answer: The client's answer.
        reasoning_from: Where its reasoning begins in the text.
        server_parser: The server's parser, if it has one.
        markers: The texts that open and close reasoning.
    """
    as_generated = any(marker in answer.content for marker in markers)
    if answer.reasoning is None and not answer.tool_calls and as_generated:
        return server_parser
    if server_parser is None and answer.reasoning is None and not answer.tool_calls:
        return None

    def parse(text: str, token_ids: Sequence[int]) -> ParsedOutput:
        parsed = ParsedOutput(reads_reasoning=False)
        if server_parser is not None:
            parsed = server_parser(text, token_ids)
        if answer.reasoning is not None:
            parsed = replace(
                parsed,
                reasoning=answer.reasoning.strip(),
                reads_reasoning=True,
                reasoning_from=reasoning_from,
            )
        elif parsed.reasoning and not as_generated:
            parsed = replace(parsed, reasoning=None, content=answer.content)
        if answer.tool_calls:
            parsed = replace(parsed, tool_calls=answer.tool_calls)
        return parsed

    return parse


def _tool_calls(value: Any, where: str) -> tuple[ParsedCall, ...]:
    if not value:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise InvalidRequestError(
            f"{where}.tool_calls", f"{where}.tool_calls must be a list, got {shown(value)}"
        )
    return tuple(_tool_call(call, f"{where}.tool_calls.{i}") for i, call in enumerate(value))


def _tool_call(call: Any, where: str) -> ParsedCall:
    function = call.get("function") if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise InvalidRequestError(
            f"{where}.function.name",
            f"{where}.function.name must be non-empty text, got {shown(name)}",
        )
    try:
        decoded = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        decoded = None
    if not isinstance(decoded, Mapping):
        raise InvalidRequestError(
            f"{where}.function.arguments",
            f"{where}.function.arguments must be the JSON text of an object, "
            f"got {shown(arguments)}",
        )
    return ParsedCall(name, json.dumps(decoded, ensure_ascii=False))


def _closing(messages: Sequence[Mapping[str, Any]], render: Render) -> str | None:
    """What the template writes behind an assistant's message; None if it cannot be told."""
    rendered = render([*messages[:-1], {"role": "assistant", "content": _PROBE}])
    at = -1 if rendered is None else rendered.rfind(_PROBE)
    return None if rendered is None or at < 0 else rendered[at + len(_PROBE) :]


def _uncertain(answer: Answer, reason: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{answer.where}.tool_calls",
        f"{answer.where}.tool_calls: {reason}; give the generated text as content",
    )
