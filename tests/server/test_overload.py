"""Too many traces: who waits, who is turned away, and that everything is given back."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio
import torch

from tests.server.scripted_app import App, build
from vllm_flashtrace.base.records import Completion
from vllm_flashtrace.text.plan import plan_targets
from vllm_flashtrace.trace import tracer as tracer_module
from vllm_flashtrace.trace.tracer import EngineContext
from vllm_flashtrace.trace.wire import WireReport

pytestmark = pytest.mark.asyncio(loop_scope="module")

EXISTING = {"prompt": "The code is 4821. Repeat:", "completion": " 4821"}
LARGE = {"prompt": "one two three four five six seven eight " * 6, "completion": " 4821"}
LONG = {"prompt": LARGE["prompt"] * 2, "completion": " 4821"}
# 60 tokens and two fixed parts: room for two short traces, not for a long one.
BUDGET = {
    "accumulator_budget_bytes": 60 * 1000 + 2 * 500,
    "accumulator_bytes_per_token": 1000,
    "accumulator_fixed_bytes": 500,
}


def options(**flashtrace: Any) -> tuple[str, str]:
    return "--additional-config", json.dumps({"flashtrace": flashtrace})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def small_app(plugins: None, model_path: str) -> AsyncIterator[App]:
    """Two places, three may wait, for three seconds."""
    chosen = options(max_concurrent_traces=2, max_waiting_traces=3, max_waiting_seconds=3.0)
    app = await build(model_path, *chosen, status=BUDGET)
    yield app
    await app.client.aclose()


@pytest.fixture
def small(small_app: App) -> Iterator[App]:
    small_app.engine.reset()
    yield small_app
    small_app.engine.trace_gate.set()


def admission(app: App) -> Any:
    return app.app.state.flashtrace.tracer._admission


def nothing_held(app: App) -> bool:
    queue = admission(app)
    return (queue.holders, queue.held_bytes, queue.waiting) == (0, 0, 0)


async def attribute(app: App, **body: Any) -> dict[str, Any]:
    response = await app.post("/v1/attributions", **{**EXISTING, **body})
    assert response.status_code == 200, response.text
    return response.json()


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def test_waiters_run_as_places_become_free(small):
    small.engine.trace_gate.clear()
    tasks = [asyncio.create_task(attribute(small)) for _ in range(5)]
    await until(lambda: admission(small).waiting == 3 and len(small.engine.traces) == 2)
    small.engine.trace_gate.set()
    results = await asyncio.gather(*tasks)
    assert [result["status"] for result in results] == ["completed"] * 5
    queued = [result["usage"]["seconds"]["queue"] for result in results]
    assert all(seconds >= 0 for seconds in queued)
    assert nothing_held(small)


async def test_above_the_queues_length_a_trace_is_skipped_before_planning(small):
    small.engine.trace_gate.clear()
    tasks = [asyncio.create_task(attribute(small)) for _ in range(5)]
    await until(lambda: admission(small).waiting == 3)
    turned_away = await attribute(small)
    assert turned_away["status"] == "skipped"
    assert turned_away["error"] == {
        "code": "overloaded",
        "message": "3 attributions are waiting already",
    }
    small.engine.trace_gate.set()
    assert {result["status"] for result in await asyncio.gather(*tasks)} == {"completed"}
    assert nothing_held(small)


class Plans:
    """Holds every plan back until it is let go, and notes what is planned."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[str] = []
        self.at_once = self.most = 0
        self.go = threading.Event()
        monkeypatch.setattr(tracer_module, "plan_targets", self.plan)

    def plan(self, request: Any, completion: Completion, *args: Any, **kwargs: Any) -> Any:
        self.begun.append(completion.text)
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            assert self.go.wait(20)
            return plan_targets(request, completion, *args, **kwargs)
        finally:
            self.at_once -= 1


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Plans]:
    held = Plans(monkeypatch)
    yield held
    held.go.set()


async def test_plans_are_made_one_at_a_time_in_the_order_of_their_requests(small, plans):
    answers = [f" 482{i}" for i in range(5)]
    tasks = []
    for i, answer in enumerate(answers):
        tasks.append(asyncio.create_task(attribute(small, completion=answer)))
        await until(lambda i=i: small.app.state.flashtrace.tracer._planning == i + 1)
    assert plans.begun == answers[:1]
    turned_away = await attribute(small)  # Two places, three may wait.
    assert turned_away["error"]["message"] == "3 attributions are waiting already"
    plans.go.set()
    assert {result["status"] for result in await asyncio.gather(*tasks)} == {"completed"}
    assert plans.begun == answers and plans.most == 1
    assert nothing_held(small)


async def test_a_plan_whose_client_has_left_is_never_begun(small, plans):
    service, tokenizer = small.app.state.flashtrace, small.engine.get_tokenizer()
    tracer, request = service.tracer, service.parse_field(True)
    answers = [" 4820", " 4821", " 4822"]
    tasks = []
    for i, answer in enumerate(answers):
        text = Completion(tokenizer.encode("The code is"), tokenizer.encode(answer), answer)
        trace = tracer.attribute(request, text, EngineContext(), trace_id=f"ft-{i}")
        tasks.append(asyncio.create_task(trace))
        await until(lambda i=i: tracer._planning == i + 1)
    # The running one cannot be stopped, but nobody waits for it.
    for left in tasks[:2]:
        left.cancel()
    await asyncio.wait(tasks[:2])
    await until(lambda: tracer._planning == 1)
    plans.go.set()
    assert (await tasks[2])["status"] == "completed"
    assert plans.begun == [answers[0], answers[2]]
    assert nothing_held(small)


async def test_a_waiter_is_skipped_at_its_deadline_and_keeps_its_completion(small):
    small.engine.trace_gate.clear()
    holders = [asyncio.create_task(attribute(small)) for _ in range(2)]
    await until(lambda: admission(small).holders == 2)
    answer = (await small.chat(flashtrace=True)).json()["choices"][0]
    assert answer["message"]["content"] == "The code is 4821."
    assert answer["flashtrace"]["status"] == "skipped"
    assert answer["flashtrace"]["error"]["code"] == "overloaded"
    assert "within 3 s (1 attributions are waiting)" in answer["flashtrace"]["error"]["message"]
    small.engine.trace_gate.set()
    assert {result["status"] for result in await asyncio.gather(*holders)} == {"completed"}
    assert nothing_held(small)


async def test_a_trace_that_can_never_fit_is_skipped_at_once(small):
    result = await attribute(small, **LONG)
    assert result["status"] == "skipped"
    assert result["error"]["code"] == "overloaded"
    assert "bytes of accumulators; the budget" in result["error"]["message"]
    assert "61000 bytes" in result["error"]["message"]
    assert not small.engine.traces
    assert nothing_held(small)


async def test_memory_is_a_limit_of_its_own(small):
    small.engine.trace_gate.clear()
    first = asyncio.create_task(attribute(small, **LARGE, flashtrace={"preset": "paper"}))
    await until(lambda: len(small.engine.traces) == 1)
    [trace] = small.engine.traces
    tokens = len(trace.prompt["prompt_token_ids"])
    assert admission(small).held_bytes == tokens * 1000 + 500
    second = asyncio.create_task(attribute(small))  # a place is free, but not its bytes
    await until(lambda: admission(small).waiting == 1)
    assert admission(small).holders == 1
    small.engine.trace_gate.set()
    assert (await first)["status"] == (await second)["status"] == "completed"
    assert nothing_held(small)


async def test_hops_of_an_admitted_attribution_do_not_queue_again(small):
    small.engine.trace_gate.clear()
    chats = [
        asyncio.create_task(attribute(small, flashtrace={"preset": "paper"})) for _ in range(4)
    ]
    await until(lambda: admission(small).waiting == 2 and len(small.engine.traces) == 2)
    small.engine.trace_gate.set()
    results = await asyncio.gather(*chats)
    assert {len(result["hops"]) for result in results} == {2}
    order = [call.request_id.rsplit("-hop")[0] for call in small.engine.traces]
    assert set(order[:4]) == set(order[:2])
    assert nothing_held(small)


async def test_what_is_aborted_gives_back_its_place_and_lets_the_next_one_in(small):
    service = small.app.state.flashtrace
    tokenizer = small.engine.get_tokenizer()
    completion = Completion(tokenizer.encode("The code is"), tokenizer.encode(" 4821"), " 4821")
    request = service.parse_field(True)
    small.engine.trace_gate.clear()
    tasks = [
        asyncio.create_task(
            service.tracer.attribute(request, completion, EngineContext(), trace_id=f"ft-{i}")
        )
        for i in range(4)
    ]
    await until(lambda: admission(small).waiting == 2 and len(small.engine.traces) == 2)
    inside = [call.request_id.removesuffix("-hop0") for call in small.engine.traces]
    waiting = [i for i in range(4) if f"ft-{i}" not in inside]
    (aborted, runs), (gives_up, enters) = (int(name[-1]) for name in inside), waiting
    for task in (tasks[aborted], tasks[gives_up]):
        task.cancel()
    await until(lambda: len(small.engine.traces) == 3)
    assert [call.aborted for call in small.engine.traces] == [True, False, False]
    small.engine.trace_gate.set()
    assert (await tasks[runs])["status"] == (await tasks[enters])["status"] == "completed"
    assert tasks[aborted].cancelled() and tasks[gives_up].cancelled()
    assert nothing_held(small)


async def test_a_worker_without_memory_skips_the_trace(small, monkeypatch):
    refusal = WireReport(status="failed", code="overloaded", message="no room").encode()

    async def full(method: str, args: tuple[Any, ...] = ()) -> list[bytes]:
        return [refusal]

    monkeypatch.setattr(small.engine, "collective_rpc", full)
    result = await attribute(small)
    assert result["status"] == "skipped"
    assert result["error"] == {"code": "overloaded", "message": "no room"}
    assert nothing_held(small)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda length: torch.full((length,), float("nan")), "finite"),
        (torch.zeros, "all scores of the hop are zero"),
        (lambda length: torch.ones(length + 1), "must be"),
    ],
    ids=["nan", "zero", "too long"],
)
async def test_scores_that_the_recursion_refuses(small, scores, message):
    small.engine.trace_scores = scores
    result = await attribute(small, flashtrace={"preset": "paper"})
    assert result["status"] == "failed"
    assert result["error"]["code"] == "bad_scores"
    assert message in result["error"]["message"]
    assert nothing_held(small)


async def test_api_servers_share_the_budget(plugins, model_path):
    app = await build(model_path, status=BUDGET)
    app.engine.vllm_config.parallel_config._api_process_count = 2
    tracer = type(app.app.state.flashtrace.tracer)(
        app.engine, app.app.state.flashtrace.tracer.config
    )
    assert await tracer.support() is None
    assert tracer._admission.budget_bytes == BUDGET["accumulator_budget_bytes"] // 2
    await app.client.aclose()
