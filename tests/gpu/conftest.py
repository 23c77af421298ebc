"""Process groups and model folders for tests of what runs on CUDA only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.standin import single_rank
from tests.gpu.v2_engine import V2Engine, apply_patches, v2_engine
from tests.oracle import as_float64
from tests.tiny_models import make_tiny_model


@pytest.fixture(scope="package", autouse=True)
def _rank() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # The models are too small for more.
    try:
        with single_rank():
            yield
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="package")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 4 layers, 4 query and 2 key/value heads of size 32."""
    return make_tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="package")
def float64_llama(tiny_llama: Path) -> Any:
    """The same model in transformers, in float64, for the oracle."""
    from transformers import AutoModelForCausalLM

    return as_float64(AutoModelForCausalLM.from_pretrained(tiny_llama))


@pytest.fixture
def engine(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[V2Engine]:
    """A patched V2 runner on FlashAttention."""
    with v2_engine(tiny_llama, monkeypatch) as engine:
        apply_patches(monkeypatch)
        yield engine
