"""Requests in flight end when a server is stopped.

What it changes: ``AsyncLLM._run_output_handler`` starts the task that hands the engine's outputs
to the requests. Where that task is cancelled, requests that still wait for an output get vLLM's
``EngineDeadError``, as they do where the task fails.

Why here: on SIGTERM vLLM kills the engine and cancels two tasks at once: the one that reads the
engine's socket, whose end makes the output handler fail and tell all requests, and the output
handler. Where the second cancellation comes first, nobody tells the requests, and the HTTP server
waits for their connections for as long as the clients stay.

Tested on: vLLM 0.32.0.
"""

from __future__ import annotations

import asyncio
import functools

from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import OutputProcessor

from vllm_flashtrace.patches._check import require_parameters


def check() -> None:
    """Raises PatchError unless the task is started and errors are handed on as expected."""
    start = getattr(AsyncLLM, "_run_output_handler", None)
    require_parameters(start, "AsyncLLM._run_output_handler", "self")
    tell = getattr(OutputProcessor, "propagate_error", None)
    require_parameters(tell, "OutputProcessor.propagate_error", *("self", "e"))


def apply() -> None:
    """Wraps the method."""
    stock = AsyncLLM._run_output_handler

    @functools.wraps(stock)
    def _run_output_handler(self: AsyncLLM) -> None:
        running = self.output_handler
        stock(self)
        if self.output_handler is not running:
            # The task may not refer to the AsyncLLM, or else that would never be collected.
            tell = functools.partial(_tell, self.output_processor)
            self.output_handler.add_done_callback(tell)

    AsyncLLM._run_output_handler = _run_output_handler


def _tell(output_processor: OutputProcessor, handler: asyncio.Task[None]) -> None:
    """What vLLM does itself where the task has failed."""
    if handler.cancelled():
        output_processor.propagate_error(EngineDeadError())
