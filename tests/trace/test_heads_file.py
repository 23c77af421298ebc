"""The file of weights of heads, and every way in which one is refused."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_flashtrace.base import __version__
from vllm_flashtrace.trace.heads_file import FORMAT, HeadsFile, HeadsFileError, ModelFacts

FACTS = ModelFacts("LlamaForCausalLM", 3, 4, 64)
FILE = HeadsFile(torch.rand(3, 4) + 0.1, FACTS, examples=20, ablations=160, held_out=0.4321)
METADATA = {
    "format": FORMAT,
    "architecture": "LlamaForCausalLM",
    "layers": "3",
    "heads": "4",
    "hidden_size": "64",
    "version": __version__,
    "examples": "20",
    "ablations": "160",
    "held_out_rank_correlation": "0.4321",
}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    for held_out in (0.4321, None):
        file = dataclasses.replace(FILE, held_out=held_out)
        file.write(tmp_path / "heads")
        read = HeadsFile.read(tmp_path / "heads")
        assert torch.equal(read.weights, FILE.weights)
        assert dataclasses.replace(read, weights=file.weights) == file
        assert set(load_file(tmp_path / "heads")) == {"weights"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"weights": torch.rand(3, 5)}, r"shape \(3, 5\) for 3 layers of 4 heads"),
        ({"weights": torch.rand(12)}, r"shape \(12,\)"),
        ({"weights": torch.rand(3, 4).double()}, "float64, not float32"),
        ({"weights": torch.full((3, 4), float("nan"))}, "not finite"),
        ({"weights": torch.full((3, 4), float("inf"))}, "not finite"),
        ({"weights": torch.rand(3, 4) - 0.999}, "below 0"),
        ({"weights": torch.zeros(3, 4)}, "all 0"),
        ({"tensors": ("heads",)}, r"the tensors \['heads'\]"),
        ({"tensors": ("weights", "more")}, r"the tensors \['more', 'weights'\]"),
        ({"format": None}, "has no format"),
        ({"format": "vllm-flashtrace.heads.9"}, "is of format 'vllm-flashtrace.heads.9'"),
        ({"layers": None}, "malformed metadata"),
        ({"heads": "four"}, "malformed metadata"),
        ({"hidden_size": ""}, "malformed metadata"),
        ({"held_out_rank_correlation": "good"}, "malformed metadata"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    path = tmp_path / "heads.safetensors"
    weights = change.pop("weights", FILE.weights)
    tensors = {name: weights.clone() for name in change.pop("tensors", ("weights",))}
    metadata = {key: value for key, value in {**METADATA, **change}.items() if value is not None}
    save_file(tensors, path, metadata)
    with pytest.raises(HeadsFileError, match=reason) as error:
        HeadsFile.read(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [None, b"", b"no safetensors file", b"\xff" * 100])
def test_what_is_no_such_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "heads.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(HeadsFileError, match="cannot be read"):
        HeadsFile.read(path)
    with pytest.raises(HeadsFileError, match="cannot be read"):
        HeadsFile.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"architecture": "Qwen3ForCausalLM"}, "architecture LlamaForCausalLM, not Qwen3"),
        ({"layers": 4}, "layers 3, not 4"),
        ({"heads": 8}, "heads 4, not 8"),
        ({"hidden_size": 32, "heads": 2}, "heads 4, not 2; hidden_size 64, not 32"),
    ],
)
def test_another_model_is_refused(change: dict[str, Any], reason: str) -> None:
    FILE.check_model(FACTS, Path("heads"))
    with pytest.raises(HeadsFileError, match=reason):
        FILE.check_model(dataclasses.replace(FACTS, **change), Path("heads"))


def test_facts_are_of_the_whole_model() -> None:
    model = types.SimpleNamespace(
        architecture="LlamaForCausalLM",
        get_total_num_hidden_layers=lambda: 3,
        get_num_attention_heads=lambda parallel: 4 // parallel.tensor_parallel_size,
        get_hidden_size=lambda: 64,
    )
    parallel = types.SimpleNamespace(tensor_parallel_size=2)
    config = types.SimpleNamespace(model_config=model, parallel_config=parallel)
    assert ModelFacts.of(config) == FACTS
