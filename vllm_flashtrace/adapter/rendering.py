"""vLLM's renderer and output parsers as the plain callables that post-processing asks for.

Invariant: prompts are rendered by the same renderer, with the same parameters, as vLLM uses for
the request itself; where that is not possible the answer is None, never an approximation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm.exceptions import VLLMClientError, VLLMValidationError
from vllm.renderers import TokenizeParams, merge_kwargs
from vllm.utils.mistral import is_mistral_tokenizer

from vllm_flashtrace.errors import InvalidRequestError
from vllm_flashtrace.records import Span

ReasoningFinder = Callable[[str, Sequence[int]], list[Span] | None]


def make_render(handler: Any, request: Any) -> Callable[[Sequence[Mapping[str, Any]]], str | None]:
    """A function that renders other messages exactly as ``request``'s are rendered.

    Args:
        handler: vLLM's chat handler.
        request: The chat request, for its template arguments and tools.

    Returns:
        ``messages -> prompt text``; None where this model's prompts have no text form (Harmony,
        Mistral's own tokenizer) or the template rejects the messages.
    """
    online = handler.online_renderer

    def render(messages: Sequence[Mapping[str, Any]]) -> str | None:
        if online.use_harmony or is_mistral_tokenizer(online.renderer.tokenizer):
            return None
        try:
            _, prompt = online.renderer.render_messages(
                copy.deepcopy(list(messages)), _chat_params(online, request)
            )
        except VLLMClientError:  # what vLLM makes of an error raised inside a template
            return None
        text = prompt.get("prompt")
        return text if isinstance(text, str) else None

    return render


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
) -> Callable[[Sequence[int]], ReasoningFinder] | None:
    """The server's reasoning parser (``--reasoning-parser``) as a finder of character spans.

    Args:
        handler: vLLM's chat handler.
        request: The chat request; parsers depend on its template arguments.

    Returns:
        None when the server has no parser. Else ``prompt_token_ids -> finder``, where
        ``finder(text, token_ids)`` gives the spans of ``text`` that are reasoning, an empty list
        when there is none, or None when the parser's answer cannot be located in ``text``.
    """
    if handler.parser_cls is None:
        return None

    def for_prompt(prompt_token_ids: Sequence[int]) -> ReasoningFinder:
        def find(text: str, token_ids: Sequence[int]) -> list[Span] | None:
            parser = handler._make_parser(
                request,
                handler.renderer.tokenizer,
                handler._effective_chat_template_kwargs(request),
            )
            parser.set_prompt_token_ids(list(prompt_token_ids))
            reasoning, _, _ = parser.parse(
                text,
                request,
                enable_auto_tools=handler.enable_auto_tools,
                model_output_token_ids=list(token_ids),
            )
            if reasoning:
                return locate_reasoning(text, reasoning, start_marker(parser))
            return None if parser.reasoning_parser is None else []

        return find

    return for_prompt


def start_marker(parser: Any) -> str | None:
    """The text that opens reasoning for this parser, e.g. ``<think>``; None if it has none."""
    reasoning_parser = parser.reasoning_parser
    return None if reasoning_parser is None else reasoning_parser.reasoning_start_str


def locate_reasoning(text: str, reasoning: str, marker: str | None) -> list[Span] | None:
    """Finds the parser's reasoning string in the generated text.

    Args:
        text: The generated text.
        reasoning: What the parser took for reasoning, possibly stripped by it.
        marker: Opening marker; the search starts behind its first occurrence.

    Returns:
        One span, or None when ``reasoning`` is not a verbatim part of ``text``.
    """
    opened = text.find(marker) if marker else -1
    begin = opened + len(marker) if marker and opened >= 0 else 0
    start = text.find(reasoning, begin)
    return None if start < 0 else [(start, start + len(reasoning))]


def reasoning_markers(handler: Any, request: Any) -> tuple[str, str]:
    """Opening and closing reasoning markers of the served model, ``<think>`` by default."""
    if handler.parser_cls is not None:
        parser = handler._make_parser(
            request,
            handler.renderer.tokenizer,
            handler._effective_chat_template_kwargs(request),
        ).reasoning_parser
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
