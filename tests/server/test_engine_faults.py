"""An engine that dies, stops or drops a trace: the completion stays, the trace says why."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest

from tests.server.fake_engine import _choice, _request_output
from vllm_flashtrace.base import logs
from vllm_flashtrace.trace import hop as engine_hop

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[logging.LogRecord]]:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    monkeypatch.setattr(logs, "_seen", set())
    monkeypatch.setattr(engine_hop, "CHECK_SECONDS", 0.02)
    logs.logger.addHandler(handler)
    yield records
    logs.logger.removeHandler(handler)


def outcome(answer: dict[str, Any]) -> tuple[str, str, str]:
    [choice] = answer["choices"]
    trace = choice["flashtrace"]
    return choice["message"]["content"], trace["status"], trace["error"]["code"]


def lost(lines: list[logging.LogRecord]) -> list[str]:
    return [line.getMessage() for line in lines if line.getMessage().startswith("Trace ft-")]


async def chats(app: Any, count: int) -> list[asyncio.Task[Any]]:
    tasks = [asyncio.create_task(app.chat(flashtrace=True)) for _ in range(count)]
    async with asyncio.timeout(20):
        while not app.engine.traces or len(app.engine.generations) < count:
            await asyncio.sleep(0.005)
    return tasks


async def test_death_of_the_engine_while_traces_run_and_wait(app, lines, monkeypatch):
    admission = app.app.state.flashtrace.tracer._admission
    monkeypatch.setattr(admission, "_places", 1)
    app.engine.trace_gate.clear()
    tasks = await chats(app, 3)
    async with asyncio.timeout(20):
        while admission.waiting < 2:
            await asyncio.sleep(0.005)
    monkeypatch.setattr(app.engine, "errored", True)
    answers = [(await task).json() for task in tasks]
    assert [outcome(answer) for answer in answers] == [
        ("The code is 4821.", "failed", "engine_dead")
    ] * 3
    assert len(lost(lines)) == 3
    for answer in answers:
        [line] = [line for line in lost(lines) if f"request={answer['id']} " in line]
        assert answer["choices"][0]["flashtrace"]["id"] in line
        assert "code=engine_dead" in line
    assert not any(line.exc_info for line in lines)
    assert (admission.holders, admission.waiting) == (0, 0)


async def test_workers_that_never_answer_because_the_engine_died(app, lines, monkeypatch):
    async def silent(*args: Any, **kwargs: Any) -> list[bytes]:
        monkeypatch.setattr(app.engine, "errored", True)
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(app.engine, "collective_rpc", silent)
    answer = (await app.chat(flashtrace=True)).json()
    assert outcome(answer) == ("The code is 4821.", "failed", "engine_dead")


async def test_an_engine_that_raises_what_vllm_raises_when_it_is_dead(app, lines, monkeypatch):
    async def dead(call: Any) -> AsyncGenerator[Any, None]:
        monkeypatch.setattr(app.engine, "errored", True)
        raise app.engine.dead_error
        yield

    monkeypatch.setattr(app.engine, "_trace", dead)
    answer = (await app.chat(flashtrace=True)).json()
    assert outcome(answer) == ("The code is 4821.", "failed", "engine_dead")
    assert not any(line.exc_info for line in lines)


async def test_a_trace_that_the_engine_aborts(app, lines, monkeypatch):
    async def aborted(call: Any) -> AsyncGenerator[Any, None]:
        yield _request_output(call, [_choice(0, "", [], "abort")], True)

    monkeypatch.setattr(app.engine, "_trace", aborted)
    answer = (await app.chat(flashtrace=True)).json()
    assert outcome(answer) == ("The code is 4821.", "failed", "aborted")
    [line] = lost(lines)
    assert "hop=0" in line


async def test_an_error_nobody_foresaw_has_one_traceback_and_a_line_each_time(
    app, lines, monkeypatch
):
    async def broken(call: Any) -> AsyncGenerator[Any, None]:
        raise RuntimeError("it holds The code is 4821.")
        yield

    monkeypatch.setattr(app.engine, "_trace", broken)
    for _ in range(2):
        answer = (await app.chat(flashtrace=True)).json()
        assert outcome(answer) == ("The code is 4821.", "failed", "internal_error")
    assert len(lost(lines)) == 2
    assert not any("The code" in line for line in lost(lines))  # An id may hold any digits.
    assert len([line for line in lines if line.exc_info]) == 1
