"""Captured activations of one tiny model per family, shared by the tests of the maths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.core.single_layer import layer_scores, weighted_column_sums
from tests.oracle import LayerActivations, activation_scores, as_float64, capture_hf, dense_weights
from tests.tiny_models import FAMILIES, make_tiny_model
from vllm_flashtrace.core import AttentionForm, LayerSums, TargetWeights

LENGTH = 160
PROMPT = 100


@dataclass
class Captured:
    """A float64 tiny model, a random trace and the activations of every layer on it."""

    model: object
    input_ids: Tensor
    layers: list[LayerActivations]

    def oracle(self, target: TargetWeights) -> Tensor:
        """Scores of every layer ``[L, N]`` by the oracle."""
        return activation_scores(
            self.layers, dense_weights(LENGTH, target.positions, target.weights)
        )

    def core(self, target: TargetWeights, exact_fraction: float) -> Tensor:
        """Scores of every layer ``[L, N]`` by the package, in float32 from queries and keys."""
        return torch.stack(
            [
                layer_scores(
                    layer_sums(layer, target),
                    layer.value.float(),
                    head_projections(layer),
                    exact_fraction=exact_fraction,
                )
                for layer in self.layers
            ]
        )


def layer_sums(layer: LayerActivations, target: TargetWeights) -> LayerSums:
    rows, weights = target.positions, target.weights
    return LayerSums(
        column_sums=weighted_column_sums(
            layer.query[rows].float(), layer.key.float(), weights, rows, AttentionForm(layer.scale)
        ),
        residual=weights @ layer.x_prev[rows].float(),
        stream=weights @ layer.x_mid[rows].float(),
    )


def head_projections(layer: LayerActivations) -> Tensor:
    """The output projection as float32 ``[H, d, D]``."""
    heads, dim = layer.query.shape[1:]
    return layer.o_proj.T.reshape(heads, dim, -1).float()


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors here are tiny; more threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def smollm2_activations(smollm2_folder: Path) -> list[LayerActivations]:
    """Activations of real weights on 300 tokens of English."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = as_float64(AutoModelForCausalLM.from_pretrained(smollm2_folder))
    text = " ".join(
        f"In {1200 + 7 * i} the town number {i} had {13 * i % 97} bridges over the river."
        for i in range(40)
    )
    return capture_hf(model, AutoTokenizer.from_pretrained(smollm2_folder).encode(text)[:300])


@pytest.fixture(scope="package", params=FAMILIES)
def captured(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, one_thread: None
) -> Captured:
    from transformers import AutoModelForCausalLM

    folder = make_tiny_model(request.param, tmp_path_factory.mktemp(request.param))
    model = as_float64(AutoModelForCausalLM.from_pretrained(folder))
    input_ids = torch.randint(3, 510, (LENGTH,), generator=torch.Generator().manual_seed(1))
    return Captured(model, input_ids, capture_hf(model, input_ids))
