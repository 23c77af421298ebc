"""Non-streaming chat and plain completions through vLLM's own application."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_flashtrace.base.records import Completion
from vllm_flashtrace.trace.tracer import EngineContext

pytestmark = pytest.mark.asyncio(loop_scope="module")


def without_ids(body: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in body.items() if k not in ("id", "created")}


async def test_chat_choice_carries_its_attribution(app):
    answer = (await app.chat(flashtrace=True)).json()
    [choice] = answer["choices"]
    assert choice["message"]["content"] == "The code is 4821."
    trace = choice["flashtrace"]
    assert trace["object"] == "flashtrace.attribution"
    assert trace["status"] == "completed"
    assert trace["id"].startswith("ft-")
    assert trace["target"]["text"].startswith("The code is 4821.")
    assert trace["scores"]


async def test_trace_request_covers_exactly_what_the_engine_generated(app):
    await app.chat(flashtrace={"preset": "paper", "target": "generated"})
    [generation] = app.engine.generations
    [trace] = app.engine.traces
    prompt = list(generation.prompt["prompt_token_ids"])
    tokenizer = app.engine.get_tokenizer()
    generated = tokenizer.encode("The code is 4821.", add_special_tokens=False)
    traced = trace.prompt["prompt_token_ids"]
    assert traced[: len(prompt)] == prompt
    assert [*prompt, *generated, tokenizer.eos_token_id][: len(traced)] == traced
    assert len(traced) >= len(prompt) + len(generated)


async def test_without_the_field_nothing_is_traced_and_the_body_is_vllms(app):
    plain = (await app.chat()).json()
    traced = (await app.chat(flashtrace=True)).json()
    assert "flashtrace" not in plain["choices"][0]
    del traced["choices"][0]["flashtrace"]
    assert without_ids(traced) == without_ids(plain)
    assert list(traced["choices"][0]) == list(plain["choices"][0])


@pytest.mark.parametrize("value", [None, False])
async def test_null_and_false_mean_no_trace(app, value):
    answer = (await app.chat(flashtrace=value)).json()
    assert "flashtrace" not in answer["choices"][0]
    assert not app.engine.traces


async def test_every_one_of_n_choices_gets_its_own_trace(app):
    app.engine.answers = ["The code is 4821.", "It is 17."]
    answer = (await app.chat(n=2, flashtrace=True)).json()
    first, second = answer["choices"]
    assert first["flashtrace"]["target"]["text"].startswith("The code is 4821.")
    assert second["flashtrace"]["target"]["text"].startswith("It is 17.")
    assert first["flashtrace"]["id"] != second["flashtrace"]["id"]


async def test_several_prompts_with_n_choices_each(app):
    app.engine.answers = ["Alpha.", "Beta."]
    prompts = ["First prompt here.", "Second, a rather longer prompt."]
    answer = (await app.complete(prompt=prompts, n=2, flashtrace={"top_k": None})).json()
    texts = [c["flashtrace"]["target"]["text"] for c in answer["choices"]]
    assert [t.startswith(w) for t, w in zip(texts, ["Alpha", "Beta"] * 2, strict=True)] == [
        True
    ] * 4
    lengths = [len(c["flashtrace"]["scores"]) for c in answer["choices"]]
    ids = [len(call.prompt["prompt_token_ids"]) for call in app.engine.generations]
    assert lengths == [ids[0], ids[0], ids[1], ids[1]]


async def test_prompt_token_ids_are_accepted(app):
    ids = app.engine.get_tokenizer().encode("The code is 4821.")
    answer = (await app.complete(prompt=ids, flashtrace={"top_k": None})).json()
    scores = answer["choices"][0]["flashtrace"]["scores"]
    assert [s["token_id"] for s in scores] == ids


async def test_echo_explains_the_generated_part_only(app):
    answer = (await app.complete(prompt="Say it:", echo=True, flashtrace=True)).json()
    choice = answer["choices"][0]
    assert choice["text"] == "Say it:The code is 4821."
    assert choice["flashtrace"]["target"]["text"].startswith("The code is 4821.")


async def test_pure_echo_has_nothing_to_explain(app):
    answer = (await app.complete(echo=True, max_tokens=0, flashtrace=True)).json()
    trace = answer["choices"][0]["flashtrace"]
    assert trace["status"] == "skipped"
    assert trace["error"]["code"] == "nothing_generated"
    assert not app.engine.traces


async def test_stop_string_is_not_part_of_the_target_text(app):
    answer = (await app.complete(stop=["48"], flashtrace=True)).json()
    choice = answer["choices"][0]
    assert choice["text"] == "The code is "
    assert choice["flashtrace"]["status"] == "completed"
    assert "48" not in choice["flashtrace"]["target"]["text"]


async def test_text_that_was_not_generated_fails_the_trace_and_keeps_the_completion(app):
    answer = (await app.chat(flashtrace={"target": {"text": "nowhere"}})).json()
    [choice] = answer["choices"]
    assert choice["message"]["content"] == "The code is 4821."
    assert choice["flashtrace"]["status"] == "failed"
    assert choice["flashtrace"]["error"]["code"] == "target_not_found"


async def test_trace_shares_salt_priority_and_rank_with_the_completion(app):
    response = await app.client.post(
        "/v1/completions",
        json={"model": "m", "prompt": "Hi there", "cache_salt": "pepper", "flashtrace": True},
        headers={"X-Vllm-Priority": "-3", "X-data-parallel-rank": "0"},
    )
    assert response.status_code == 200
    [trace] = app.engine.traces[:1]
    assert trace.prompt["cache_salt"] == "pepper"
    assert trace.kwargs["priority"] == -3
    assert trace.kwargs["data_parallel_rank"] == 0


async def test_invocations_route_traces_too(app):
    answer = (await app.post("/invocations", prompt="The code is", flashtrace=True)).json()
    assert answer["choices"][0]["flashtrace"]["status"] == "completed"


async def test_a_trace_runs_with_the_adapter_of_its_completion(app):
    service = app.app.state.flashtrace
    encode = app.engine.get_tokenizer().encode
    completion = Completion(encode("The code is"), encode(" 4821"), " 4821")
    adapter = object()
    result = await service.tracer.attribute(
        service.parse_field({"hops": 0}),
        completion,
        EngineContext(lora_request=adapter),
        trace_id="ft-1",
    )
    assert result["status"] == "completed"
    assert app.engine.traces[0].kwargs["lora_request"] is adapter
