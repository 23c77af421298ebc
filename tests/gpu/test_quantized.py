"""Layers with quantised output projections between others, on the GPU path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.v2_engine import V2Engine, apply_patches, assert_exact, traced, v2_engine
from tests.oracle import as_float64
from tests.quantized_models import SCHEMES, make_quantized_model
from vllm_flashtrace.worker import gpu_model, runner


def test_mixed_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two traces that end in one step: one call for what lies in memory, and one for each other."""
    scheme = SCHEMES["compressed-tensors int8 W8A8 in some layers, static activations"]
    folder, model = make_quantized_model(scheme, tmp_path, torch.float32)
    calls: list[list[tuple[int, int]]] = []
    stock = gpu_model.replace_by_proximities

    def counted(layers: Any, traces: Any) -> None:
        calls.append([(layer.index, layer.weight.data_ptr()) for layer in layers])
        stock(layers, traces)

    monkeypatch.setattr(gpu_model, "replace_by_proximities", counted)
    monkeypatch.setattr(runner, "check_architecture", lambda _: None)  # Nothing was proven.
    first, second = traced(60, (40, 60)), traced(70, (20, 24), (60, 70), seed=3)
    with v2_engine(folder, monkeypatch) as loaded:
        apply_patches(monkeypatch)
        engine = V2Engine(loaded.model, loaded.config, loaded.layout)
        engine.step({"first": 30, "second": 40}, new={"first": first.new, "second": second.new})
        engine.step({"first": 30, "second": 30})
        reference = as_float64(model)
        for trace in (first, second):
            assert_exact(engine, trace, reference)
    assert [[layer for layer, _ in call] for call in calls] == [[1, 2], [0], [3]]
    assert calls[1][0][1] == calls[2][0][1]  # The same memory.
