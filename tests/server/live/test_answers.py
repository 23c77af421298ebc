"""A real server, a real model and OpenAI's own client."""

from __future__ import annotations

import time

import anthropic
import httpx
import openai
import pytest

from tests.server.live_server import PLAIN_REQUESTS, Server, ask, assert_same

pytestmark = pytest.mark.timeout(1200)

SECRET_WORD = "4821"
QUESTION = [
    {
        "role": "user",
        "content": "The weather is fine. The door code is 4821. The cat is black. "
        "What is the door code? Answer with the code.",
    }
]


@pytest.fixture(scope="session")
def client(server: Server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client: openai.OpenAI, flashtrace=True, **options):
    options = {"max_tokens": 24, "temperature": 0, "messages": QUESTION, **options}
    return client.chat.completions.create(
        model="m", extra_body={"flashtrace": flashtrace}, **options
    )


def check_completed(trace):
    assert trace["status"] == "completed", trace
    scores = [score["score"] for score in trace["scores"]]
    assert scores
    assert min(scores) >= 0
    assert 0 < sum(scores) <= 1 + 1e-6
    assert 0 <= trace["remaining_mass"] <= 1
    # What was in the prefix cache is other people's business, as it is in vLLM's own usage.
    assert trace["usage"].keys() == {"seconds"}


def test_chat(client):
    choice = chat(client, {"top_k": None}).choices[0]
    check_completed(choice.flashtrace)
    content = QUESTION[0]["content"]
    for score in choice.flashtrace["scores"]:
        if "start" in score:
            assert score["message"] == 0
            where = content[score["start"] : score["end"]]
            assert where.strip() == score["token"].strip()


def test_the_answer_comes_from_where_it_stands(client):
    given = attribute(client, messages=[*QUESTION, {"role": "assistant", "content": "4821"}])
    check_completed(given)
    best = max((s for s in given["scores"] if "start" in s), key=lambda score: score["score"])
    content = QUESTION[0]["content"]
    assert abs(best["start"] - content.index(SECRET_WORD)) <= 40, best


def attribute(client: openai.OpenAI, **body):
    response = httpx.post(
        f"{client.base_url}attributions", json={"model": "m", **body}, timeout=300
    )
    assert response.status_code == 200, response.text
    return response.json()


def test_existing_text_gives_the_scores_of_the_completion(client):
    field = {"target": "generated", "hops": 0}
    choice = chat(client, field, max_tokens=8).choices[0]
    given = attribute(
        client,
        messages=[*QUESTION, {"role": "assistant", "content": choice.message.content}],
        flashtrace={"target": {"tokens": choice.flashtrace["target"]["tokens"]}, "hops": 0},
    )
    expected = {s["index"]: s["score"] for s in choice.flashtrace["scores"]}
    got = {s["index"]: s["score"] for s in given["scores"]}
    for index in expected.keys() & got.keys():
        assert got[index] == pytest.approx(expected[index], rel=1e-3, abs=1e-5)
    assert len(expected.keys() & got.keys()) >= len(expected) - 2


def test_n_choices(client):
    answer = chat(client, n=2, temperature=1.0, seed=7)
    for choice in answer.choices:
        check_completed(choice.flashtrace)
    assert answer.choices[0].flashtrace["id"] != answer.choices[1].flashtrace["id"]


def test_completions(client):
    answer = client.completions.create(
        model="m",
        prompt=["The sky is", "Two plus two is"],
        max_tokens=6,
        temperature=0,
        echo=True,
        extra_body={"flashtrace": {"hops": 0}},
    )
    assert len(answer.choices) == 2
    for choice in answer.choices:
        check_completed(choice.flashtrace)
        assert choice.flashtrace["target"]["text"] in choice.text


def test_stream_accumulator_keeps_the_attribution(client):
    with client.chat.completions.stream(
        model="m",
        messages=QUESTION,
        max_tokens=12,
        temperature=0,
        stream_options={"include_usage": True},
        extra_body={"flashtrace": True},
    ) as stream:
        final = stream.get_final_completion()
    check_completed(final.choices[0].message.flashtrace)
    assert final.choices[0].message.content
    assert final.usage.completion_tokens > 0


def test_first_token_of_a_stream_does_not_wait_for_the_trace(client):
    def comes_early() -> bool:
        began = time.monotonic()
        first = end = 0.0
        for chunk in chat(client, {"hops": 2}, stream=True):
            if not first and chunk.choices and chunk.choices[0].delta.content:
                first = time.monotonic() - began
            end = time.monotonic() - began
        return 0 < first < end / 2

    # A busy machine may keep this client from reading, never make the server hold tokens back.
    assert any(comes_early() for _ in range(3))


def test_text_stream(client):
    chunks = list(
        client.completions.create(
            model="m",
            prompt="The sky is",
            max_tokens=5,
            stream=True,
            extra_body={"flashtrace": {"hops": 0}},
        )
    )
    [trace] = [c for c in chunks if getattr(c.choices[0], "flashtrace", None)]
    assert trace is chunks[-1]
    check_completed(trace.choices[0].flashtrace)


def test_responses(client):
    options = {"model": "m", "input": QUESTION, "max_output_tokens": 24, "temperature": 0}
    field = {"extra_body": {"flashtrace": {"hops": 0}}}
    whole = client.responses.create(**options, **field)
    check_completed(whole.output[0].flashtrace)
    with client.responses.stream(**options, **field) as stream:
        final = stream.get_final_response()
    check_completed(final.output[0].flashtrace)
    assert final.output_text == whole.output_text
    streamed = {s["index"]: s["score"] for s in final.output[0].flashtrace["scores"]}
    for score in whole.output[0].flashtrace["scores"][:10]:
        assert streamed[score["index"]] == pytest.approx(score["score"], rel=1e-3, abs=1e-5)


def test_messages(server):
    options = {"model": "m", "messages": QUESTION, "max_tokens": 24}
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        field = {"extra_body": {"flashtrace": {"hops": 0}}}
        check_completed(client.messages.create(**options, **field).flashtrace)
        events = list(client.messages.create(**options, **field, stream=True))
    assert [event.type for event in events][-2:] == ["flashtrace", "message_stop"]
    check_completed(events[-2].flashtrace)


def test_text_that_was_not_generated(client):
    choice = chat(client, {"target": {"text": "xylophone quartet"}}).choices[0]
    assert choice.message.content
    assert choice.flashtrace["status"] == "failed"
    assert choice.flashtrace["error"]["code"] == "target_not_found"


@pytest.mark.parametrize(
    "body",
    [
        {"flashtrace": {"hops": -1}},
        {"flashtrace": {"unknown": 1}},
        {"flashtrace": {"target": {"tokens": [[0, 4000]]}}},
        {"flashtrace": True, "use_beam_search": True, "n": 2},
        {"vllm_xargs": {"flashtrace": "AAAA"}},
    ],
)
def test_bad_request(client, body):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="m", messages=QUESTION, max_tokens=8, extra_body=body)
    assert error.value.param is not None
    assert next(iter(body)) in error.value.param or "beam" in error.value.param


@pytest.mark.parametrize("index", range(len(PLAIN_REQUESTS)))
def test_without_the_field_the_answer_is_stock_vllms(server, stock_answers, index):
    path, body = PLAIN_REQUESTS[index]
    assert_same(ask(server, path, body), stock_answers[index])


def test_client_that_leaves_does_not_disturb_the_server(server, client):
    body = {
        "model": "m",
        "messages": QUESTION,
        "max_tokens": 400,
        "ignore_eos": True,
        "stream": True,
        "flashtrace": {"hops": 3},
    }
    with httpx.stream(
        "POST", f"{server.url}/v1/chat/completions", json=body, timeout=300
    ) as stream:
        next(stream.iter_lines())
    check_completed(chat(client).choices[0].flashtrace)


def test_metrics_and_health_stay_up(server):
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert "vllm:" in httpx.get(f"{server.url}/metrics").text
