"""Scores through the engine against the authors' package on real weights."""

from __future__ import annotations

import pytest
import torch

from tests.engine.conftest import text_tokens
from tests.engine.harness import Engine, TraceJob, relative_l1, run_hops
from tests.reference import reference_scores
from vllm_flashtrace.core.weights import TargetWeights

LIMIT = 1e-3
PROMPT, LENGTH = 420, 600
REASONING, OUTPUT = (420, 560), (560, 600)


@pytest.fixture(scope="module")
def one_hop(hf_smollm2: torch.nn.Module, trace_tokens: list[int]) -> torch.Tensor:
    return reference_scores(hf_smollm2, trace_tokens, OUTPUT).hops[0]


@pytest.mark.parametrize("exact_fraction", [1.0, 0.9])
def test_one_hop(
    smollm2: Engine, one_hop: torch.Tensor, trace_tokens: list[int], exact_fraction: float
) -> None:
    reference = one_hop
    job = TraceJob(trace_tokens, TargetWeights.from_spans([OUTPUT]), exact_fraction)
    ours = smollm2.trace(job).scores
    error = relative_l1(ours, reference)
    print(f"relative L1, {LENGTH} tokens, exact fraction {exact_fraction}: {error:.2e}")
    assert error <= LIMIT
    assert set(ours.topk(10).indices.tolist()) == set(reference.topk(10).indices.tolist())


@pytest.mark.parametrize("hops", [pytest.param(1, marks=pytest.mark.long), 2])
def test_paper_hops(
    smollm2: Engine, hf_smollm2: torch.nn.Module, trace_tokens: list[int], hops: int
) -> None:
    reference = reference_scores(hf_smollm2, trace_tokens, OUTPUT, REASONING, hops)
    result = run_hops(smollm2, trace_tokens, PROMPT, OUTPUT, REASONING, hops)
    # The package scales by hop 0's total, ours by one; the distribution is the same.
    error = relative_l1(result.scores[:PROMPT], _paper_formula(reference.hops))
    print(f"relative L1, K = {hops}: {error:.2e}")
    assert error <= LIMIT
    running, ratios = 1.0, []
    for mass in result.hops:
        running *= mass.reasoning_mass
        ratios.append(running)
    assert ratios == pytest.approx(reference.thinking_ratios, abs=1e-3)


@pytest.mark.long
def test_twelve_hundred_tokens(smollm2: Engine, hf_smollm2: torch.nn.Module) -> None:
    token_ids = text_tokens(smollm2, 1200)
    reference = reference_scores(hf_smollm2, token_ids, (1160, 1200)).hops[0]
    job = TraceJob(token_ids, TargetWeights.from_spans([(1160, 1200)]))
    error = relative_l1(smollm2.trace(job).scores, reference)
    print(f"relative L1, 1200 tokens: {error:.2e}")
    assert error <= LIMIT


def _paper_formula(hops: list[torch.Tensor]) -> torch.Tensor:
    """w_I^(0) + sum_k (prod_{j<k} rho_j) w_I^(k), from the package's raw scores of each hop."""
    total = torch.zeros(PROMPT, dtype=torch.float64)
    weight = 1.0
    for scores in hops:
        normalised = scores.double() / scores.double().sum()
        total += weight * normalised[:PROMPT]
        weight *= float(normalised[slice(*REASONING)].sum())
    return total
