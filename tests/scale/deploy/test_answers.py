"""Answers for requests whose replica is gone, as clients of each interface read them; metrics."""

from __future__ import annotations

import json

import pytest

from vllm_flashtrace.scale.deploy.exchange import end_of_stream, is_event_stream, whole_answer
from vllm_flashtrace.scale.deploy.gateway import merge


def events(text: bytes) -> list[tuple[str | None, str]]:
    """Names and data of server-sent events."""
    found = []
    for block in text.decode().strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines())
        found.append((fields.get("event"), fields["data"]))
    return found


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_a_whole_answer_is_openais_error(path):
    start, body = whole_answer(path, "replica_lost", "gone")
    headers = dict(start["headers"])
    assert start["status"] == 503
    assert headers[b"retry-after"] == b"1"
    assert int(headers[b"content-length"]) == len(body["body"])
    assert not body["more_body"]
    assert json.loads(body["body"]) == {
        "error": {
            "message": "gone",
            "type": "service_unavailable",
            "param": None,
            "code": "replica_lost",
        }
    }


def test_a_whole_answer_of_messages_is_anthropics_error():
    _, body = whole_answer("/v1/messages", "replica_lost", "gone")
    answer = json.loads(body["body"])
    assert answer["type"] == "error"
    assert answer["error"]["message"] == "gone"


def test_answers_of_coheres_chat_are_coheres_errors():
    _, body = whole_answer("/cohere/v2/chat", "replica_lost", "gone")
    assert json.loads(body["body"]) == {"message": "gone"}
    [(_, end), done] = events(end_of_stream("/cohere/v2/chat", "replica_lost", "gone")["body"])
    assert json.loads(end) == {
        "type": "message-end",
        "delta": {"error": "gone", "finish_reason": "ERROR"},
    }
    assert done == (None, "[DONE]")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_stream_ends_with_the_error_and_done(path):
    message = end_of_stream(path, "replica_lost", "gone")
    assert not message["more_body"]
    [(_, error), done] = events(message["body"])
    assert json.loads(error)["error"]["code"] == "replica_lost"
    assert done == (None, "[DONE]")


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_a_stream_of_events_ends_with_an_error_event(path):
    [(name, data)] = events(end_of_stream(path, "replica_lost", "gone")["body"])
    assert name == "error"
    assert json.loads(data)["type"] == "error"
    assert "replica_lost" in data


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(b"text/event-stream; charset=utf-8", True), (b"application/json", False), (None, False)],
)
def test_what_is_a_stream(kind, expected):
    headers = [] if kind is None else [(b"Content-Type", kind)]
    assert is_event_stream({"headers": headers}) is expected


def test_pages_become_one_with_every_sample_labelled():
    page = (
        "# HELP a Of a.\n# TYPE a counter\n"
        'a{x="{1}"} 1.0\na 2.0\n'
        "# TYPE b histogram\n"
        'b_bucket{le="+Inf"} 3.0\n'
    )
    other = "# HELP a Of a.\n# TYPE a counter\na 5.0\n# TYPE c gauge\nc 6.0\n# EOF\n"
    assert merge({"r1": page, "r2": other}).splitlines() == [
        "# HELP a Of a.",
        "# TYPE a counter",
        'a{replica="r1",x="{1}"} 1.0',
        'a{replica="r1"} 2.0',
        'a{replica="r2"} 5.0',
        "# TYPE b histogram",
        'b_bucket{replica="r1",le="+Inf"} 3.0',
        "# TYPE c gauge",
        'c{replica="r2"} 6.0',
    ]


def test_no_replica_is_an_empty_page():
    assert merge({}) == ""
