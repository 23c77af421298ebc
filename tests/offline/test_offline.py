"""Who stops the engine of the offline API."""

from __future__ import annotations

import types
from typing import Any

import msgspec
import pytest

from vllm_flashtrace.base.errors import InvalidRequestError, UnsupportedModelError
from vllm_flashtrace.offline import flashtrace as offline
from vllm_flashtrace.offline.flashtrace import FlashTrace


class FakeLLM:
    """As much of a ``vllm.LLM`` as starting and stopping need."""

    def __init__(self, refusal: str | None = None) -> None:
        self.stopped = 0
        self.refusal = refusal
        self.llm_engine = types.SimpleNamespace(
            engine_core=types.SimpleNamespace(shutdown=self._stop),
            vllm_config=types.SimpleNamespace(
                additional_config={},
                parallel_config=types.SimpleNamespace(data_parallel_size=1),
                model_config=types.SimpleNamespace(max_model_len=8),
                structured_outputs_config=types.SimpleNamespace(reasoning_parser=""),
            ),
        )

    def get_tokenizer(self) -> None:
        return None

    def collective_rpc(self, method: str) -> list[bytes]:
        assert method == "flashtrace_status"
        return [msgspec.msgpack.encode({"refusal": self.refusal})]

    def _stop(self) -> None:
        self.stopped += 1


def started(monkeypatch: pytest.MonkeyPatch, llm: FakeLLM) -> None:
    def start(model: str, config: Any, engine_args: Any) -> FakeLLM:
        return llm

    monkeypatch.setattr(offline, "start_engine", start)


def test_an_engine_that_it_started_is_stopped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = FakeLLM()
    started(monkeypatch, llm)
    with FlashTrace("m") as ft:
        assert ft.llm is llm
        assert llm.stopped == 0
    assert llm.stopped == 1
    ft.close()
    assert llm.stopped == 1


def test_the_engine_is_stopped_when_the_block_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = FakeLLM()
    started(monkeypatch, llm)
    with pytest.raises(KeyError), FlashTrace("m"):
        raise KeyError
    assert llm.stopped == 1


def test_an_existing_engine_goes_on() -> None:
    llm = FakeLLM()
    with FlashTrace(llm=llm) as ft:
        ft.close()
    assert llm.stopped == 0


@pytest.mark.parametrize(("own", "stopped"), [(True, 1), (False, 0)])
def test_an_engine_that_cannot_trace(
    monkeypatch: pytest.MonkeyPatch, own: bool, stopped: int
) -> None:
    llm = FakeLLM("sliding windows")
    started(monkeypatch, llm)
    with pytest.raises(UnsupportedModelError, match="sliding windows"):
        FlashTrace("m") if own else FlashTrace(llm=llm)
    assert llm.stopped == stopped


def test_data_parallelism_is_refused_by_name() -> None:
    llm = FakeLLM()
    llm.llm_engine.vllm_config.parallel_config.data_parallel_size = 2
    with pytest.raises(UnsupportedModelError, match="offline with data parallelism"):
        FlashTrace(llm=llm)


def test_an_engine_without_such_a_parser_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = FakeLLM()
    started(monkeypatch, llm)
    with pytest.raises(ValueError, match="nonesuch"):
        FlashTrace("m", tool_call_parser="nonesuch")
    assert llm.stopped == 1


def test_an_existing_engine_takes_no_arguments() -> None:
    with pytest.raises(ValueError, match="no effect"):
        FlashTrace(llm=FakeLLM(), max_model_len=8)


def test_a_guard_needs_a_parser_of_tool_calls_and_messages() -> None:
    ft = FlashTrace(llm=FakeLLM())
    with pytest.raises(
        InvalidRequestError, match=r"needs FlashTrace\(tool_call_parser="
    ) as refused:
        ft.attribute([{"role": "user", "content": "Pay."}], "done", {"guard": True})
    assert refused.value.param == "flashtrace.guard"
    ft._reads_tool_calls = True
    with pytest.raises(InvalidRequestError, match="needs chat messages, got a plain prompt"):
        ft.attribute("Pay.", "done", {"guard": True})
