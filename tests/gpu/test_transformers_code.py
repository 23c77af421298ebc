"""Models that vLLM runs in Transformers' code, on the GPU path."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.engine.harness import leaves_transformers_classes_alone
from tests.gpu.v2_engine import V2Engine, apply_patches, exact_error, traced, v2_engine
from tests.measured import Measured
from tests.oracle import as_float64
from tests.tiny_models import FAMILY_NAMES, Family, make_tiny_model
from vllm_flashtrace.worker import runner


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_traces(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    """Two traces in chunks."""
    from transformers import AutoModelForCausalLM

    folder = make_tiny_model(family, tmp_path)
    reference = as_float64(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    monkeypatch.setattr(runner, "check_architecture", lambda _: None)  # Nothing was proven.
    leaves_transformers_classes_alone(monkeypatch)
    first, second = traced(150, (90, 150)), traced(70, (20, 24), (60, 70), seed=3)
    with v2_engine(folder, monkeypatch, model_impl="transformers") as loaded:
        apply_patches(monkeypatch)
        engine = V2Engine(loaded.model, loaded.config, loaded.layout)
        engine.step({"first": 100, "second": 40}, new={"first": first.new, "second": second.new})
        engine.step({"first": 50, "second": 30})
        errors = [exact_error(engine, trace, reference) for trace in (first, second)]
        measured("gpu_backends", "FLASH_ATTN, Transformers' code", **{family: max(errors)})
        measured("families", FAMILY_NAMES[family], gpu="adapter")
