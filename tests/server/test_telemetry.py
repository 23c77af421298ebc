"""OpenTelemetry spans: under the request's own trace, with vLLM's spans of our requests below."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.server.scripted_app import App, build

pytestmark = pytest.mark.asyncio(loop_scope="module")

TRACE_ID, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADERS = {"traceparent": f"00-{TRACE_ID}-{PARENT}-01", "tracestate": "vendor=1"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def traced_app(
    plugins: None, model_path: str, exporter: InMemorySpanExporter
) -> AsyncIterator[App]:
    """vLLM makes the provider where it makes its engine; here it is one that keeps the spans."""
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "get_tracer", provider.get_tracer)
        endpoint = "--otlp-traces-endpoint=http://127.0.0.1:9"
        app = await build(model_path, endpoint, "--enable-prompt-tokens-details")
    yield app
    await app.client.aclose()


@pytest.fixture
def traced(traced_app: App, exporter: InMemorySpanExporter) -> App:
    traced_app.engine.reset()
    exporter.clear()
    return traced_app


async def chat(app: App, headers: dict[str, str], **body: Any) -> dict[str, Any]:
    response = await app.client.post("/v1/chat/completions", json={**CHAT, **body}, headers=headers)
    assert response.status_code == 200, response.text
    return response.json()


def ids(span: Any) -> tuple[str, str]:
    context = span.get_span_context()
    return f"{context.trace_id:032x}", f"{context.span_id:016x}"


async def test_the_attribution_is_a_child_of_the_requests_span(traced, exporter):
    answer = await chat(traced, HEADERS, flashtrace={"hops": 1, "target": {"text": "4821"}})
    [choice] = answer["choices"]
    *hops, attribution = exporter.get_finished_spans()
    assert attribution.name == "flashtrace.attribute"
    assert f"{attribution.parent.span_id:016x}" == PARENT
    assert ids(attribution)[0] == TRACE_ID
    assert attribution.status.is_unset
    result = choice["flashtrace"]
    assert dict(attribution.attributes) == {
        "gen_ai.operation.name": "attribute",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": "m",
        "gen_ai.request.id": answer["id"],
        "flashtrace.id": result["id"],
        "flashtrace.route": "/v1/chat/completions",
        "flashtrace.status": "completed",
        "flashtrace.hops": 2,
        "flashtrace.targets": 1,
        "flashtrace.target_tokens": sum(b - a for a, b in result["target"]["tokens"]),
        "flashtrace.recomputed_tokens": result["usage"]["recomputed_tokens"],
        "flashtrace.cached_tokens": result["usage"]["cached_tokens"],
    }
    assert [span.name for span in hops] == ["flashtrace.hop"] * 2
    assert [span.attributes["flashtrace.hop"] for span in hops] == [0, 1]
    assert {span.parent.span_id for span in hops} == {attribution.context.span_id}
    assert (
        sum(span.attributes["flashtrace.recomputed_tokens"] for span in hops)
        == (result["usage"]["recomputed_tokens"])
    )


async def test_its_measures_are_evaluation_events(traced, exporter):
    secret = {"role": "a secret role", "content": "Hello"}
    body = {"messages": [secret, *CHAT["messages"]], "flashtrace": {"include": ["segments"]}}
    answer = await chat(traced, HEADERS, **body)
    [choice] = answer["choices"]
    attribution = exporter.get_finished_spans()[-1]
    result = choice["flashtrace"]
    masses = ("input_mass", "remaining_mass", "target_mass", "skipped_mass")
    other, user, template = result["segments"]
    assert [
        (
            event.name,
            event.attributes["gen_ai.evaluation.name"],
            event.attributes["gen_ai.evaluation.score.value"],
            event.attributes.get("flashtrace.message"),
        )
        for event in attribution.events
    ] == [
        ("gen_ai.evaluation.result", f"flashtrace.{name}", value, message)
        for name, value, message in (
            *((name, result[name], None) for name in masses),
            ("segment.other", other["score"], 0),
            ("segment.user", user["score"], 1),
            ("segment.template", template["score"], None),
        )
    ]
    for event in attribution.events:
        assert event.attributes["gen_ai.response.id"] == answer["id"]
        assert event.attributes["flashtrace.id"] == result["id"]
    assert "secret" not in attribution.to_json()


async def test_a_span_has_no_more_events_than_are_kept(traced, exporter):
    targets = [{"text": "4821"}] * 40
    answer = await chat(traced, HEADERS, flashtrace={"targets": targets})
    attribution = exporter.get_finished_spans()[-1]
    assert len(answer["choices"][0]["flashtrace"]["targets"]) == 40
    assert len(attribution.events) == 128
    assert attribution.dropped_events == 0
    names = [event.attributes["gen_ai.evaluation.name"] for event in attribution.events]
    assert names[:40] == ["flashtrace.input_mass"] * 40


async def test_vllms_spans_of_our_requests_nest_under_the_hops(traced, exporter):
    await chat(traced, HEADERS, flashtrace={"hops": 1})
    [generation] = traced.engine.generations
    assert generation.kwargs["trace_headers"] == HEADERS
    *hops, _ = exporter.get_finished_spans()
    sent = [call.kwargs["trace_headers"] for call in traced.engine.traces]
    assert [headers["traceparent"] for headers in sent] == [
        f"00-{TRACE_ID}-{ids(span)[1]}-01" for span in hops
    ]
    assert {headers["tracestate"] for headers in sent} == {"vendor=1"}


async def test_without_trace_headers_the_attribution_is_a_root(traced, exporter):
    await chat(traced, {}, flashtrace={"hops": 0})
    hop, attribution = exporter.get_finished_spans()
    assert attribution.parent is None
    assert ids(hop)[0] == ids(attribution)[0] != TRACE_ID


async def test_a_failed_trace_is_an_error_without_text(traced, exporter):
    await chat(traced, HEADERS, flashtrace={"target": {"text": "my secret"}})
    [attribution] = exporter.get_finished_spans()
    assert attribution.status.status_code is trace.StatusCode.ERROR
    assert attribution.attributes["error.type"] == "target_not_found"
    assert attribution.attributes["flashtrace.status"] == "failed"
    assert "secret" not in attribution.to_json()


async def test_an_untraced_request_has_no_span_of_ours(traced, exporter):
    await chat(traced, HEADERS)
    assert not exporter.get_finished_spans()


async def test_with_tracing_off_headers_pass_through_untouched(app):
    await chat(app, HEADERS, flashtrace={"hops": 0})
    [call] = app.engine.traces
    assert call.kwargs["trace_headers"] == HEADERS
