"""The store of deferred attributions, used as several API servers use it."""

from __future__ import annotations

import json
import multiprocessing
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.server import sqlite_store as store_folder
from vllm_flashtrace.server.deferred import StoreLimits
from vllm_flashtrace.server.session import new_trace_id
from vllm_flashtrace.server.sqlite_store import (
    STORE_ENV,
    SqliteStore,
    ensure_store_folder,
    open_store_folder,
)

LEASE = StoreLimits(1, 1, 1).lease_seconds


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


def make(folder: Path, clock: Clock, owner: str = "one", **limits: Any) -> SqliteStore:
    bounds = {"entries": 3, "nbytes": 10_000, "ttl_seconds": 60.0, **limits}
    return SqliteStore(folder, owner, StoreLimits(**bounds), clock)


@pytest.fixture
def store(folder: Path, clock: Clock) -> SqliteStore:
    return make(folder, clock)


def completed(attribution_id: str, text: str = "") -> dict[str, Any]:
    return {"id": attribution_id, "status": "completed", "text": text}


def body(attribution_id: str, text: str = "") -> str:
    return json.dumps(completed(attribution_id, text))


def finished(store: SqliteStore, text: str = "") -> str:
    attribution_id = new_trace_id()
    store.reserve(attribution_id)
    assert store.start(attribution_id)
    assert store.finish(attribution_id, "completed", body(attribution_id, text))
    return attribution_id


def test_an_entry_goes_through_its_states(store):
    attribution_id = new_trace_id()
    assert store.get(attribution_id) is None
    expected = {"id": attribution_id, "object": "flashtrace.attribution", "status": "queued"}
    assert json.loads(store.reserve(attribution_id)) == expected
    assert json.loads(store.get(attribution_id)) == expected
    assert store.start(attribution_id)
    assert json.loads(store.get(attribution_id)) == {**expected, "status": "running"}
    assert store.finish(attribution_id, "completed", body(attribution_id))
    assert json.loads(store.get(attribution_id)) == completed(attribution_id)
    assert store.delete(attribution_id)
    assert store.get(attribution_id) is None
    assert not store.delete(attribution_id)


def test_half_of_a_surrogate_pair_survives(store):
    attribution_id = finished(store, "\ud83d")
    assert json.loads(store.get(attribution_id))["text"] == "\ud83d"


def test_another_server_sees_and_deletes_it(folder, clock, store):
    other = make(folder, clock, "two")
    done, pending = finished(store), new_trace_id()
    store.reserve(pending)
    assert json.loads(other.get(done))["status"] == "completed"
    assert other.delete(pending)
    assert store.renew() == {done}
    assert not store.start(pending)
    assert not store.finish(pending, "completed", body(pending))
    assert other.get(pending) is None


def test_the_oldest_finished_ones_make_room(store, clock):
    ids = []
    for _ in range(3):
        ids.append(finished(store))
        clock.now += 1
    newest = new_trace_id()
    store.reserve(newest)
    assert store.get(ids[0]) is None
    assert all(store.get(attribution_id) for attribution_id in [*ids[1:], newest])


def test_unfinished_ones_are_never_dropped_for_a_new_one(store):
    ids = [new_trace_id() for _ in range(3)]
    for attribution_id in ids:
        store.reserve(attribution_id)
    with pytest.raises(TraceError) as error:
        store.reserve(new_trace_id())
    assert error.value.code == "overloaded"
    assert all(store.get(attribution_id) for attribution_id in ids)
    assert store.counts() == {"queued": 3}


def test_a_refused_entry_costs_no_finished_one(store):
    kept = finished(store)
    store.reserve(new_trace_id())
    store.reserve(new_trace_id())
    store.reserve(new_trace_id())  # takes the place of the finished one
    assert store.get(kept) is None
    with pytest.raises(TraceError):
        store.reserve(new_trace_id())
    assert store.counts() == {"queued": 3}


def test_bytes_are_bounded(folder, clock):
    store = make(folder, clock, entries=100, nbytes=1000)
    ids = []
    for _ in range(4):
        ids.append(finished(store, "x" * 300))
        clock.now += 1
    present = [attribution_id for attribution_id in ids if store.get(attribution_id)]
    assert present == ids[2:]


def test_one_that_is_larger_than_the_store_says_so(folder, clock):
    store = make(folder, clock, nbytes=1000)
    kept = finished(store)
    attribution_id = new_trace_id()
    store.reserve(attribution_id)
    store.finish(attribution_id, "completed", body(attribution_id, "x" * 2000))
    failure = json.loads(store.get(attribution_id))
    assert failure["status"] == "failed"
    assert failure["error"]["code"] == "result_too_large"
    assert store.get(kept)


def test_a_finished_one_lives_for_its_time(store, clock):
    attribution_id = finished(store)
    clock.now += 59
    assert store.get(attribution_id)
    clock.now += 2
    assert store.get(attribution_id) is None
    assert not store.delete(attribution_id)
    assert store.counts() == {}


def test_an_unfinished_one_lives_while_its_server_does(folder, store, clock):
    attribution_id = new_trace_id()
    store.reserve(attribution_id)
    for _ in range(5):
        clock.now += LEASE - 1
        assert store.renew() == {attribution_id}
    clock.now += LEASE + 1
    make(folder, clock, "two").renew()  # another server's beat does not keep it
    failure = json.loads(store.get(attribution_id))
    assert (failure["status"], failure["error"]["code"]) == ("failed", "server_lost")
    assert failure["id"] == attribution_id
    clock.now += 61
    assert store.get(attribution_id) is None


def test_a_server_that_stops_lets_its_own_fail(folder, store, clock):
    other = make(folder, clock, "two")
    ids = [new_trace_id(), new_trace_id()]
    store.reserve(ids[0])
    other.reserve(ids[1])
    done = finished(store)
    store.abandon()
    statuses = [json.loads(other.get(one))["status"] for one in (*ids, done)]
    assert statuses == ["failed", "queued", "completed"]


def test_a_result_that_comes_late_after_all_is_kept(store, clock):
    attribution_id = new_trace_id()
    store.reserve(attribution_id)
    clock.now += LEASE + 1
    assert json.loads(store.get(attribution_id))["status"] == "failed"
    assert store.finish(attribution_id, "completed", body(attribution_id))
    assert json.loads(store.get(attribution_id))["status"] == "completed"


def test_reserving_twice_is_one_entry(store):
    attribution_id = new_trace_id()
    assert store.reserve(attribution_id) == store.reserve(attribution_id)
    assert store.counts() == {"queued": 1}


@pytest.mark.parametrize(
    "bad",
    ["", "ft-", "ft-1", "status", "../x", "' OR 1=1 --", f"ft-{'A' * 32}", f"ft-{'0' * 32}\n"],
)
def test_only_ids_of_our_form_are_looked_up(store, bad):
    finished(store)
    assert store.get(bad) is None
    assert not store.delete(bad)
    assert sum(store.counts().values()) == 1


def _reserve_many(folder: Path, owner: str) -> None:
    limits = StoreLimits(entries=10_000, nbytes=1 << 20, ttl_seconds=60.0)
    store = SqliteStore(folder, owner, limits)
    for _ in range(50):
        finished(store)


def test_several_processes_write_at_once(folder):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_reserve_many, args=(folder, str(i))) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    store = SqliteStore(folder, "reader", StoreLimits(10_000, 1 << 20, 60.0))
    assert store.counts() == {"completed": 150}


def test_the_folder_is_private_and_made_on_first_use(folder, store):
    assert not folder.exists()
    store.reserve(new_trace_id())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_folder_that_others_may_enter_is_refused(tmp_path, clock):
    open_folder = tmp_path / "open"
    open_folder.mkdir(mode=0o755)
    with pytest.raises(PermissionError, match="private"):
        make(open_folder, clock).reserve(new_trace_id())
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    with pytest.raises(PermissionError, match="not a folder"):
        open_store_folder(link)


def test_its_name_is_handed_down_and_cannot_be_guessed(monkeypatch, tmp_path):
    registered: list[Any] = []
    monkeypatch.setattr(store_folder.atexit, "register", lambda *call: registered.append(call))
    monkeypatch.delenv(STORE_ENV, raising=False)
    first = ensure_store_folder()
    assert os.environ[STORE_ENV] == str(first)
    assert ensure_store_folder() == first
    assert not first.exists()
    monkeypatch.setenv(STORE_ENV, "")
    assert ensure_store_folder() != first
    assert len(registered) == 2


def test_only_the_process_that_chose_it_removes_it(tmp_path):
    folder = tmp_path / "store"
    folder.mkdir()
    store_folder._remove(folder, os.getpid() + 1)
    assert folder.exists()
    store_folder._remove(folder, os.getpid())
    assert not folder.exists()
