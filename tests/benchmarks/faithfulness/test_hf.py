"""Baselines on attention matrices against float64 evaluations written from their formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.faithfulness import baselines
from benchmarks.faithfulness.attention import (
    AttentionFamily,
    PackageFamily,
    alti_rollout,
    attention_mean,
    attention_rollout,
    cage,
    compose,
    ifr_per_token,
    proximity_scores,
    recursion,
    run_package,
    token_rollout,
    token_rows,
    value_norm,
)
from benchmarks.faithfulness.baselines import ClpFamily, ReagentFamily, clp_divergences, reagent
from benchmarks.faithfulness.example import Family, MethodFailed, Prepared
from benchmarks.faithfulness.gradients import GradientFamily
from benchmarks.faithfulness.hf import HFModel
from tests.oracle import LayerActivations, capture_hf, dense_weights, layer_oracle, oracle_hops

pytestmark = pytest.mark.usefixtures("one_core")


@pytest.fixture(scope="module")
def layers(double_model: Any, prepared: Prepared) -> list[LayerActivations]:
    return capture_hf(double_model, prepared.token_ids)


def ifr(layers: list[LayerActivations], w: Tensor) -> Tensor:
    scores = sum(
        layer_oracle(layer.alpha, layer.x_prev, layer.x_mid, layer.value, layer.o_proj, w)
        for layer in layers
    )
    return scores / scores.sum()


def span_weights(prepared: Prepared, span: tuple[int, int]) -> Tensor:
    positions = range(*span)
    return dense_weights(len(prepared.token_ids), list(positions), [1.0] * len(positions))


@pytest.fixture(scope="module")
def response_rows(layers: list[LayerActivations], prepared: Prepared) -> Tensor:
    positions = range(prepared.prompt_length, len(prepared.token_ids))
    return torch.stack([ifr(layers, span_weights(prepared, (p, p + 1))) for p in positions])


def relative_l1(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).abs().sum() / wanted.abs().sum())


def test_rows_of_tokens(hf: HFModel, prepared: Prepared, response_rows: Tensor) -> None:
    span = (prepared.prompt_length, len(prepared.token_ids))
    rows = token_rows(hf.recorded(prepared), span)
    assert relative_l1(rows, response_rows) < 1e-5
    assert (rows >= 0).all()
    torch.testing.assert_close(rows.sum(-1), torch.ones(len(rows), dtype=torch.float64))
    assert not rows.triu(span[0] + 1).any()


def test_ifr_per_token(hf: HFModel, prepared: Prepared, response_rows: Tensor) -> None:
    scores, facts = ifr_per_token(hf.recorded(prepared), prepared)
    wanted = response_rows[prepared.target[0] - prepared.prompt_length :].mean(0)
    assert relative_l1(scores, wanted) < 1e-5
    mass = float(wanted[slice(*prepared.reasoning)].sum())
    assert facts["reasoning_mass"] == pytest.approx(mass, rel=1e-4)


def test_token_rollout_solves_the_linear_system(
    hf: HFModel, prepared: Prepared, response_rows: Tensor
) -> None:
    scores, _ = token_rollout(hf.recorded(prepared), prepared)
    end = prepared.prompt_length
    reasoning = slice(*prepared.reasoning)
    start = response_rows[prepared.target[0] - end :].mean(0)
    rows = response_rows[: prepared.reasoning[1] - end]
    # m_r = s_r + m_r M_rr, with a token's mass on itself in M_rr; then m_r M_rp arrives.
    within = torch.eye(len(rows), dtype=torch.float64) - rows[:, reasoning]
    arrived = torch.linalg.solve(within.T, start[reasoning]) @ rows[:, :end]
    assert relative_l1(scores[:end], start[:end] + arrived) < 1e-5
    assert not scores[reasoning].any()
    assert float(scores.sum()) == pytest.approx(1)
    assert float(scores[:end].sum()) < 1


def test_token_rollout_without_reasoning_is_ifr(hf: HFModel, without_reasoning: Prepared) -> None:
    recorded = hf.recorded(without_reasoning)
    single, _ = ifr_per_token(recorded, without_reasoning)
    rolled, _ = token_rollout(recorded, without_reasoning)
    torch.testing.assert_close(rolled, single, rtol=0, atol=0)


def test_compose_sends_mass_to_what_comes_before() -> None:
    start = torch.tensor([0.2, 0.0, 0.4, 0.4]).double()
    rows = [
        torch.tensor([0.6, 0.2, 0.0, 0.0]).double(),
        torch.tensor([0.1, 0.0, 0.3, 0.6]).double(),
    ]
    # The last unit gives 0.4 as 1 to 3; the one before it all of its 0.7 in the same way, 3 to 1.
    rolled = compose(start, [(2, 3), (3, 4)], rows)
    torch.testing.assert_close(rolled, torch.tensor([0.825, 0.175, 0.0, 0.0]).double())


def test_compose_keeps_mass_that_can_go_nowhere() -> None:
    start = torch.tensor([0.5, 0.5]).double()
    rolled = compose(start, [(1, 2)], [torch.tensor([0.0, 1.0]).double()])
    assert rolled.tolist() == [0.5, 0.5]


def test_cage(hf: HFModel, prepared: Prepared, layers: list[LayerActivations]) -> None:
    assert len(prepared.reasoning_sentences) == 2
    mass = ifr(layers, span_weights(prepared, prepared.target))
    for first, end in reversed(prepared.reasoning_sentences):
        row = ifr(layers, span_weights(prepared, (first, end)))[:first]
        mass[:first] += float(mass[first:end].sum()) * row / row.sum()
    scores, _ = cage(hf.recorded(prepared), prepared)
    user = slice(*prepared.user)
    assert relative_l1(scores[user], mass[user]) < 1e-5


def test_attention_mean(hf: HFModel, prepared: Prepared, layers: list[LayerActivations]) -> None:
    rows = slice(*prepared.target)
    wanted = torch.stack([layer.alpha[:, rows].mean((0, 1)) for layer in layers]).mean(0)
    assert relative_l1(attention_mean(hf.recorded(prepared), prepared)[0], wanted) < 1e-5


def test_attention_rollout(hf: HFModel, prepared: Prepared, layers: list[LayerActivations]) -> None:
    matrix = torch.eye(len(prepared.token_ids), dtype=torch.float64)
    for layer in layers:
        matrix = (0.5 * layer.alpha.mean(0) + 0.5 * torch.eye(len(matrix))) @ matrix
    wanted = matrix[slice(*prepared.target)].mean(0)
    scores, _ = attention_rollout(hf.recorded(prepared), prepared)
    assert relative_l1(scores, wanted) < 1e-5


def test_alti_rollout(hf: HFModel, prepared: Prepared, layers: list[LayerActivations]) -> None:
    """Against the paper's formula, pair by pair, and the product of whole matrices."""
    length = len(prepared.token_ids)
    rollout = torch.eye(length, dtype=torch.float64)
    for layer in layers:
        heads = len(layer.alpha)
        values = layer.value.repeat_interleave(heads // layer.value.shape[1], dim=1)
        projection = layer.o_proj.unflatten(1, (heads, -1))
        vectors = torch.einsum("hij,jhd,Dhd->ijD", layer.alpha, values, projection)
        vectors[range(length), range(length)] += layer.x_prev
        torch.testing.assert_close(vectors.sum(1), layer.x_mid)  # They are all of the stream.
        norms = [
            [
                max(0.0, float(y.abs().sum() - (y - vectors[i, j]).abs().sum()))
                for j in range(length)
            ]
            for i, y in enumerate(layer.x_mid)
        ]
        contributions = torch.tensor(norms, dtype=torch.float64)
        rollout = contributions / contributions.sum(-1, keepdim=True) @ rollout
    wanted = rollout[prepared.target[0] - 1 : prepared.target[1] - 1].mean(0)
    scores, facts = alti_rollout(hf.recorded(prepared), prepared)
    assert relative_l1(scores, wanted) < 1e-5
    assert float(scores.sum()) == pytest.approx(1, abs=1e-5)
    mass = float(wanted[slice(*prepared.reasoning)].sum())
    assert facts["reasoning_mass"] == pytest.approx(mass, rel=1e-3)


def test_value_norm(hf: HFModel, prepared: Prepared, layers: list[LayerActivations]) -> None:
    def one_hop(w: Tensor) -> Tensor:
        scores = torch.zeros_like(w)
        for layer in layers:
            heads, dim = layer.alpha.shape[0], layer.value.shape[2]
            values = layer.value.repeat_interleave(heads // layer.value.shape[1], dim=1)
            projected = torch.einsum(
                "nhd,khd->nhk", values, layer.o_proj.reshape(-1, heads, dim)
            ).norm(dim=-1)
            scores += (torch.einsum("i,hij->jh", w, layer.alpha) * projected).sum(-1)
        return scores

    positions = torch.arange(len(prepared.token_ids))
    first, end = prepared.reasoning
    wanted, remaining = oracle_hops(
        one_hop,
        span_weights(prepared, prepared.target),
        (positions < prepared.prompt_length).double(),
        ((positions >= first) & (positions < end)).double(),
        1,
    )
    scores, facts = value_norm(hf.recorded(prepared), prepared)
    assert relative_l1(scores, wanted) < 1e-5
    assert facts["remaining_mass"] == pytest.approx(remaining, rel=1e-4)


def test_too_many_tokens_are_refused(hf: HFModel) -> None:
    hf.check_attention_fits(2000)
    with pytest.raises(MethodFailed, match=r"need .* GiB, allowed are 6 GiB"):
        hf.check_attention_fits(20_000)


@pytest.mark.parametrize(
    "kind", [AttentionFamily, PackageFamily, GradientFamily, ClpFamily, ReagentFamily]
)
@pytest.mark.parametrize("case", ["prepared", "without_reasoning"])
def test_scores_of_every_method(
    kind: type[Family], case: str, resources: Any, request: pytest.FixtureRequest
) -> None:
    prepared: Prepared = request.getfixturevalue(case)
    family = kind(resources)
    results = family.attribute(prepared, kind.labels)
    assert set(results) == set(kind.labels)
    for scores in results.values():
        assert scores.values.dtype == np.float64
        assert scores.values.shape == (prepared.num_user_tokens,)
        assert np.isfinite(scores.values).all() and np.abs(scores.values).sum() > 0
        assert scores.seconds > 0
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


@torch.no_grad()
def test_reagent_weighs_its_replacements(
    hf: HFModel, double_model: Any, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the paper's update, prompt by prompt, with the prompts that were scored."""
    variants: list[Tensor] = []
    stock = baselines.target_logits

    def watched(model: Any, ids: Tensor, prepared: Prepared) -> Tensor:
        variants.extend(ids)
        return stock(model, ids, prepared)

    monkeypatch.setattr(baselines, "target_logits", watched)
    scores = reagent(hf, prepared, 50, torch.Generator().manual_seed(1))
    whole, *changed = variants
    assert whole.tolist() == list(prepared.token_ids) and len(changed) == 50
    answer = range(*prepared.target)

    def probabilities(ids: Tensor) -> Tensor:
        chances = double_model(ids[None]).logits[0].softmax(-1)
        return torch.stack([chances[at - 1, prepared.token_ids[at]] for at in answer])

    original = probabilities(whole)
    wanted = torch.zeros(prepared.num_user_tokens, dtype=torch.float64)
    times = torch.zeros(prepared.num_user_tokens)
    for variant in changed:
        delta = (original - probabilities(variant)).mean()
        update = torch.log((1 + delta) / (1 - delta))
        replaced = (variant != whole)[slice(*prepared.user)]
        assert int(replaced.sum()) == int((variant != whole).sum())  # None but the user's.
        assert int(replaced.sum()) == round(0.3 * prepared.num_user_tokens)
        wanted += torch.where(replaced, update, -update) / len(changed)
        times += replaced
    assert times.min() > 0
    torch.testing.assert_close(scores, wanted, rtol=1e-3, atol=1e-6)
    replay = reagent(hf, prepared, 50, torch.Generator().manual_seed(1))
    torch.testing.assert_close(replay, scores, rtol=0, atol=0)
