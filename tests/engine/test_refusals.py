"""Models that cannot be traced exactly are served as ever, and say by name why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.harness import Engine, TraceJob
from tests.tiny_models import make_tiny_model
from vllm_flashtrace import FlashTrace
from vllm_flashtrace.base.errors import TraceError, UnsupportedModelError
from vllm_flashtrace.core.weights import TargetWeights


def test_an_engine_that_is_refused(tiny_folder: Path) -> None:
    engine = Engine(
        tiny_folder,
        "an engine that is refused",
        in_process=True,
        max_model_len=1024,
        enable_prompt_embeds=True,
    )
    try:
        assert "prompt embeddings" in engine.status()["refusal"]
        token_ids = list(range(10, 210))
        assert len(engine.generate(token_ids, 4)) == 4
        with pytest.raises(TraceError, match="prompt embeddings") as caught:
            engine.trace(TraceJob(token_ids, TargetWeights.from_spans([(150, 200)])))
        assert caught.value.code == "unsupported_model"
        with pytest.raises(UnsupportedModelError, match="prompt embeddings"):
            FlashTrace(llm=engine.llm)
        assert len(engine.generate(token_ids, 4)) == 4
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("family", "engine_args", "reason"),
    [("llama", {"runner": "pooling"}, "pooling")],
)
def test_engine_configurations(tmp_path: Path, family: str, engine_args: dict, reason: str) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_flashtrace.worker.config_checks import check_config

    folder = make_tiny_model(family, tmp_path / "model")
    args = EngineArgs(model=str(folder), **{"max_model_len": 512, **engine_args})
    with pytest.raises(UnsupportedModelError, match=reason):
        check_config(args.create_engine_config())


@pytest.mark.parametrize(
    ("family", "engine_args"),
    [
        ("llama", {}),
        ("llama", {"data_parallel_size": 2}),
        ("llama", {"pipeline_parallel_size": 2}),
        ("qwen3_moe", {"data_parallel_size": 2, "enable_expert_parallel": True}),
        ("qwen3_moe", {"data_parallel_size": 2, "data_parallel_rank": 1}),
    ],
)
def test_plain_configuration_passes(tmp_path: Path, family: Any, engine_args: dict) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_flashtrace.worker.config_checks import check_config

    folder = make_tiny_model(family, tmp_path / "model")
    args = EngineArgs(model=str(folder), max_model_len=512, **engine_args)
    check_config(args.create_engine_config())
