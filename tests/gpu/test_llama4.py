"""Chunked local attention, in all layers but the last, on the GPU path."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.engine.harness import relative_l1
from tests.gpu.standin import BACKENDS
from tests.gpu.test_start_proof import proof
from tests.gpu.v2_engine import V2Engine, apply_patches, assert_exact, traced, v2_engine
from tests.measured import Measured
from tests.oracle import as_float64
from tests.tiny_models import FAMILY_NAMES, LLAMA4_ENGINE, make_tiny_model
from vllm_flashtrace.worker import gpu_model


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_traces(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    """Two traces in steps of several chunks; without chunks there would be others."""
    from transformers import AutoModelForCausalLM

    folder = make_tiny_model("llama4", tmp_path)
    reference = as_float64(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    first, second = traced(150, (90, 150)), traced(70, (20, 24), (60, 70), seed=3)
    third = traced(150, (90, 150), seed=4)
    stock = gpu_model.gpu_attention_form
    options = {**LLAMA4_ENGINE, "disable_hybrid_kv_cache_manager": True}
    with v2_engine(folder, monkeypatch, backend, **options) as loaded:
        apply_patches(monkeypatch)
        engine = V2Engine(loaded.model, loaded.config, loaded.layout)
        assert proof(engine)["refusal"] is None
        engine.step({"first": 100, "second": 40}, new={"first": first.new, "second": second.new})
        engine.step({"first": 50, "second": 30})
        reports = [(assert_exact(engine, trace, reference), trace) for trace in (first, second)]
        errors = [relative_l1(report.scores, t.oracle(reference)) for report, t in reports]
        measured("gpu_backends", backend, llama4=max(errors))
        measured("families", FAMILY_NAMES["llama4"], gpu="adapter")
        monkeypatch.setattr(
            gpu_model, "gpu_attention_form", lambda *args: replace(stock(*args), chunk_size=None)
        )
        engine.step({"third": 150}, new={"third": third.new}, finished=("first", "second"))
        assert relative_l1(engine.report(third).scores, third.oracle(reference)) > 1e-2
        assert "failed in layer 0" in proof(engine)["refusal"]
