"""Traces stay with their completions' engines: on a scripted engine client with two engines."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tests.server.scripted_app import App, build
from vllm_flashtrace.base.errors import TraceError, UnsupportedModelError
from vllm_flashtrace.trace import metrics as cache_use
from vllm_flashtrace.trace.engines import (
    Engines,
    check_data_parallel,
    note_rank,
    noting_ranks,
)
from vllm_flashtrace.trace.metrics import CacheUse, cache_lookup
from vllm_flashtrace.trace.wire import WireReport

pytestmark = pytest.mark.asyncio(loop_scope="module")

HOPS = {"target": {"tokens": [[3, 5]]}, "hops": 2}


class TwoEngines:
    """What ``AsyncLLM.engine_core`` is with data parallelism, on a scripted engine.

    Requests go to the engines in turn unless they are pinned, one per choice; each engine has the
    results of its own traces only.
    """

    core_engines = (b"\x00\x00", b"\x01\x00")

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._generate = engine.generate
        self._turn = 0
        self.ran: dict[str, int] = {}
        self.served: dict[str, list[int]] = {}
        self.asked: list[tuple[str, int]] = []

    async def generate(
        self, prompt: Any, params: Any, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        await asyncio.sleep(0)
        for _ in range(params.n):
            rank = kwargs["data_parallel_rank"]
            if rank is None:
                rank, self._turn = self._turn % 2, self._turn + 1
            note_rank(rank)
            self.served.setdefault(request_id, []).append(rank)
        before = set(self._engine._reports)
        async for output in self._generate(prompt, params, request_id, **kwargs):
            self.ran.update({nonce: rank for nonce in self._engine._reports.keys() - before})
            yield output

    async def _call_utility_async(
        self, utility: str, method: str, timeout: Any, args: Any, kwargs: Any, *, engine: bytes
    ) -> list[bytes]:
        assert (utility, timeout, kwargs) == ("collective_rpc", None, None)
        rank = self.core_engines.index(engine)
        self.asked.append((method, rank))
        if method == "flashtrace_status":
            refusal = "engine 1 cannot" if rank == 1 and self._engine.refusal else None
            status = {"refusal": refusal, "worker": {"data_parallel_rank": rank}}
            return [msgspec.msgpack.encode(status)]
        if self.ran.get(args[0]) != rank:
            return [WireReport(status="missing").encode()]
        return await self._engine.collective_rpc(method, args=args)


async def two_engine_app(model_path: str, monkeypatch: pytest.MonkeyPatch, **worker: Any) -> App:
    from tests.server.fake_engine import FakeEngine

    made = FakeEngine.__post_init__

    def with_two(self: Any) -> None:
        made(self)
        self.engine_core = TwoEngines(self)
        self.generate = self.engine_core.generate

    monkeypatch.setattr(FakeEngine, "__post_init__", with_two)
    return await build(model_path, "--data-parallel-size", "2", **worker)


@pytest.fixture
async def two(plugins: None, model_path: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    app = await two_engine_app(model_path, monkeypatch)
    yield app
    await app.client.aclose()


def ranks_of_traces(app: App) -> list[list[int]]:
    """The engines of each attribution's hops, in the order in which the traces began."""
    by_trace: dict[str, list[int]] = {}
    for request_id, [*ranks] in app.engine.engine_core.served.items():
        if "-hop" in request_id:
            by_trace.setdefault(request_id.split("-hop")[0], []).extend(ranks)
    return list(by_trace.values())


@pytest.mark.parametrize("stream", [False, True])
async def test_every_choice_is_traced_where_it_was_generated(two, stream):
    response = await two.complete(n=3, stream=stream, flashtrace=HOPS)
    assert response.text.count('"status":"completed"') == 3, response.text
    [served] = [v for k, v in two.engine.engine_core.served.items() if "-hop" not in k]
    assert served == [0, 1, 0]
    traces = ranks_of_traces(two)
    assert sorted(traces) == [[0] * 3, [0] * 3, [1] * 3]


async def test_several_prompts_are_traced_where_they_were_generated(two):
    response = await two.complete(prompt=["one", "two", "three", "four"], n=2, flashtrace=HOPS)
    choices = response.json()["choices"]
    assert [c["flashtrace"]["status"] for c in choices] == ["completed"] * 8
    assert sorted(ranks_of_traces(two)) == [[0] * 3] * 4 + [[1] * 3] * 4


async def test_a_rank_that_the_client_chose_stands(two):
    body = {"model": "m", "prompt": "Hi", "n": 2, "flashtrace": HOPS}
    headers = {"X-data-parallel-rank": "1"}
    await two.client.post("/v1/completions", json=body, headers=headers)
    assert ranks_of_traces(two) == [[1] * 3, [1] * 3]


async def test_existing_text_keeps_the_engine_of_its_first_hop(two):
    for expected in (0, 1, 0):
        two.engine.engine_core.served.clear()
        body = {"prompt": "The code is", "completion": " 4 8 2 1 and so on", "flashtrace": HOPS}
        answer = (await two.post("/v1/attributions", **body)).json()
        assert answer["status"] == "completed"
        assert ranks_of_traces(two) == [[expected] * 3]


async def test_support_and_status_ask_every_engine(two):
    got = (await two.client.get("/v1/attributions/status")).json()
    assert got["status"] == "ready"
    assert [w["data_parallel_rank"] for w in got["engine"]["workers"]] == [0, 1]
    assert got["prefix_cache"].keys() == {"queries", "hits", "misses"}


async def test_one_engine_that_cannot_is_enough_to_refuse(plugins, model_path, monkeypatch):
    app = await two_engine_app(model_path, monkeypatch, refusal="yes")
    response = await app.complete(flashtrace=True)
    assert response.status_code == 400 and "engine 1 cannot" in response.text
    assert (await app.complete()).status_code == 200
    await app.client.aclose()


async def test_an_engine_client_that_hides_its_engines_is_refused(plugins, model_path):
    app = await build(model_path, "--data-parallel-size", "2")
    response = await app.complete(flashtrace=True)
    assert response.status_code == 400
    assert "data parallelism through this engine client" in response.text
    assert (await app.complete()).status_code == 200
    await app.client.aclose()


@pytest.mark.parametrize(
    ("change", "layout"),
    [
        ({"enable_elastic_ep": True}, "elastic expert parallelism"),
        ({"data_parallel_backend": "ray"}, "through Ray"),
        ({"data_parallel_size_local": 1}, "over several machines"),
    ],
)
async def test_layouts_that_are_refused_by_name(change: dict[str, Any], layout: str) -> None:
    plain = {
        "data_parallel_size": 2,
        "data_parallel_size_local": 2,
        "data_parallel_backend": "mp",
        "local_engines_only": False,
        "enable_elastic_ep": False,
    }
    check_data_parallel(SimpleNamespace(**plain))
    of_one_server = {"local_engines_only": True, "data_parallel_size_local": 1}
    check_data_parallel(SimpleNamespace(**plain | of_one_server))
    with pytest.raises(UnsupportedModelError, match=layout):
        check_data_parallel(SimpleNamespace(**{**plain, **change}))


async def test_no_engine_is_guessed() -> None:
    core = SimpleNamespace(core_engines=[b"0", b"1"])
    with pytest.raises(TraceError, match="which engine") as caught:
        await Engines(SimpleNamespace(engine_core=core)).call(None, "flashtrace_collect", ("n",))
    assert caught.value.code == "result_missing"


async def test_notes_reach_only_the_block_around_their_own_task() -> None:
    async def one(rank: int) -> list[int]:
        ranks: list[int] = []
        with noting_ranks(ranks):
            await asyncio.sleep(0.001 * rank)
            note_rank(rank)
        note_rank(99)
        return ranks

    assert await asyncio.gather(*(one(rank) for rank in range(5))) == [[r] for r in range(5)]


CACHE = SimpleNamespace(enable_prefix_caching=True, block_size=16)
OFF = SimpleNamespace(enable_prefix_caching=False, block_size=16)


async def test_what_must_have_been_left_is_whole_blocks() -> None:
    assert cache_lookup(47, 32, CACHE, True) == cache_use.CacheLookup(47, 32, 32)
    assert not cache_lookup(47, 32, CACHE, True).missed
    assert cache_lookup(48, 32, CACHE, True).missed
    assert cache_lookup(15, None, CACHE, True) == cache_use.CacheLookup(15, 0, 0)
    assert not cache_lookup(480, 0, CACHE, False).missed, "nothing was computed before"
    assert cache_lookup(480, 0, OFF, True) == cache_use.CacheLookup(0, 0, 0)


async def test_misses_are_logged_once_in_a_while(monkeypatch, caplog) -> None:
    now = 1000.0
    monkeypatch.setattr(cache_use.time, "monotonic", lambda: now)
    monkeypatch.setattr(cache_use.logger, "propagate", True)
    use = CacheUse()
    with caplog.at_level(logging.WARNING, cache_use.logger.name):
        use.add(cache_lookup(64, 64, CACHE, True))
        assert not _ours(caplog)
        for _ in range(5):
            use.add(cache_lookup(64, 16, CACHE, True))
        [record] = _ours(caplog)
        assert "found 16 of 64 tokens" in record.getMessage()
        now += cache_use.WARN_SECONDS
        use.add(cache_lookup(64, 16, CACHE, True))
        assert len(_ours(caplog)) == 2
        assert "6 such traces" in _ours(caplog)[1].getMessage()
    assert use.to_status() == {"queries": 7 * 64, "hits": 64 + 6 * 16, "misses": 6}


def _ours(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Each record of our logger once, whatever else the process logs or hands on twice."""
    return list(dict.fromkeys(r for r in caplog.records if r.name == cache_use.logger.name))
