"""How many tokens a request may be given by a KV connector."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
    OffloadingConnectorScheduler,
)

from tests.patches.test_prefix_cache import SPEC, request
from vllm_flashtrace.patches import external_cache
from vllm_flashtrace.trace.wire import ScoreSpec, seal

TRACE, SCORE = seal(SPEC), seal(ScoreSpec.create([20, 40], 60))  # From 40 and 19 on.


def named(sealed: object) -> str | None:
    """Names of tests that are the same in all processes of the suite: each seals with its key."""
    names = {TRACE: "trace", SCORE: "score"}
    return names.get(sealed) if isinstance(sealed, bytes) else None


class Connector:
    def __init__(self, tokens: int | None, waits: bool) -> None:
        self.answer = tokens, waits

    def get_num_new_matched_tokens(self, _: Any, __: int) -> tuple[int | None, bool]:
        return self.answer


@pytest.mark.parametrize(
    ("sealed", "computed", "tokens", "waits", "expected"),
    [
        (TRACE, 16, 24, True, (24, True)),
        (TRACE, 16, 25, True, (0, False)),  # Local and external tokens together.
        (TRACE, 48, 8, True, (0, False)),
        (TRACE, 0, 16, False, (0, False)),  # It could fail when rows have been recorded.
        (TRACE, 0, None, False, (None, False)),  # To be asked again.
        (TRACE, 0, 0, False, (0, False)),
        (SCORE, 0, 19, True, (19, True)),
        (SCORE, 0, 20, True, (0, False)),
        (None, 16, 44, True, (44, True)),
        (None, 16, 40, False, (40, False)),
        (bytes(100), 16, 40, False, (40, False)),
    ],
    ids=named,
)
def test_offers(
    monkeypatch: pytest.MonkeyPatch,
    sealed: bytes | None,
    computed: int,
    tokens: int | None,
    waits: bool,
    expected: tuple[int | None, bool],
) -> None:
    monkeypatch.setattr(
        KVConnectorFactory, "create_connector", lambda *_, **__: Connector(tokens, waits)
    )
    for name in ("get_num_new_matched_tokens", "on_new_request"):
        monkeypatch.setattr(OffloadingConnectorScheduler, name, lambda *_, **__: None)
    external_cache.apply()
    create = KVConnectorFactory.create_connector
    of_scheduler = create(config=None, role=KVConnectorRole.SCHEDULER)
    assert of_scheduler.get_num_new_matched_tokens(request(sealed), computed) == expected
    of_worker = create(config=None, role=KVConnectorRole.WORKER)
    assert "get_num_new_matched_tokens" not in vars(of_worker)


@pytest.mark.parametrize(
    ("sealed", "computed", "most", "expected"),
    [
        (TRACE, 0, None, 32),
        (TRACE, 16, None, 16),
        (TRACE, 48, None, 0),
        (TRACE, 0, 16, 16),
        (SCORE, 0, None, 16),
        (None, 0, None, None),
        (None, 0, 48, 48),
    ],
    ids=named,
)
def test_where_offloading_ends(
    sealed: bytes | None, computed: int, most: int | None, expected: int | None
) -> None:
    told = external_cache.told_where_to_end(
        lambda _, __, ___, max_num_new_tokens: max_num_new_tokens
    )
    groups = [SimpleNamespace(tokens_per_chunk=size) for size in (16, 8)]
    scheduler = SimpleNamespace(config=SimpleNamespace(kv_group_configs=groups))
    assert told(scheduler, request(sealed), computed, most) == expected


@pytest.mark.parametrize(("sealed", "expected"), [(TRACE, 0), (SCORE, 0), (None, None)], ids=named)
def test_what_is_offloaded(sealed: bytes | None, expected: int | None) -> None:
    state = SimpleNamespace(max_offload_tokens=None)
    asked = request(sealed)
    asked.request_id = "one"
    external_cache.storing_nothing(lambda *_: None)(
        SimpleNamespace(_req_status={"one": state}), asked
    )
    assert state.max_offload_tokens == expected
