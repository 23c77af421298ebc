"""What the comparison with the authors' package reports, on hops computed from one forward pass."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.faithfulness.equal_package import Pair, relative_l1, row
from benchmarks.faithfulness.example import Prepared
from benchmarks.faithfulness.hf import HFModel
from benchmarks.faithfulness.hf_flow import proximity_scores, recursion
from benchmarks.faithfulness.method import Scores
from benchmarks.faithfulness.package import run_package

pytestmark = pytest.mark.usefixtures("one_core")


@pytest.fixture
def pair(hf: HFModel, prepared: Prepared) -> Pair:
    recorded = hf.recorded(prepared)
    ours = recursion(prepared, 1, lambda weights: proximity_scores(recorded, weights))
    values = ours.scores[slice(*prepared.user)].numpy()
    example = dataclasses.replace(prepared, gold=frozenset({2, 5, 8}))
    scores = Scores(values, 2.0, {"prefill_seconds": 1.5})
    return Pair(example, scores, run_package(hf, example, 1))


def test_equal_scores_are_reported_as_equal(pair: Pair) -> None:
    facts = pair.facts()
    assert facts["relative_l1"] < 1e-4
    assert facts["recovery"] == facts["formula_recovery"]
    line = row(300, [facts])
    assert line["same_recovery"] == line["examples"] == 1
    assert line["ratio"] == pytest.approx(pair.package.seconds / 2.0)


def test_other_scores_are_not(pair: Pair) -> None:
    reversed_scores = dataclasses.replace(pair.ours, values=pair.ours.values[::-1].copy())
    facts = dataclasses.replace(pair, ours=reversed_scores).facts()
    assert facts["relative_l1"] > 0.1
    wanted = pair.ours.values
    assert facts["relative_l1"] == pytest.approx(relative_l1(wanted[::-1], wanted), rel=1e-3)
