"""A ``vllm.LLM`` to trace on: started, asked whether it can trace, and stopped.

The output parsers of an engine that no server stands around.

Invariant: a completion is taken apart by the parsers that a server with the same options would use,
as the answer to a request that offers tools.

Invariant: a bad option is refused before anything starts, and what the user chose is never
overridden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser import ParserManager

from vllm_flashtrace.base.process import default_kv_cache_bytes, prepare_environment
from vllm_flashtrace.server.rendering import make_reasoning_parser
from vllm_flashtrace.text.generated import OutputParser
from vllm_flashtrace.trace.config import SECTION, FlashTraceConfig

# A parser reads no calls where no tool was offered, but any call where some tool was.
_TOOL = {"type": "function", "function": {"name": "tool", "parameters": {"type": "object"}}}


def offline_output_parser(
    llm: Any, tool_call_parser: str | None
) -> Callable[[Sequence[int]], OutputParser] | None:
    """The parsers of a ``vllm.LLM``: its own ``reasoning_parser`` and a tool call parser.

    Args:
        llm: The engine.
        tool_call_parser: A name that ``--tool-call-parser`` takes, None for none.

    Returns:
        ``prompt_token_ids -> parser``; None where there is neither parser.

    Raises:
        ValueError: There is no such parser, or it does not go with the tokenizer.
    """
    config = llm.llm_engine.vllm_config
    reasoning_parser = config.structured_outputs_config.reasoning_parser
    if not reasoning_parser and tool_call_parser is None:
        return None
    tokenizer = llm.get_tokenizer()
    try:
        parser_cls = ParserManager.get_parser(
            tool_parser_name=tool_call_parser,
            reasoning_parser_name=reasoning_parser or None,
            enable_auto_tools=True,
            tokenizer=tokenizer,
        )
    except TypeError as error:
        raise ValueError(str(error)) from error
    request = ChatCompletionRequest(
        messages=[{"role": "user", "content": ""}], tools=[_TOOL], tool_choice="auto"
    )
    return make_reasoning_parser(_Handler(parser_cls, tokenizer, config.model_config), request)


class _Handler:
    """What the parsers need of vLLM's chat handler."""

    enable_auto_tools = True

    def __init__(self, parser_cls: Any, tokenizer: Any, model_config: Any) -> None:
        self.parser_cls = parser_cls
        self.renderer = self
        self.tokenizer = tokenizer
        self._model_config = model_config

    def _effective_chat_template_kwargs(self, request: Any) -> dict[str, Any]:
        return {}

    def _make_parser(self, request: Any, tokenizer: Any, chat_template_kwargs: Any) -> Any:
        return self.parser_cls(
            tokenizer,
            None,  # No schemas: values stay as they were written.
            chat_template_kwargs=chat_template_kwargs,
            model_config=self._model_config,
        )


def start_engine(model: str, config: Mapping[str, Any] | None, engine_args: dict[str, Any]) -> Any:
    """Starts a ``vllm.LLM`` that this package can trace on.

    Args:
        model: Model name or folder.
        config: Fields of ``FlashTraceConfig``; None leaves those in ``additional_config`` alone.
        engine_args: Arguments of ``vllm.LLM``.

    Raises:
        ValueError: An option is bad; nothing was started.
    """
    if config is not None:
        additional = {**(engine_args.get("additional_config") or {}), SECTION: dict(config)}
        engine_args = {**engine_args, "additional_config": additional}
    FlashTraceConfig.from_additional_config(engine_args.get("additional_config"))
    prepare_environment()
    if not {"kv_cache_memory_bytes", "gpu_memory_utilization"} & engine_args.keys():
        sizes = ("tensor_parallel_size", "pipeline_parallel_size")
        workers = math.prod(int(engine_args.get(size) or 1) for size in sizes)
        engine_args = {**engine_args, "kv_cache_memory_bytes": default_kv_cache_bytes(workers)}
    from vllm import LLM

    return LLM(model=model, **engine_args)


def stop_engine(llm: Any) -> None:
    """Ends the engine's processes; the ``vllm.LLM`` is of no use afterwards."""
    llm.llm_engine.engine_core.shutdown()


def engine_refusal(llm: Any) -> str | None:
    """Why this engine cannot trace its model; None if it can."""
    from vllm_flashtrace.trace.pickup import decode_status

    if llm.llm_engine.vllm_config.parallel_config.data_parallel_size > 1:
        # vLLM runs one process per rank then, and a batch ends at different times in each.
        return "traces are not supported offline with data parallelism"
    try:
        return decode_status(llm.collective_rpc("flashtrace_status"))["refusal"]
    except Exception as error:
        return f"the engine runs without the FlashTrace plugin ({error})"
