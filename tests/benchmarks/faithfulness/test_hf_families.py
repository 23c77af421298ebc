"""What all Hugging Face families share, the authors' package, and CLP."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.faithfulness.example import Prepared
from benchmarks.faithfulness.hf import HFModel
from benchmarks.faithfulness.hf_clp import clp_divergences
from benchmarks.faithfulness.hf_flow import proximity_scores, recursion
from benchmarks.faithfulness.package import PackageFamily, run_package
from benchmarks.faithfulness.registry import FAMILIES, load

pytestmark = pytest.mark.usefixtures("one_core")

HF_FAMILIES = [entry for entry in FAMILIES if entry.needs == {"hf"}]


@pytest.mark.parametrize("entry", HF_FAMILIES, ids=lambda entry: entry.target.split(":")[1])
@pytest.mark.parametrize("case", ["prepared", "without_reasoning"])
def test_scores_of_every_method(
    entry: Any, case: str, resources: Any, request: pytest.FixtureRequest
) -> None:
    prepared: Prepared = request.getfixturevalue(case)
    family = load(entry, resources)
    assert set(family.labels) == set(entry.names)
    results = family.attribute(prepared, entry.names)
    assert set(results) == set(entry.names)
    for scores in results.values():
        assert scores.values.dtype == np.float64
        assert scores.values.shape == (prepared.num_user_tokens,)
        assert np.isfinite(scores.values).all() and np.abs(scores.values).sum() > 0
        assert scores.seconds > 0
    assert family.attribute(prepared, []) == {}
    family.close()


def test_the_package_gives_our_hops(hf: HFModel, prepared: Prepared) -> None:
    recorded = hf.recorded(prepared)
    ours = recursion(prepared, 1, lambda weights: proximity_scores(recorded, weights))
    theirs = run_package(hf, prepared, hops=1)
    formula = theirs.by_formula(prepared.prompt_length, prepared.reasoning)
    difference = (ours.scores - formula).abs().sum() / formula.sum()
    assert float(difference) < 1e-4
    assert theirs.ratios == pytest.approx(
        [ours.hops[0].reasoning_mass, ours.remaining_mass], rel=1e-3
    )


def test_the_package_without_reasoning_is_hop_0(
    hf: HFModel, resources: Any, without_reasoning: Prepared
) -> None:
    recorded = hf.recorded(without_reasoning)
    ours = recursion(without_reasoning, 0, lambda weights: proximity_scores(recorded, weights))
    wanted = ours.scores[slice(*without_reasoning.user)].numpy()
    family = PackageFamily(resources)
    found = family.attribute(without_reasoning, family.labels)["flashtrace-package"].values
    np.testing.assert_allclose(found / found.sum(), wanted / wanted.sum(), rtol=1e-3, atol=1e-6)


@torch.no_grad()
def test_clp_is_the_divergence_of_each_sentence(hf: HFModel, prepared: Prepared) -> None:
    def distributions(token_ids: list[int]) -> torch.Tensor:
        logits = hf.model(torch.tensor([token_ids])).logits[0].double()
        return logits[prepared.target[0] - 1 : prepared.target[1] - 1].log_softmax(-1)

    whole = distributions(list(prepared.token_ids))
    wanted = []
    for first, end in prepared.sentences:
        changed = list(prepared.token_ids)
        changed[first:end] = [hf.pad_token_id] * (end - first)
        other = distributions(changed)
        wanted.append(torch.nn.functional.kl_div(other, whole, reduction="sum", log_target=True))
    found = clp_divergences(hf, prepared)
    assert len(found) == 3
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-3, atol=1e-4)
