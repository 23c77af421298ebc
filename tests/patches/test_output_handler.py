"""What a stopped server's requests in flight are told, with vLLM's own classes around no engine."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest


def client(shutdown: Any) -> Any:
    """What ``AsyncLLM`` has when requests are in flight; ``shutdown`` stops its engine."""
    from vllm.v1.engine.output_processor import OutputProcessor

    outputs: asyncio.Queue[Any] = asyncio.Queue()

    async def next_outputs() -> Any:
        outcome = await outputs.get()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    core = SimpleNamespace(get_output_async=next_outputs, shutdown=shutdown, outputs=outputs)
    return SimpleNamespace(
        engine_core=core,
        output_processor=OutputProcessor(None, log_stats=False),
        output_handler=None,
        log_stats=False,
        logger_manager=None,
        renderer=SimpleNamespace(mm_processor_cache=None, shutdown=lambda: None),
    )


def add_requests(engine: Any, count: int) -> list[Any]:
    """The queues that the tasks of so many requests wait at."""
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.output_processor import RequestOutputCollector

    queues = [RequestOutputCollector(RequestOutputKind.DELTA, str(i)) for i in range(count)]
    for i, queue in enumerate(queues):
        engine.output_processor.request_states[str(i)] = SimpleNamespace(queue=queue)
    return queues


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> Any:
    from vllm.v1.engine.async_llm import AsyncLLM

    from vllm_flashtrace.patches import output_handler

    monkeypatch.setattr(AsyncLLM, "_run_output_handler", AsyncLLM._run_output_handler)
    output_handler.check()
    output_handler.apply()
    return AsyncLLM


async def stop(patched: Any, engine: Any) -> list[Any]:
    """Starts the output handler, stops the engine as vLLM does on SIGTERM: from another thread."""
    patched._run_output_handler(engine)
    patched._run_output_handler(engine)  # Every request asks for it.
    queues = add_requests(engine, 3)
    waiting = [asyncio.create_task(queue.get()) for queue in queues]
    await asyncio.sleep(0)
    thread = threading.Thread(target=patched.shutdown, args=(engine, 0))
    thread.start()
    done, hanging = await asyncio.wait(waiting, timeout=10)
    thread.join()
    for task in hanging:
        task.cancel()
    assert not hanging
    return [task.exception() for task in done]


def test_requests_end_where_the_handler_is_cancelled_first(patched: Any) -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    async def run() -> None:
        errors = await stop(patched, client(shutdown=lambda timeout: None))
        assert [type(error) for error in errors] == [EngineDeadError] * 3

    asyncio.run(run())


def test_requests_end_once_where_the_handler_fails_by_itself(patched: Any) -> None:
    """vLLM's own way, which tells the requests itself."""

    async def run() -> None:
        loop, failed = asyncio.get_running_loop(), threading.Event()

        def shutdown(timeout: float) -> None:
            loop.call_soon_threadsafe(engine.engine_core.outputs.put_nowait, ValueError("its own"))
            failed.wait(10)

        engine = client(shutdown)
        told: list[str] = []
        propagate = engine.output_processor.propagate_error

        def note(error: Exception) -> None:
            told.append(str(error))
            propagate(error)
            failed.set()

        engine.output_processor.propagate_error = note
        errors = await stop(patched, engine)
        assert [str(error) for error in errors] == ["its own"] * 3
        assert told == ["its own"]

    asyncio.run(run())


def test_a_handler_that_goes_on_tells_nothing(patched: Any) -> None:
    from vllm.v1.engine import EngineCoreOutputs

    async def run() -> None:
        engine = client(shutdown=lambda timeout: None)
        patched._run_output_handler(engine)
        [queue] = add_requests(engine, 1)
        engine.engine_core.outputs.put_nowait(EngineCoreOutputs())
        for _ in range(5):
            await asyncio.sleep(0)
        assert queue.output is None and not engine.output_handler.done()
        engine.output_handler.cancel()

    asyncio.run(run())
