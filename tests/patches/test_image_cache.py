"""Traces pass the engine's caches of images by, and are rendered as vLLM renders."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.multimodal.cache.shm import ShmObjectStoreReceiverCache
from vllm.v1.engine.core import EngineCore

from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.patches import image_cache
from vllm_flashtrace.trace.multimodal import KNOWN_ITEMS
from vllm_flashtrace.trace.wire import EXTRA_ARGS_KEY, TraceSpec, seal

SPEC = TraceSpec.create(TargetWeights.from_spans([(40, 60)]), 60, exact_fraction=1.0)


@pytest.mark.parametrize(
    ("sealed", "seen"),
    [(None, True), (bytes(100), True), (seal(SPEC), False)],
    ids=["none", "not ours", "ours"],
)
def test_who_sees_the_engines_cache(
    sealed: bytes | None, seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stock(core: Any, request: Any) -> Any:
        return core.mm_receiver_cache, core.block_size, request

    monkeypatch.setattr(EngineCore, "preprocess_add_request", stock)
    image_cache.apply()
    extra = None if sealed is None else {EXTRA_ARGS_KEY: sealed}
    request = SimpleNamespace(
        mm_features=["image"], sampling_params=SimpleNamespace(extra_args=extra)
    )
    core = object.__new__(EngineCore)
    core.mm_receiver_cache, core.block_size = "cache", 16
    cache, block_size, given = EngineCore.preprocess_add_request(core, request)
    assert (cache, block_size, given) == ("cache" if seen else None, 16, request)
    assert core.mm_receiver_cache == "cache"


def test_shared_memory_is_not_asked_for_pixels_that_are_there() -> None:
    cache = object.__new__(ShmObjectStoreReceiverCache)  # Without shared memory.
    feature: Any = SimpleNamespace(data={"pixel_values": 1}, mm_hash="h", identifier="h")
    assert cache.get_and_update_features([feature]) == [feature]
    assert feature.data == {"pixel_values": 1}


@pytest.mark.parametrize("sent", [None, {"address": 1}, {"pixel_values": 2}])
def test_pixels_beside_what_is_sent(sent: Any) -> None:
    calls = []

    def process(prompt: str, *, skip_mm_cache: bool = False) -> dict[str, Any]:
        calls.append(skip_mm_cache)
        return {"prompt": prompt, "mm_kwargs": {"image": ["pixels" if skip_mm_cache else sent]}}

    with ThreadPoolExecutor(1) as executor:
        stock: Any = SimpleNamespace(_process_multimodal=process, _mm_executor=executor)
        rendered = image_cache.with_pixels(stock)._process_multimodal("text")
    whole = sent is not None and "pixel_values" in sent
    # First what the list takes in; what it has been asked of already is not asked again.
    assert calls == ([False] if whole else [False, True])
    assert rendered == {
        "prompt": "text",
        "mm_kwargs": {"image": [sent]},
        KNOWN_ITEMS: {"image": [sent if whole else "pixels"]},
    }
    assert stock._process_multimodal is process
