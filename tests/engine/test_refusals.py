"""Models that cannot be traced exactly are served as ever, and say by name why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.engine.harness import Engine, TraceJob
from tests.tiny_models import make_tiny_model
from vllm_flashtrace import FlashTrace
from vllm_flashtrace.base.errors import TraceError, UnsupportedModelError
from vllm_flashtrace.core.weights import TargetWeights


def test_a_cache_that_forgets_tokens(tmp_path: Path) -> None:
    """With nothing but sliding windows vLLM frees blocks that a trace's values are in."""
    folder = make_tiny_model("qwen3", tmp_path / "windowed")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "use_sliding_window": True,
        "sliding_window": 64,
        "max_window_layers": 4,
        "layer_types": ["sliding_attention"] * 4,
    }
    (folder / "config.json").write_text(json.dumps(config))
    engine = Engine(folder, "a model that is refused", in_process=True, max_model_len=1024)
    try:
        assert "SlidingWindowSpec" in engine.status()["refusal"]
        token_ids = list(range(10, 210))
        assert len(engine.generate(token_ids, 4)) == 4
        with pytest.raises(TraceError, match="SlidingWindowSpec") as caught:
            engine.trace(TraceJob(token_ids, TargetWeights.from_spans([(150, 200)])))
        assert caught.value.code == "unsupported_model"
        with pytest.raises(UnsupportedModelError, match="SlidingWindowSpec"):
            FlashTrace(llm=engine.llm)
        assert len(engine.generate(token_ids, 4)) == 4
    finally:
        engine.close()


def test_full_and_windowed_layers_in_two_caches(tmp_path: Path) -> None:
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        SlidingWindowSpec,
    )

    from vllm_flashtrace.worker.layers import check_cache

    sizes = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
    full = KVCacheGroupSpec(["layers.0"], FullAttentionSpec(**sizes))
    windowed = KVCacheGroupSpec(["layers.1"], SlidingWindowSpec(**sizes, sliding_window=64))
    with pytest.raises(UnsupportedModelError, match="--disable-hybrid-kv-cache-manager"):
        check_cache(KVCacheConfig(4, [], [full, windowed]))
    with pytest.raises(UnsupportedModelError, match="SlidingWindowSpec"):
        check_cache(KVCacheConfig(4, [], [windowed]))
    check_cache(KVCacheConfig(4, [], [full]))


@pytest.mark.parametrize(
    ("family", "engine_args", "reason"),
    [
        ("qwen3_moe", {"data_parallel_size": 2}, "mixture-of-experts"),
        ("llama", {"runner": "pooling"}, "pooling"),
    ],
)
def test_engine_configurations(tmp_path: Path, family: str, engine_args: dict, reason: str) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_flashtrace.worker.layers import check_config

    folder = make_tiny_model(family, tmp_path / "model")
    args = EngineArgs(model=str(folder), **{"max_model_len": 512, **engine_args})
    with pytest.raises(UnsupportedModelError, match=reason):
        check_config(args.create_engine_config())


@pytest.mark.parametrize(
    "engine_args", [{}, {"data_parallel_size": 2}, {"pipeline_parallel_size": 2}]
)
def test_plain_configuration_passes(tmp_path: Path, engine_args: dict) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_flashtrace.worker.layers import check_config

    folder = make_tiny_model("llama", tmp_path / "model")
    args = EngineArgs(model=str(folder), max_model_len=512, **engine_args)
    check_config(args.create_engine_config())
