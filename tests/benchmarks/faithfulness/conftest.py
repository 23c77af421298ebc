"""Shared by the tests of the benchmark: a tiny model and what it is to explain."""

from __future__ import annotations

import os
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.faithfulness.example import Example, Prepared, prepare
from benchmarks.faithfulness.hf import HFModel
from tests.oracle import as_float64
from tests.tiny_models import make_tiny_model

PROMPT = "The harbour master wrote 4821. She counted 12 apples and 7 pears. Which number is it?"
REASONING = "The master wrote a number. It was on the slate, so that is the key."


@pytest.fixture(scope="session")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HFModel]:
    """A tiny random Llama in transformers."""
    model = HFModel(make_tiny_model("llama", tmp_path_factory.mktemp("faithfulness-llama")))
    yield model
    model.close()


@pytest.fixture(scope="session")
def double_model(hf: HFModel) -> Any:
    return as_float64(hf.model)


@pytest.fixture(scope="session")
def resources(hf: HFModel) -> Any:
    return types.SimpleNamespace(hf=hf, seed=0)


@pytest.fixture(scope="session")
def prepared(hf: HFModel) -> Prepared:
    return prepare(
        Example("one", "test", 0, PROMPT, REASONING, " The answer is 4821."), hf.tokenizer
    )


@pytest.fixture(scope="session")
def without_reasoning(hf: HFModel) -> Prepared:
    return prepare(Example("two", "test", 0, PROMPT, "", " The answer is 4821."), hf.tokenizer)


@pytest.fixture
def one_core(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiny models are faster on one core than on several that are busy."""
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
