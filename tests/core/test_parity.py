"""The package's float32 maths against the dense float64 oracle, on each family's activations."""

from __future__ import annotations

import pytest
import torch

from tests.core.conftest import LENGTH, PROMPT, Captured, head_projections, layer_sums
from tests.core.single_layer import layer_scores, proximity_bounds
from tests.oracle import LayerActivations, activation_scores, dense_weights, oracle_hops
from vllm_flashtrace.core import (
    DEFAULT_EXACT_FRACTION,
    HopRecursion,
    TargetWeights,
    token_proximity,
)

TARGETS = {
    "last token": TargetWeights.from_spans([(LENGTH - 1, LENGTH)]),
    "answer": TargetWeights.from_spans([(140, LENGTH)]),
    "two spans": TargetWeights.from_spans([(110, 118), (150, 155)]),
    "weights": TargetWeights(
        torch.arange(PROMPT, 150), torch.rand(50, generator=torch.Generator().manual_seed(3))
    ),
}


def relative_l1(ours: torch.Tensor, oracle: torch.Tensor) -> float:
    return float((ours.double() - oracle).abs().sum() / oracle.sum())


@pytest.mark.parametrize("name", TARGETS)
def test_exact_scores_agree_with_the_oracle_in_every_layer(captured: Captured, name: str) -> None:
    ours, oracle = captured.core(TARGETS[name], 1.0), captured.oracle(TARGETS[name])
    for layer in range(len(oracle)):
        assert relative_l1(ours[layer], oracle[layer]) <= 1e-5
    assert relative_l1(ours.sum(0), oracle.sum(0)) <= 1e-5


@pytest.mark.parametrize("name", TARGETS)
def test_default_agrees_with_the_oracle(captured: Captured, name: str) -> None:
    ours = captured.core(TARGETS[name], DEFAULT_EXACT_FRACTION)
    assert relative_l1(ours.sum(0), captured.oracle(TARGETS[name]).sum(0)) <= 1e-3


@pytest.mark.parametrize("name", TARGETS)
def test_pruning_on_random_weights(captured: Captured, name: str) -> None:
    # Random weights are the hard case: contributions are not aligned with the stream, so bounds
    # are loose.
    oracle = captured.oracle(TARGETS[name]).sum(0)
    assert relative_l1(captured.core(TARGETS[name], 0.9).sum(0), oracle) <= 2.5e-2
    assert relative_l1(captured.core(TARGETS[name], 0.99).sum(0), oracle) <= 5e-3


@pytest.mark.parametrize("rows", [range(260, 300), range(299, 300)], ids=["answer", "last token"])
def test_default_on_real_weights(smollm2_activations: list[LayerActivations], rows: range) -> None:
    target = TargetWeights.from_spans([(rows.start, rows.stop)])
    w = dense_weights(300, target.positions, target.weights)
    oracle = activation_scores(smollm2_activations, w).sum(0)
    for fraction, limit in ((DEFAULT_EXACT_FRACTION, 1e-5), (0.98, 1e-3)):
        ours = sum(
            layer_scores(
                layer_sums(layer, target),
                layer.value.float(),
                head_projections(layer),
                exact_fraction=fraction,
            )
            for layer in smollm2_activations
        )
        assert relative_l1(ours, oracle) <= limit


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.9, 0.99])
def test_the_shortcut_overestimates_by_no_more_than_the_tail(
    captured: Captured, fraction: float
) -> None:
    for layer in captured.layers:
        sums = layer_sums(layer, TARGETS["answer"])
        args = (sums.column_sums, layer.value.float(), head_projections(layer), sums.stream)
        excess = token_proximity(*args, exact_fraction=fraction) - token_proximity(
            *args, exact_fraction=1.0
        )
        bounds = proximity_bounds(*args).sum()
        assert float(excess.min()) >= -1e-5 * float(bounds)
        assert float(excess.sum()) <= (1 - fraction + 1e-5) * float(bounds)


@pytest.mark.parametrize("hops", [0, 1, 3])
def test_hops_agree_with_the_oracle(captured: Captured, hops: int) -> None:
    target, reasoning = TARGETS["answer"], slice(PROMPT, 140)
    followed = torch.zeros(LENGTH, dtype=torch.bool)
    followed[reasoning] = True
    is_input = torch.arange(LENGTH) < PROMPT

    recursion = HopRecursion(target, PROMPT, LENGTH, followed, hops=hops)
    while (weights := recursion.next_weights()) is not None:
        layers = captured.core(weights, 1.0)
        recursion.add(layers.sum(0), layers)
    result = recursion.result()

    start = torch.zeros(LENGTH, dtype=torch.float64)
    start[target.positions] = 1
    oracle, remaining = oracle_hops(
        lambda w: captured.oracle(TargetWeights(torch.arange(LENGTH), w)).sum(0),
        start,
        is_input,
        followed,
        hops,
    )
    assert relative_l1(result.scores, oracle) <= 1e-5
    assert result.remaining_mass == pytest.approx(remaining, rel=1e-5)
    assert len(result.hops) == hops + 1
    assert result.layer_scores is not None
    summed = result.layer_scores.sum(0, dtype=torch.float64)
    torch.testing.assert_close(summed, result.scores, rtol=1e-5, atol=1e-9)
