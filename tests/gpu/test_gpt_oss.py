"""Attention sinks, and windows in every other layer, on the GPU path."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.engine.harness import relative_l1
from tests.gpu.v2_engine import V2Engine, apply_patches, exact_error, traced, v2_engine
from tests.measured import Measured
from tests.oracle import as_float64
from tests.tiny_models import FAMILY_NAMES, make_tiny_model
from vllm_flashtrace.worker import gpu_model, runner


@pytest.mark.parametrize("backend", ["FLASH_ATTN", "TRITON_ATTN", "FLASHINFER"])
def test_traces(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    """Two traces in chunks; without sinks there would be others."""
    from transformers import AutoModelForCausalLM

    folder = make_tiny_model("gpt_oss", tmp_path)
    reference = as_float64(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    monkeypatch.setattr(runner, "check_architecture", lambda _: None)  # Nothing was proven.
    support = "vllm.v1.attention.backends.flash_attn.flash_attn_supports_sinks"
    monkeypatch.setattr(support, lambda: True, raising=False)  # It asks the device.
    first, second = traced(150, (90, 150)), traced(70, (20, 24), (60, 70), seed=3)
    third = traced(150, (90, 150), seed=4)
    stock = gpu_model.gpu_attention_form
    one_group = {"disable_hybrid_kv_cache_manager": True}
    with v2_engine(folder, monkeypatch, backend, **one_group) as loaded:
        apply_patches(monkeypatch)
        engine = V2Engine(loaded.model, loaded.config, loaded.layout)
        engine.step({"first": 100, "second": 40}, new={"first": first.new, "second": second.new})
        engine.step({"first": 50, "second": 30})
        errors = [exact_error(engine, trace, reference) for trace in (first, second)]
        measured("gpu_backends", backend, gpt_oss=max(errors))
        measured("families", FAMILY_NAMES["gpt_oss"], gpu="adapter")
        monkeypatch.setattr(
            gpu_model, "gpu_attention_form", lambda *args: replace(stock(*args), sinks=None)
        )
        engine.step({"third": 150}, new={"third": third.new}, finished=("first", "second"))
        assert relative_l1(engine.report(third).scores, third.oracle(reference)) > 1e-2
