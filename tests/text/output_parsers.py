"""vLLM's own output parsers over a small tokenizer that has every marker they look for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedTokenizerFast
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser import ParserManager

from tests.text.small_tokenizers import make_byte_level
from vllm_flashtrace.base.records import Completion
from vllm_flashtrace.server.rendering import make_reasoning_parser
from vllm_flashtrace.text.generated import decode_generated
from vllm_flashtrace.text.plan import OutputParts, take_apart

MARKERS = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<|python_tag|>"),
    *("<|python_start|>", "<|python_end|>", "[TOOL_CALLS]"),
]


def tokenizer_with(*markers: str) -> PreTrainedTokenizerFast:
    tokenizer = make_byte_level()
    tokenizer.add_tokens(list(markers))
    return tokenizer


def tool(name: str, **types: str) -> dict[str, Any]:
    """A function tool whose parameters have these JSON types."""
    properties = {key: {"type": kind} for key, kind in types.items()}
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def take_apart_by(
    tokenizer: PreTrainedTokenizerFast,
    text: str,
    *,
    tool_parser: str | None = None,
    reasoning_parser: str | None = None,
    prompt: str = "Q",
    **request: Any,
) -> OutputParts:
    """Lets vLLM's parsers of these names read a generated text, and locates what they find."""
    parser_cls = ParserManager.get_parser(tool_parser, reasoning_parser, enable_auto_tools=True)
    handler = SimpleNamespace(
        parser_cls=parser_cls,
        enable_auto_tools=True,
        renderer=SimpleNamespace(tokenizer=tokenizer),
        _effective_chat_template_kwargs=lambda request: request.chat_template_kwargs or {},
        _make_parser=lambda request, tokenizer, kwargs: parser_cls(
            tokenizer, request.tools, chat_template_kwargs=kwargs
        ),
    )
    messages = [{"role": "user", "content": "Q"}]
    body = ChatCompletionRequest(model="m", messages=messages, **request)
    make_parser: Callable[[Sequence[int]], Any] | None = make_reasoning_parser(handler, body)
    ids = tokenizer.encode(text, add_special_tokens=False)
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    completion = Completion(prompt_ids, [*ids, tokenizer.eos_token_id], text)
    generated = decode_generated(tokenizer, completion)
    return take_apart(generated, completion, make_parser(prompt_ids) if make_parser else None)
