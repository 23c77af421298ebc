"""What is measured of a layer at the start is 0 for what it should be, and shows what it is not."""

from __future__ import annotations

import math

import pytest
import torch

from vllm_flashtrace.core.identity import attention_error, contribution, identity_error

R, H, G, D, HIDDEN, N = 3, 4, 2, 8, 24, 20


@pytest.fixture
def layer() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    weights, values = torch.randn(R, H, N).softmax(-1), torch.randn(N, G, D)
    heads = values.double().repeat_interleave(H // G, 1)
    output = torch.einsum("ihj,jhd->ihd", weights.double(), heads)
    projection = torch.randn(HIDDEN, H * D)
    added = output.flatten(1) @ projection.double().T
    return {
        "weights": weights,
        "values": values,
        "output": output,
        "projection": projection,
        "added": added,
    }


def test_a_layer_that_is_what_it_should_be(
    layer: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert attention_error(layer["weights"], layer["values"], layer["output"]) < 1e-14
    for numbers in (1 << 22, 5 * H * D):  # In one piece, and in five.
        monkeypatch.setattr("vllm_flashtrace.core.identity._CHUNK_NUMBERS", numbers)
        contributed = contribution(layer["weights"], layer["values"], layer["projection"])
        assert identity_error(contributed, layer["added"]) < 1e-14


def test_errors_are_relative_to_the_worst_row_and_head(layer: dict[str, torch.Tensor]) -> None:
    output = layer["output"].clone()
    output[1, 2] = 0
    values = layer["values"].abs().double()[:, 1]
    size = (layer["weights"][1, 2].double() @ values).norm()
    expected = float(layer["output"][1, 2].norm() / size)
    assert attention_error(layer["weights"], layer["values"], output) == pytest.approx(expected)
    contributed, added = layer["added"].clone(), layer["added"]
    contributed[2] *= 1.25
    assert identity_error(contributed, added) == pytest.approx(0.25)
    # Where it is the difference of two rounded streams, rounding counts by their size.
    stream = added * 100
    assert identity_error(contributed, added, stream) == pytest.approx(0.0025)


def test_numbers_that_are_none_and_blocks_that_add_nothing(
    layer: dict[str, torch.Tensor],
) -> None:
    nothing = torch.zeros(R, HIDDEN)
    assert identity_error(nothing.double(), nothing) == 0
    assert identity_error(layer["added"], nothing) > 1e3
    assert identity_error(layer["added"] * math.nan, layer["added"]) == math.inf
    layer["output"][0, 0, 0] = math.inf
    assert attention_error(layer["weights"], layer["values"], layer["output"]) == math.inf
