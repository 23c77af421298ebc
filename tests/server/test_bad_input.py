"""Every bad request is an HTTP 400 that names the field, and nothing is generated for it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time

import pytest
from vllm.exceptions import VLLMValidationError

from vllm_flashtrace.base.logs import CLIENT_CODES
from vllm_flashtrace.server import attributions

pytestmark = pytest.mark.asyncio(loop_scope="module")

BAD_FIELDS = [
    ("unknown key", {"target_": "output"}),
    ("not an object", "yes"),
    ("number", 1),
    ("list", []),
    ("hops wrong type", {"hops": "two"}),
    ("hops boolean", {"hops": True}),
    ("hops fractional", {"hops": 1.5}),
    ("hops negative", {"hops": -1}),
    ("hops above the limit", {"hops": 1000}),
    ("target wrong type", {"target": 7}),
    ("target unknown name", {"target": "input"}),
    ("target unknown key", {"target": {"txt": "a"}}),
    ("target two forms", {"target": {"text": "a", "regex": "b"}}),
    ("empty text", {"target": {"text": ""}}),
    ("no spans", {"target": {"tokens": []}}),
    ("empty span", {"target": {"tokens": [[3, 3]]}}),
    ("reversed span", {"target": {"tokens": [[5, 2]]}}),
    ("negative span", {"target": {"tokens": [[-2, 2]]}}),
    ("span beyond the text", {"target": {"tokens": [[0, 100000]]}}),
    ("no weights", {"target": {"weights": {}}}),
    ("negative weight", {"target": {"weights": {"0": -1.0}}}),
    ("all-zero weights", {"target": {"weights": {"0": 0.0, "1": 0.0}}}),
    ("weight beyond the text", {"target": {"weights": {"100000": 1.0}}}),
    ("weight index not a number", {"target": {"weights": {"a": 1.0}}}),
    ("bad regex", {"target": {"regex": "("}}),
    ("unknown recurse_over", {"recurse_over": "everything"}),
    ("unknown reasoning", {"reasoning": "some"}),
    ("reversed reasoning span", {"reasoning": {"tokens": [[4, 1]]}}),
    ("top_k zero", {"top_k": 0}),
    ("top_k negative", {"top_k": -3}),
    ("unknown include", {"include": ["everything"]}),
    ("unknown mode", {"mode": "later"}),
    ("unknown skip_tokens", {"skip_tokens": "vowels"}),
]


def check_refused(app, response, *names):
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["code"] == 400
    assert any(name in error["param"] for name in names), error
    assert not app.engine.calls


@pytest.mark.parametrize("value", [v for _, v in BAD_FIELDS], ids=[n for n, _ in BAD_FIELDS])
async def test_bad_field_is_refused(app, value):
    response = await app.chat(flashtrace=value, max_tokens=64)
    check_refused(app, response, "flashtrace")
    error = response.json()["error"]
    for key in value if isinstance(value, dict) else ():
        assert key in error["param"] or key in error["message"]


@pytest.mark.parametrize("weight", ["NaN", "Infinity", "-Infinity", "1e999"])
async def test_weights_that_are_not_finite_are_refused(app, weight):
    body = json.dumps({"model": "m", "prompt": "Hi", "flashtrace": {"target": {"weights": {}}}})
    body = body.replace('"weights": {}', f'"weights": {{"0": {weight}}}')
    response = await app.client.post(
        "/v1/completions", content=body, headers={"Content-Type": "application/json"}
    )
    check_refused(app, response, "flashtrace")


@pytest.mark.parametrize("stream", [False, True])
async def test_span_beyond_max_tokens_is_refused_before_a_stream_starts(app, stream):
    response = await app.complete(
        flashtrace={"target": {"tokens": [[0, 9]]}}, max_tokens=8, stream=stream
    )
    check_refused(app, response, "flashtrace.target")
    assert "9" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ({"target": {"\ud800": 0}}, "flashtrace.target.\\ud800"),
        ({"skip_tokens": ["\ud800"]}, "flashtrace.skip_tokens[0]"),
        ({"target": {"tool_call": 0, "argument": "\ud800"}}, "flashtrace.target.argument"),
    ],
)
async def test_lone_surrogates_are_refused_by_name(app, field, name):
    body = json.dumps({"model": "m", "prompt": "Hi", "flashtrace": field})
    response = await app.client.post(
        "/v1/completions", content=body, headers={"Content-Type": "application/json"}
    )
    check_refused(app, response, name)


DEEP = {"role": "user", "content": "Hi", "extra": json.loads("[" * 900 + "]" * 900)}


@pytest.mark.skipif("COVERAGE_RUN" in os.environ, reason="its tracer takes of the same depth")
@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("/v1/chat/completions", {"messages": [DEEP]}, "messages"),
        ("/v1/responses", {"input": [DEEP]}, "input"),
        (
            "/v1/attributions",
            {"messages": [DEEP, {"role": "assistant", "content": "a"}]},
            "messages",
        ),
    ],
)
async def test_messages_too_deep_to_be_copied_are_refused(app, path, body, name):
    check_refused(app, await app.post(path, **body, flashtrace=True), name)


@pytest.mark.parametrize("regex", ["(a|aa)+$", "((a)|a)+$", "(a{1,30}){1,30}$"])
async def test_regex_of_exponential_time_fails_alone_and_in_time(app, regex):
    text = "a" * 60 + "!"
    app.engine.answers = [text]
    begun = time.process_time()
    field = {"target": {"regex": regex}}
    answers = await asyncio.gather(
        app.complete(flashtrace=field, max_tokens=200, prompt="Hi"),
        app.complete(flashtrace=True, max_tokens=200, prompt="Hi"),
    )
    slow, quick = (answer.json()["choices"][0] for answer in answers)
    assert slow["text"] == quick["text"] == text
    assert slow["flashtrace"]["status"] == "failed"
    assert slow["flashtrace"]["error"]["code"] == "regex_timeout"
    assert quick["flashtrace"]["status"] == "completed"
    # Where the text is the client's own, it is the client's mistake.
    response = await app.post("/v1/attributions", prompt="Hi", completion=text, flashtrace=field)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "flashtrace.target.regex"
    assert time.process_time() - begun < 3.0


@pytest.mark.parametrize("route", ["chat", "complete"])
async def test_beam_search_with_a_trace_is_refused(app, route):
    response = await getattr(app, route)(use_beam_search=True, n=2, flashtrace=True)
    check_refused(app, response, "use_beam_search")


@pytest.mark.parametrize("route", ["chat", "complete"])
async def test_a_prompt_that_another_engine_goes_on_with_is_not_traced(app, route):
    """A proxy may send the same field to both; a malformed one is refused by either."""
    params = {"do_remote_decode": True, "do_remote_prefill": False}
    ask = getattr(app, route)
    response = await ask(kv_transfer_params=params, flashtrace={"hops": -1})
    check_refused(app, response, "flashtrace.hops")
    response = await ask(kv_transfer_params=params, flashtrace=True)
    assert response.status_code == 200
    assert "flashtrace" not in response.json()["choices"][0]


@pytest.mark.parametrize("key", ["flashtrace", "flashtrace_trace"])
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("route", ["chat", "complete"])
async def test_forged_spec_in_vllm_xargs_is_refused(app, key, traced, route):
    extra = {"flashtrace": True} if traced else {}
    response = await getattr(app, route)(vllm_xargs={key: "AAAA"}, **extra)
    check_refused(app, response, f"vllm_xargs.{key}")
    assert "reserved" in response.json()["error"]["message"]


async def test_other_xargs_pass(app):
    response = await app.chat(vllm_xargs={"mine": "x"}, flashtrace=True)
    assert response.status_code == 200
    assert app.engine.generations[0].params.extra_args == {"mine": "x"}


async def test_routes_that_cannot_trace_say_so(app):
    for route, body in {
        "/v1/chat/completions/batch": {"messages": [[{"role": "user", "content": "Hi"}]]},
        "/generative_scoring": {"query": "a", "items": ["b"], "label_token_ids": [1]},
    }.items():
        response = await app.post(route, **body, flashtrace=True)
        check_refused(app, response, "flashtrace")
        assert route in response.json()["error"]["message"]


async def test_unknown_model_is_vllms_404(app):
    body = {"model": "other", "prompt": "Hi", "flashtrace": True}
    response = await app.client.post("/v1/completions", json=body)
    assert response.status_code == 404


LONG = "word " * 3000
CHAT = [{"role": "user", "content": "Hi"}]
MISTAKES = [
    ("/v1/attributions", {"prompt": "Hi", "completion": ""}, 400),
    ("/v1/attributions", {"model": "other", "prompt": "Hi", "completion": "x"}, 404),
    ("/v1/chat/completions", {"model": "other", "messages": CHAT}, 404),
    ("/v1/chat/completions", {"messages": []}, 400),
    ("/v1/completions", {"prompt": LONG}, 400),
    ("/v1/responses", {"model": "other", "input": "Hi"}, 404),
    ("/v1/messages", {"messages": [{"role": "user", "content": LONG}], "max_tokens": 9}, 400),
    ("/v1/messages", {"messages": CHAT, "max_tokens": 9, "temperature": -5}, 400),
    *(
        (route, {**body, "flashtrace": {"target": {"text": "xylophone"}}}, code)
        for route, body, code in (
            ("/v1/attributions", {"prompt": "Hi", "completion": "x"}, 400),
            ("/v1/chat/completions", {"messages": CHAT}, 200),
            ("/v1/responses", {"input": "Hi"}, 200),
        )
    ),
]


@pytest.fixture
def warnings_logged():
    """What the server logs at WARNING or above; vLLM's logger does not propagate."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    loggers = [logging.getLogger(name) for name in (None, "vllm")]
    for logger in loggers:
        logger.addHandler(handler)
    yield records
    for logger in loggers:
        logger.removeHandler(handler)


@pytest.mark.parametrize(("path", "body", "code"), MISTAKES)
async def test_a_clients_mistake_is_no_warning_of_the_server(
    app, warnings_logged, path, body, code
):
    response = await app.post(path, **{"flashtrace": True, **body})
    assert response.status_code == code
    assert [record.getMessage() for record in warnings_logged] == []


async def test_an_error_of_the_server_stays_one_in_the_log(plugins, warnings_logged):
    logger = logging.getLogger("vllm.entrypoints.anthropic.api_router")
    for error in (TypeError("a bug"), VLLMValidationError("a mistake")):
        try:
            raise error
        except Exception:
            logger.exception("Error in create_messages")
    [record] = warnings_logged
    assert record.levelno == logging.ERROR
    assert record.exc_info[0] is TypeError


async def test_what_existing_text_is_refused_for_is_the_clients_mistake_everywhere():
    assert set(attributions._FIELD_AT_FAULT) <= CLIENT_CODES
