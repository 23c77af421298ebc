"""How far a trace request may use the prefix cache, and what that costs while it waits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.kv_cache_manager import KVCacheManager

from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.patches import prefix_cache
from vllm_flashtrace.trace import wire
from vllm_flashtrace.trace.wire import EXTRA_ARGS_KEY, ScoreSpec, TraceSpec, seal

SPEC = TraceSpec.create(TargetWeights.from_spans([(40, 60)]), 60, exact_fraction=1.0)


def request(sealed: bytes | None) -> Any:
    extra = None if sealed is None else {EXTRA_ARGS_KEY: sealed}
    return SimpleNamespace(num_tokens=60, sampling_params=SimpleNamespace(extra_args=extra))


@pytest.fixture
def looked_up(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Tokens that stock code is told a request has."""
    monkeypatch.setattr(
        KVCacheManager, "get_computed_blocks", lambda _, request: request.num_tokens
    )
    prefix_cache.apply()
    manager = object.__new__(KVCacheManager)
    return lambda request: KVCacheManager.get_computed_blocks(manager, request)


def test_cap(looked_up: Any) -> None:
    assert looked_up(request(seal(ScoreSpec.create([20, 40], 60)))) == 20
    assert looked_up(request(seal(SPEC))) == 41
    assert looked_up(request(None)) == 60
    assert looked_up(request(bytes(100))) == 60


@pytest.mark.parametrize("sealed", [seal(SPEC), bytes(100)])
def test_a_spec_is_verified_once(
    looked_up: Any, sealed: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified = []

    def counted(spec: bytes) -> TraceSpec:
        verified.append(spec)
        return stock(spec)

    stock = wire.unseal
    monkeypatch.setattr(wire, "unseal", counted)
    waiting = request(sealed)
    assert len({looked_up(waiting) for _ in range(50)}) == 1
    assert len(verified) == 1
