"""A model that vLLM runs in Transformers' code: compiled, and by two workers of either kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.harness import TOKENS, WAYS, Engine, TraceJob, relative_l1
from tests.engine.test_pipeline_parallel import make_buffers
from tests.engine.test_start_proof import start_reports
from tests.engine.worker_faults import core_each
from tests.measured import Measured
from tests.oracle import oracle_scores
from tests.tiny_models import FAMILY_NAMES, make_tiny_model
from vllm_flashtrace.core.weights import TargetWeights

TARGET = TargetWeights.from_mapping({i: 1.0 + i % 3 for i in range(300, 400)})
STAGES: dict[str, Any] = {"pipeline_parallel_size": 2, "max_model_len": 1024}


# What no other test proves of them is the taps in compiled code, and norms that ranks gather for.
@pytest.mark.long
@pytest.mark.timeout(480)
@pytest.mark.parametrize("way", [*WAYS, "stages"])
def test_scores(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_tiny_model("olmo2", tmp_path / "olmo2")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = oracle_scores(model, TOKENS, TARGET.positions, TARGET.weights)
    if way != "compiled":
        core_each(monkeypatch, 2)
    engine = Engine(folder, f"Transformers' code, {way}", **WAYS.get(way, STAGES))
    try:
        engine.llm.collective_rpc(make_buffers)
        for report in start_reports(engine):
            assert report["refusal"] is None and report["largest_error"] < 1e-5, report
        trace = engine.trace(TraceJob(TOKENS, TARGET))
    finally:
        engine.close()
    error = relative_l1(trace.scores, expected)
    if way in WAYS:
        measured("families", FAMILY_NAMES["olmo2"], **{way: error})
    else:
        row = "two pipeline stages, OLMo 2 in Transformers' code"
        measured("ways", row, against="oracle", scores=error)
    assert error <= 1e-5
