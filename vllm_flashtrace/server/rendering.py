"""vLLM's renderer and output parsers as the plain callables that post-processing asks for.

Prompts are rendered by the same renderer, with the same parameters, as vLLM uses for the request
itself; where that is not possible the answer is None, never an approximation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from vllm.exceptions import VLLMClientError, VLLMValidationError
from vllm.renderers import TokenizeParams, merge_kwargs
from vllm.utils.mistral import is_mistral_tokenizer

from vllm_flashtrace.api.request import FlashTraceRequest, ToolCallTarget
from vllm_flashtrace.base.errors import InvalidRequestError
from vllm_flashtrace.patches import image_cache
from vllm_flashtrace.text.generated import OutputParser, ParsedCall, ParsedOutput
from vllm_flashtrace.text.prompt_images import without_pictures

Render = Callable[[Sequence[Mapping[str, Any]]], str | None]


def make_render(handler: Any, request: Any) -> Render:
    """A function that renders other messages exactly as ``request``'s are rendered.

    Args:
        handler: vLLM's chat handler.
        request: The chat request, for its template arguments and tools.
    """
    online = handler.online_renderer
    return render_with(online, lambda: _chat_params(online, request))


def render_with(online: Any, chat_params: Callable[[], Any]) -> Render:
    """A function that renders messages.

    Args:
        online: vLLM's ``OnlineRenderer``.
        chat_params: Makes the template arguments and tools.

    Returns:
        ``messages -> prompt text``; None where this model's prompts have no text form (Harmony,
        Mistral's own tokenizer) or the template rejects the messages.
    """

    def render(messages: Sequence[Mapping[str, Any]]) -> str | None:
        if online.use_harmony or is_mistral_tokenizer(online.renderer.tokenizer):
            return None
        try:
            _, prompt = online.renderer.render_messages(
                copy.deepcopy(without_pictures(messages)), chat_params()
            )
        except VLLMClientError:  # what vLLM makes of an error raised inside a template
            return None
        text = prompt.get("prompt")
        return text if isinstance(text, str) else None

    return render


def with_pixels(online: Any) -> Any:
    """A copy of vLLM's ``OnlineRenderer`` whose inputs have the pixels of their images beside them.

    vLLM's own leaves them out where the engine holds them in its cache, from which they may be gone
    when a trace needs them.
    """
    copied = copy.copy(online)
    copied.renderer = image_cache.with_pixels(online.renderer)
    return copied


def without_image_cache(online: Any) -> Any:
    """A copy of vLLM's ``OnlineRenderer`` for inputs that no engine gets as they are.

    They have their pixels, and the list of the images in the engine's cache stays as it is.
    """

    def preprocess_chat(*args: Any, **kwargs: Any) -> Any:
        return online.preprocess_chat(*args, **{**kwargs, "skip_mm_cache": True})

    copied = copy.copy(online)
    copied.preprocess_chat = preprocess_chat
    return copied


def copied_messages(messages: Any) -> Any:
    """A copy of a request's messages; vLLM may rewrite its own while it renders them.

    A list of content parts that pydantic reads lazily is empty, or is about to be refused by vLLM
    in its own words. It can be read once only, and is left to vLLM.

    Args:
        messages: Messages of vLLM's request, not nested deeper than `checks.MAX_NESTING` levels.
    """
    if isinstance(messages, Mapping):
        return {key: copied_messages(value) for key, value in messages.items()}
    if isinstance(messages, list | tuple):
        return [copied_messages(value) for value in messages]
    return [] if isinstance(messages, Iterator) else copy.deepcopy(messages)


def _chat_params(online: Any, request: Any) -> Any:
    """The template parameters that ``OnlineRenderer.render_chat`` would use for ``request``."""
    hides_tools = request.tool_choice == "none" and online.exclude_tools_when_tool_choice_none
    tools = None if request.tools is None or hides_tools else request.tools
    defaults = merge_kwargs(
        online.default_chat_template_kwargs,
        {
            "tools": None if tools is None else [tool.model_dump() for tool in tools],
            "tokenize": False,
        },
    )
    return request.build_chat_params(
        online.chat_template, online.chat_template_content_format
    ).with_defaults(defaults)


def make_reasoning_parser(
    handler: Any, request: Any
) -> Callable[[Sequence[int]], OutputParser] | None:
    """The server's ``--reasoning-parser`` and ``--tool-call-parser``, as its handler uses them.

    Args:
        handler: vLLM's chat handler.
        request: The chat request; parsers depend on its tools and template arguments.

    Returns:
        None when the server has no parser. Else ``prompt_token_ids -> parser``, where
        ``parser(text, token_ids)`` takes a finished completion apart.
    """
    if handler.parser_cls is None:
        return None

    def for_prompt(prompt_token_ids: Sequence[int]) -> OutputParser:
        def parse(text: str, token_ids: Sequence[int]) -> ParsedOutput:
            parser = _new_parser(handler, request)
            parser.set_prompt_token_ids(list(prompt_token_ids))
            reasoning, content, tool_calls = parser.parse(
                text,
                request,
                enable_auto_tools=handler.enable_auto_tools,
                model_output_token_ids=list(token_ids),
            )
            reads_reasoning = type(parser).reasoning_parser_cls is not None
            calls = [ParsedCall(call.name, call.arguments) for call in tool_calls or ()]
            return ParsedOutput(
                reasoning=reasoning,
                content=content,
                tool_calls=tuple(calls),
                # vLLM leaves further calls out of such a response.
                max_tool_calls=1 if request.parallel_tool_calls is False else None,
                reads_reasoning=reads_reasoning,
                reasoning_from=_behind(text, start_marker(parser)),
                markers=marker_tokens(parser),
                hides_reasoning=reads_reasoning and not request.include_reasoning,
            )

        return parse

    return for_prompt


def require_tool_calls(
    flashtrace: FlashTraceRequest, parser_cls: Any = None, request: Any = None
) -> None:
    """Refuses a tool call as target, and a guard, where the server finds no tool calls.

    Args:
        flashtrace: The validated field.
        parser_cls: The server's parser class; None if it has none.
        request: vLLM's request; None on a route without tools.

    Raises:
        InvalidRequestError: Naming the target or the guard, and what is missing.
    """
    target = flashtrace.target if isinstance(flashtrace.target, ToolCallTarget) else None
    if target is None and flashtrace.guard is None:
        return
    if request is None:
        missing = "completions have no tool calls on this route"
    elif parser_cls is None or parser_cls.tool_parser_cls is None:
        missing = "the server reads no tool calls (--enable-auto-tool-choice --tool-call-parser)"
    elif target is not None and (not request.tools or request.tool_choice == "none"):
        missing = "the request offers no tools"
    else:
        return
    param = "flashtrace.guard" if target is None else "flashtrace.target.tool_call"
    got = "true" if target is None else target.tool_call
    raise InvalidRequestError(param, f"{param}: {missing}, got {got}")


def _new_parser(handler: Any, request: Any) -> Any:
    return handler._make_parser(
        request, handler.renderer.tokenizer, handler._effective_chat_template_kwargs(request)
    )


def start_marker(parser: Any) -> str | None:
    """The text that opens reasoning for this parser, e.g. ``<think>``; None if it has none."""
    reasoning_parser = parser.reasoning_parser
    return None if reasoning_parser is None else reasoning_parser.reasoning_start_str


def marker_tokens(parser: Any) -> tuple[int, int] | None:
    """Ids of the tokens that open and close reasoning; None unless each is a single token."""
    reasoning_parser = parser.reasoning_parser
    if reasoning_parser is None:
        return None
    vocabulary = reasoning_parser.vocab
    opening = vocabulary.get(reasoning_parser.reasoning_start_str)
    closing = vocabulary.get(reasoning_parser.reasoning_end_str)
    return None if opening is None or closing is None else (opening, closing)


def _behind(text: str, marker: str | None) -> int:
    """The first character behind the first occurrence of a marker, 0 without one."""
    at = text.find(marker) if marker else -1
    return 0 if marker is None or at < 0 else at + len(marker)


def reasoning_markers(handler: Any, request: Any) -> tuple[str, str]:
    """Opening and closing reasoning markers of the served model, ``<think>`` by default."""
    if handler.parser_cls is not None:
        parser = _new_parser(handler, request).reasoning_parser
        if parser is not None and parser.reasoning_start_str and parser.reasoning_end_str:
            return parser.reasoning_start_str, parser.reasoning_end_str
    return "<think>", "</think>"


async def tokenize_completion(handler: Any, text: str, param: str) -> list[int]:
    """Token ids of generated text: no special tokens are added around it.

    Args:
        handler: vLLM's chat or completion handler.
        text: The generated text.
        param: The request field it came from.

    Raises:
        InvalidRequestError: The text is longer than the model's context.
    """
    limit = handler.model_config.max_model_len
    params = TokenizeParams(max_total_tokens=limit, add_special_tokens=False)
    try:
        (engine_input,) = await handler.renderer.render_cmpl_async([{"prompt": text}], params)
    except VLLMValidationError as error:
        raise InvalidRequestError(
            param, f"{param}: the text has more tokens than the model's context of {limit}"
        ) from error
    return list(engine_input["prompt_token_ids"])
