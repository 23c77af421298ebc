"""The store of a deployment, called as its actor is, without Ray."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_flashtrace.scale.deploy.store_actor import StoreHost, actor_name
from vllm_flashtrace.server.deferred import StoreLimits
from vllm_flashtrace.server.session import new_trace_id

LIMITS = StoreLimits(entries=2, nbytes=10_000, ttl_seconds=60.0)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / "store"


def status(host: StoreHost, owner: str, attribution_id: str) -> str | None:
    found = host.call(owner, LIMITS, "get", attribution_id)
    return None if found is None else str(json.loads(found)["status"])


def test_replicas_see_each_others_entries_and_lose_only_their_own():
    host = StoreHost("store")
    mine, theirs = new_trace_id(), new_trace_id()
    host.call("one", LIMITS, "reserve", mine)
    host.call("two", LIMITS, "reserve", theirs)
    assert status(host, "two", mine) == "queued"
    host.call("one", LIMITS, "abandon")
    assert status(host, "two", mine) == "failed"
    assert status(host, "one", theirs) == "queued"


def test_it_goes_on_after_its_process_was_replaced():
    one = new_trace_id()
    StoreHost("store").call("one", LIMITS, "reserve", one)
    again = StoreHost("store")
    assert again.call("one", LIMITS, "start", one)
    assert again.call("one", LIMITS, "finish", one, "completed", '{"status":"completed"}')
    assert status(StoreHost("store"), "two", one) == "completed"


def test_a_refusal_is_a_code_and_a_message():
    host = StoreHost("store")
    for _ in range(LIMITS.entries):
        host.call("one", LIMITS, "reserve", new_trace_id())
    code, message = host.call("two", LIMITS, "reserve", new_trace_id())
    assert code == "overloaded"
    assert "at most 2" in message


def test_a_store_that_cannot_be_used_says_why(folder: Path):
    folder.write_text("in the way")
    with pytest.raises(RuntimeError, match="Error: "):
        StoreHost("store").call("one", LIMITS, "counts")


def test_it_is_idle_when_nobody_called_for_long():
    host = StoreHost("store", idle_seconds=1000)
    assert not host.idle()
    host._called -= 1000
    assert host.idle()
    host.call("one", LIMITS, "counts")
    assert not host.idle()


def test_deployments_have_stores_of_their_own():
    assert actor_name("a") != actor_name("b")
