"""Verification over HTTP, on a scripted engine."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
import torch

from tests.api.samples import check_described
from vllm_flashtrace.trace.wire import ScoreSpec, WireReport, unseal

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = "The cat sat. The code is 4821. Which code?"
FIELD = {"verify": 2, "preset": "paper", "hops": 0, "target": {"text": "4821"}}


def scores(app: Any) -> list[Any]:
    specs = [(call, unseal(call.params.extra_args["flashtrace"])) for call in app.engine.traces]
    return [call for call, spec in specs if isinstance(spec, ScoreSpec)]


async def ask(app: Any, **changes: Any) -> dict[str, Any]:
    app.engine.answers = ["The code is 4821."]
    response = await app.chat(
        messages=[{"role": "user", "content": PROMPT}], **{"flashtrace": FIELD, **changes}
    )
    data: dict[str, Any] = response.json()["choices"][0]["flashtrace"]
    return data


async def test_answers_carry_what_removal_does(app):
    app.engine.log_prob = lambda text: -0.5 if "4821. Which" in text else -4.0
    data = await ask(app, cache_salt="s", priority=0)
    check_described(data)
    verification = data["verification"]
    tokens = verification["target_tokens"]
    assert verification["log_prob"] == pytest.approx(-0.5 * tokens)
    assert [one["text"] for one in verification["removed"]] == ["The cat sat.", "The code is 4821."]
    drops = [one["log_prob_drop"] for one in verification["removed"]]
    assert drops == pytest.approx([0, 3.5 * tokens])
    assert verification["verdict"] == "supported"
    for one in verification["removed"]:
        assert PROMPT[one["start"] : one["end"]] == one["text"]
    assert data["usage"]["scored_requests"] == len(scores(app)) == 4
    assert data["usage"]["scored_tokens"] > 0 and "verify" in data["usage"]["seconds"]
    for number, call in enumerate(scores(app)):
        assert call.request_id == f"{data['id']}-score{number}"
        assert call.prompt["cache_salt"] == "s" and call.finished
    load = app.app.state.flashtrace.tracer.load
    assert (load["running"], load["accumulator_bytes"]) == (0, 0)


async def test_tokens_are_weighed_by_surprise_before_anything_is_explained(app):
    data = await ask(app, flashtrace={"weighting": "surprise", "hops": 0}, cache_salt="s")
    check_described(data)
    assert data["status"] == "completed"
    [call] = scores(app)
    assert call.request_id == f"{data['id']}-weighting"
    assert call.prompt["cache_salt"] == "s"
    assert app.engine.traces[0] is call
    assert data["usage"]["scored_requests"] == 1
    assert "weighting" in data["usage"]["seconds"]


async def test_an_attribution_whose_tokens_cannot_be_weighed_fails_alone(app):
    app.engine.log_prob = lambda text: -math.inf
    data = await ask(app, flashtrace={"weighting": "surprise", "hops": 0})
    assert (data["status"], data["error"]["code"]) == ("failed", "bad_scores")
    app.engine.log_prob = lambda text: -0.5
    data = await ask(app, flashtrace={"weighting": "surprise", "hops": 0})
    assert data["status"] == "completed"
    load = app.app.state.flashtrace.tracer.load
    assert (load["running"], load["accumulator_bytes"]) == (0, 0)


async def test_nothing_is_scored_unless_asked_for(app):
    data = await ask(app, flashtrace={"hops": 0})
    assert "verification" not in data and "scored_requests" not in data["usage"]
    assert not scores(app)


async def test_a_failure_leaves_the_attribution_and_the_other_entries(app):
    broken = WireReport(status="failed", code="recording_failed", message="no memory")
    app.engine.log_prob = lambda text: -1.0 if "cat sat" in text else broken
    data = await ask(app)
    check_described(data)
    assert data["status"] == "completed" and data["scores"]
    verification = data["verification"]
    cat, code = verification["removed"]
    reason = "recording_failed: no memory"
    assert cat["reason"] == verification["together"]["reason"] == reason
    assert code["log_prob_drop"] == 0 and "verdict" not in verification


async def test_time_is_up_for_the_verification_alone(app, monkeypatch):
    tracer = app.app.state.flashtrace.tracer
    config = tracer.config.model_copy(update={"trace_timeout_seconds": 0.5})
    monkeypatch.setattr(tracer, "config", config)
    generate = app.engine.generate

    async def slow(prompt, params, request_id, **options):
        if "-score1" in request_id:
            await asyncio.sleep(30)
        async for output in generate(prompt, params, request_id, **options):
            yield output

    monkeypatch.setattr(app.engine, "generate", slow)
    data = await ask(app)
    assert data["status"] == "completed" and "log_prob" in data["verification"]
    assert data["verification"]["together"]["reason"].startswith("timeout: ")


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ({"verify": 9}, "flashtrace.verify"),
        ({"verify": -1}, "flashtrace.verify"),
        ({"verify": True}, "flashtrace.verify"),
        ({"verify": "2"}, "flashtrace.verify"),
        ({"verify": 8, "targets": ["output"] * 20}, "flashtrace.verify"),
    ],
)
async def test_too_much_is_refused_before_generation(app, field, param):
    response = await app.chat(flashtrace=field)
    assert response.status_code == 400 and response.json()["error"]["param"] == param
    assert not app.engine.calls


async def test_deferred_attributions_are_verified(app):
    data = await ask(app, flashtrace={**FIELD, "mode": "deferred"})
    for _ in range(200):
        found = (await app.client.get(f"/v1/attributions/{data['id']}")).json()
        if found["status"] not in ("queued", "running"):
            break
        await asyncio.sleep(0.02)
    assert found["status"] == "completed" and len(found["verification"]["removed"]) == 2


async def test_citations_have_the_verdicts_of_their_sources(app):
    app.engine.log_prob = lambda text: -0.5 if "4821. Which" in text else -4.0
    sources = [{"id": "cat", "text": "The cat sat."}, {"id": "code", "text": "The code is 4821."}]
    field = {**FIELD, "verify": 1, "sources": sources, "citations": True}
    weights = {"cat": 100.0, "sat": 100.0, "is": 100.0, "code": 200.0}

    def of_words(length):
        ids = app.engine.generations[0].prompt["prompt_token_ids"]
        words = [app.engine.get_tokenizer().decode([token]).strip() for token in ids]
        found = torch.ones(length)
        found[: len(ids)] = torch.tensor([weights.get(word, 1.0) for word in words])
        return found

    app.engine.trace_scores = of_words
    app.engine.answers = ["The code is 4821."]
    messages = [{"role": "user", "content": PROMPT}]
    response = await app.chat(messages=messages, flashtrace=field)
    data = response.json()["choices"][0]["flashtrace"]
    check_described(data)
    [removed] = data["verification"]["removed"]
    assert {"index", "id", "kind", "score"} <= removed.keys() and "sentences" not in removed
    [citation] = data["citations"]
    cited = {source["id"]: source for source in citation["sources"]}
    assert cited[removed["id"]]["log_prob_drop"] == removed["log_prob_drop"]
    assert cited[removed["id"]]["verdict"] == removed["verdict"] == "unsupported"
    assert all("verdict" not in source for name, source in cited.items() if name != removed["id"])
