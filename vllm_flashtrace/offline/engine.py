"""A ``vllm.LLM`` to trace on: started, asked whether it can trace, and stopped.

vLLM is imported only when an engine starts: :func:`engine_log`, which keeps the engine's log out of
a command's output, has to come first.
"""

from __future__ import annotations

import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_flashtrace.base.errors import in_one_line
from vllm_flashtrace.base.process import default_kv_cache_bytes, prepare_environment

if TYPE_CHECKING:
    from vllm_flashtrace.text.generated import OutputParser

_LEVEL = "VLLM_LOGGING_LEVEL"
_STREAM = "VLLM_LOGGING_STREAM"
_STDERR = 2
# The last line of a traceback, after the prefix that vLLM gives the lines of its processes.
_LOGGED_ERROR = re.compile(r"^(?:.*[\s\]])?((?:\w+\.)*[A-Z]\w*(?:Error|Exception): .+)$", re.M)


def start_engine(model: str, config: Mapping[str, Any] | None, engine_args: dict[str, Any]) -> Any:
    """Starts a ``vllm.LLM`` that this package can trace on.

    Args:
        model: Model name or folder.
        config: Fields of ``FlashTraceConfig``; None leaves those in ``additional_config`` alone.
        engine_args: Arguments of ``vllm.LLM``.

    Raises:
        ValueError: An option is bad; nothing was started.
    """
    from vllm_flashtrace.trace.config import SECTION, FlashTraceConfig

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


@contextmanager
def noting_inputs(llm: Any) -> Iterator[list[Any]]:
    """Within the block, notes the rendered input of each request that ``llm`` gives its engine.

    Images come with their pixels, also those that vLLM's engine holds in its cache; the engine gets
    what it would get otherwise.
    """
    from vllm_flashtrace.patches.image_cache import with_pixels
    from vllm_flashtrace.trace.multimodal import as_sent

    engine, renderer = llm.llm_engine, llm.renderer
    noted: list[Any] = []
    add_request, render_chat = engine.add_request, renderer.render_chat

    def noting(request_id: str, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        noted.append(prompt)
        return add_request(request_id, as_sent(prompt), *args, **kwargs)

    engine.add_request = noting
    renderer.render_chat = partial(type(renderer).render_chat, with_pixels(renderer))
    try:
        yield noted
    finally:
        engine.add_request, renderer.render_chat = add_request, render_chat


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
        return f"the engine runs without the FlashTrace plugin ({in_one_line(error)})"


def root_cause(error: Exception, log: Path | None) -> str:
    """Why an engine failed, in one line.

    Args:
        error: As it was raised here; vLLM's may only say that the cause was logged.
        log: Standard error of the engine's processes, if it is a file.
    """
    message = in_one_line(error)
    if log is None or "root cause" not in message:
        return message
    sys.stderr.flush()
    causes = _LOGGED_ERROR.findall(log.read_text("utf-8", "replace"))
    return next((cause for cause in reversed(causes) if "root cause" not in cause), message)


@contextmanager
def engine_log() -> Iterator[Path | None]:
    """Sends standard error, that of processes started meanwhile included, to a temporary file.

    File descriptor 2 is redirected rather than loggers quietened, because vLLM logs before it
    configures logging, in several processes, and libraries warn without logging at all. Does
    nothing where the user chose a level of logging (``VLLM_LOGGING_LEVEL``). Must be entered before
    vLLM is imported.

    On success the file is deleted. An exception gets a note (``__notes__``) with the file's path.

    Yields:
        The file; None where standard error stays as it is.
    """
    if os.environ.get(_LEVEL):
        yield None
        return
    os.environ.setdefault(_STREAM, "ext://sys.stderr")
    descriptor, name = tempfile.mkstemp(prefix="vllm-flashtrace-", suffix=".log")
    sys.stderr.flush()
    saved = os.dup(_STDERR)
    os.dup2(descriptor, _STDERR)
    os.close(descriptor)
    try:
        yield Path(name)
    except BaseException as error:
        error.add_note(f"engine log: {name}")
        raise
    else:
        Path(name).unlink(missing_ok=True)
    finally:
        sys.stderr.flush()
        os.dup2(saved, _STDERR)
        os.close(saved)


# A parser reads no calls where no tool was offered, but any call where some tool was.
_TOOL = {"type": "function", "function": {"name": "tool", "parameters": {"type": "object"}}}


def offline_output_parser(
    llm: Any, tool_call_parser: str | None
) -> Callable[[Sequence[int]], OutputParser] | None:
    """The parsers of a ``vllm.LLM``: its own ``reasoning_parser`` and a tool call parser.

    They take a completion apart as a server with the same options would, as the answer to a request
    that offers tools.

    Args:
        llm: The engine.
        tool_call_parser: A name that ``--tool-call-parser`` takes, None for none.

    Returns:
        ``prompt_token_ids -> parser``; None where there is neither parser.

    Raises:
        ValueError: There is no such parser, or it does not go with the tokenizer.
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.parser import ParserManager

    from vllm_flashtrace.server.rendering import make_reasoning_parser

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
