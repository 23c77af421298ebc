"""``flashtrace_*`` at vLLM's ``/metrics``."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.scripted_app import build
from vllm_flashtrace.base.records import Completion
from vllm_flashtrace.trace import metrics as metrics_module
from vllm_flashtrace.trace.tracer import EngineContext

pytestmark = pytest.mark.asyncio(loop_scope="module")

EXISTING = {"prompt": "The code is 4821. Repeat:", "completion": " 4821"}
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parse(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("flashtrace_")
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    [found] = [
        sample
        for (key, have), sample in samples.items()
        if key == f"flashtrace_{name}" and labels.items() <= dict(have).items()
    ]
    return found


async def scrape(app: Any) -> Samples:
    response = await app.client.get("/metrics")
    assert response.status_code == 200
    return parse(response.text)


class Change:
    """How much samples have grown since a scrape; the registry belongs to the whole process."""

    def __init__(self, before: Samples, after: Samples) -> None:
        self._before, self._after = before, after

    def of(self, name: str, **labels: str) -> float:
        def total(samples: Samples) -> float:
            return sum(
                sample
                for (key, have), sample in samples.items()
                if key == f"flashtrace_{name}" and labels.items() <= dict(have).items()
            )

        return total(self._after) - total(self._before)


async def test_everything_is_shown_before_the_first_trace():
    """In a process of its own: nothing there has been traced."""
    out = subprocess.run(
        [
            sys.executable,
            "-c",
            "from vllm_flashtrace.trace.metrics import TraceMetrics; TraceMetrics('m')\n"
            "from prometheus_client import generate_latest; print(generate_latest().decode())",
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    samples = parse(out)
    for route in metrics_module.ROUTES:
        assert value(samples, "requests_total", route=route, status="completed") == 0
    for phase in metrics_module.PHASES:
        assert value(samples, "phase_seconds_count", phase=phase) == 0
    for name in (
        "recomputed_tokens_total",
        "cached_tokens_total",
        "prefix_cache_queries_total",
        "prefix_cache_hits_total",
        "prefix_cache_misses_total",
        "traces_waiting",
        "traces_running",
        "accumulator_bytes",
        "accumulator_budget_bytes",
        "store_entries",
    ):
        assert value(samples, name, model_name="m") == 0


async def test_a_completed_trace_is_counted_with_its_cost(app):
    before = await scrape(app)
    answer = (await app.chat(flashtrace={"hops": 1})).json()
    usage = answer["choices"][0]["flashtrace"]["usage"]
    change = Change(before, await scrape(app))
    assert change.of("requests_total") == 1
    assert change.of("requests_total", route="/v1/chat/completions", status="completed") == 1
    assert change.of("recomputed_tokens_total") == usage["recomputed_tokens"]
    assert change.of("cached_tokens_total") == usage["cached_tokens"]
    for phase in ("queue", "prefill", "attribution"):
        assert change.of("phase_seconds_count", phase=phase) == 1
        got = change.of("phase_seconds_sum", phase=phase)
        assert got == pytest.approx(usage["seconds"][phase])
    assert change.of("phase_seconds_count", phase="total") == 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "Repeat: 4821", "n": 2}),
        ("/v1/attributions", {**EXISTING}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "stream": True}),
    ],
)
async def test_every_choice_counts_under_its_route(app, path, body):
    before = await scrape(app)
    response = await app.post(path, flashtrace={"hops": 0}, **body)
    assert response.status_code == 200, response.text
    change = Change(before, await scrape(app))
    assert change.of("requests_total", route=path, status="completed") == body.get("n", 1)
    assert change.of("requests_total") == body.get("n", 1)


async def test_failed_and_skipped_traces_count_with_their_code(app):
    before = await scrape(app)
    await app.chat(flashtrace={"target": {"text": "nowhere"}})
    await app.complete(echo=True, max_tokens=0, flashtrace=True)
    change = Change(before, await scrape(app))
    assert change.of("requests_total", status="failed", code="target_not_found") == 1
    assert change.of("requests_total", status="skipped", code="nothing_generated") == 1
    assert change.of("requests_total") == 2
    assert change.of("phase_seconds_count") == 0


async def test_untraced_requests_leave_our_metrics_alone(app):
    before = await scrape(app)
    await app.chat()
    await app.complete(n=2)
    assert await scrape(app) == before


async def test_gauges_follow_running_and_waiting_traces(app, monkeypatch):
    monkeypatch.setattr(app.app.state.flashtrace.tracer._admission, "_places", 1)
    app.engine.trace_gate.clear()
    tasks = [asyncio.create_task(app.post("/v1/attributions", **EXISTING)) for _ in range(3)]
    async with asyncio.timeout(20):
        while len(app.engine.traces) < 1 or value(await scrape(app), "traces_waiting") < 2:
            await asyncio.sleep(0.01)
    assert value(await scrape(app), "traces_running") == 1
    app.engine.trace_gate.set()
    await asyncio.gather(*tasks)
    samples = await scrape(app)
    assert value(samples, "traces_running") == value(samples, "traces_waiting") == 0


async def test_a_cancelled_trace_is_counted_once_and_leaves_the_gauges_at_zero(app):
    service = app.app.state.flashtrace
    tokenizer = app.engine.get_tokenizer()
    completion = Completion(tokenizer.encode("The code is"), tokenizer.encode(" 4821"), " 4821")
    app.engine.trace_gate.clear()
    before = await scrape(app)
    task = asyncio.create_task(
        service.tracer.attribute(
            service.parse_field(True), completion, EngineContext(), trace_id="ft-1"
        )
    )
    async with asyncio.timeout(20):
        while not app.engine.traces:
            await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    after = await scrape(app)
    change = Change(before, after)
    assert change.of("requests_total", status="cancelled") == change.of("requests_total") == 1
    assert value(after, "traces_running") == value(after, "accumulator_bytes") == 0


async def test_a_broken_metric_harms_nobody(app, monkeypatch):
    def broken() -> Any:
        raise OSError("no space left on device")

    monkeypatch.setattr(metrics_module, "_collectors", broken)
    answer = (await app.chat(flashtrace=True)).json()
    assert answer["choices"][0]["flashtrace"]["status"] == "completed"


async def test_another_application_in_the_process_shows_each_metric_once(app, plugins, model_path):
    other = await build(model_path)
    text = (await other.client.get("/metrics")).text
    await other.client.aclose()
    assert text.count("# TYPE flashtrace_requests_total counter") == 1


WRITER = """
import sys
from vllm_flashtrace.trace.metrics import TraceMetrics
from vllm_flashtrace.trace.admission import Admission
metrics = TraceMetrics("m")
queue = Admission(2, max_waiting=3, max_waiting_seconds=1.0, budget_bytes=100)
queue._holders = 1
metrics.load(queue)
metrics.ended("/v1/completions", "completed", "", {"total": 0.5})
print("written", flush=True)
sys.stdin.read()
"""
READER = """
from vllm.v1.metrics.prometheus import get_prometheus_registry
from prometheus_client import generate_latest
print(generate_latest(get_prometheus_registry()).decode())
"""


async def test_several_api_servers_add_up(tmp_path):
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    servers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        for server in servers:
            assert server.stdout.readline() == "written\n"
        out = subprocess.run(
            [sys.executable, "-c", READER],
            env=env,
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
    finally:
        for server in servers:
            server.stdin.close()
            server.wait(timeout=30)
    samples = parse(out)
    assert value(samples, "requests_total", route="/v1/completions") == 2
    assert value(samples, "phase_seconds_count", phase="total") == 2
    assert value(samples, "traces_running") == 2
    assert value(samples, "accumulator_budget_bytes") == 200
    assert not any("pid" in dict(labels) for _, labels in samples)
