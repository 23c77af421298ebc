from __future__ import annotations

import gc
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_flashtrace.core import HopRecursion, TargetWeights

PROMPT, LENGTH = 4, 10  # positions 4..7 reason, 8..9 answer
TARGET = TargetWeights.from_spans([(8, 10)])
NOTHING = torch.zeros(LENGTH, dtype=torch.bool)


def mask(*positions: int) -> torch.Tensor:
    result = NOTHING.clone()
    result[list(positions)] = True
    return result


REASONING = mask(4, 5, 6, 7)


def scores(**parts: float) -> torch.Tensor:
    """Mass on prompt token 1, reasoning token 5 and target token 8, in that order of names."""
    result = torch.zeros(LENGTH)
    for name, position in (("input", 1), ("reasoning", 5), ("target", 8)):
        result[position] = parts.get(name, 0.0)
    return result


def run(recursion: HopRecursion, *answers: torch.Tensor) -> list[TargetWeights]:
    """Feeds answers until the recursion is done; returns the weights it asked for."""
    asked = []
    for answer in answers:
        weights = recursion.next_weights()
        if weights is None:
            break
        asked.append(weights)
        recursion.add(answer)
    return asked


def test_the_papers_formula() -> None:
    recursion = HopRecursion(TARGET, PROMPT, LENGTH, REASONING, hops=2)
    asked = run(
        recursion,
        scores(input=2, reasoning=7, target=1),  # rho_0 = 0.7
        scores(input=4, reasoning=6),  # rho_1 = 0.6
        scores(input=1, reasoning=1),  # rho_2 = 0.5
        scores(input=1),
    )
    assert len(asked) == 3
    assert recursion.next_weights() is None
    assert asked[0].positions.tolist() == [8, 9]
    assert asked[1].positions.tolist() == asked[2].positions.tolist() == [5]

    result = recursion.result()
    assert result.input_mass == pytest.approx(0.2 + 0.7 * 0.4 + 0.42 * 0.5)
    assert float(result.scores[1]) == pytest.approx(result.input_mass)
    assert result.remaining_mass == pytest.approx(0.7 * 0.6 * 0.5)
    assert result.target_mass == pytest.approx(0.1)
    assert float(result.generated_scores[5]) == pytest.approx(0.7 + 0.42 + 0.21)
    assert float(result.generated_scores[8]) == pytest.approx(0.1)
    assert not result.generated_scores[:PROMPT].any() and not result.scores[PROMPT:].any()
    assert [hop.weight for hop in result.hops] == pytest.approx([1, 0.7, 0.42])
    assert [hop.reasoning_mass for hop in result.hops] == pytest.approx([0.7, 0.6, 0.5])
    assert [float(s.sum()) for s in result.per_hop_scores] == pytest.approx([1, 1, 1])


def test_hop_weights_follow_the_previous_scores() -> None:
    recursion = HopRecursion(TARGET, PROMPT, LENGTH, REASONING)
    recursion.add(torch.arange(LENGTH))
    weights = recursion.next_weights()
    assert weights is not None and weights.positions.tolist() == [4, 5, 6, 7]
    torch.testing.assert_close(weights.weights, torch.tensor([4.0, 5, 6, 7]) / 45)


def test_asking_again_gives_the_same_weights() -> None:
    recursion = HopRecursion(TARGET, PROMPT, LENGTH, REASONING)
    assert recursion.next_weights() is recursion.next_weights()


def test_no_reasoning_stops_after_hop_zero() -> None:
    recursion = HopRecursion(TARGET, PROMPT, LENGTH, NOTHING, hops=5)
    recursion.add(torch.ones(LENGTH))
    assert recursion.next_weights() is None
    result = recursion.result()
    assert result.remaining_mass == 0
    assert (result.input_mass, result.target_mass) == pytest.approx((0.4, 0.6))


def test_hops_zero_leaves_the_reasoning_mass_as_remaining() -> None:
    recursion = HopRecursion(TARGET, PROMPT, LENGTH, REASONING, hops=0)
    recursion.add(torch.ones(LENGTH))
    assert recursion.next_weights() is None
    assert recursion.result().remaining_mass == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("threshold", "expected"), [(0.6, 1), (0.3, 2), (0.25, 3), (0.13, 3), (0.05, 5), (0.0, 7)]
)
def test_auto_stops_when_little_is_left(threshold, expected) -> None:
    recursion = HopRecursion(
        TARGET, PROMPT, LENGTH, REASONING, hops="auto", auto_threshold=threshold, max_hops=6
    )
    asked = run(recursion, *[scores(input=1, reasoning=1)] * 20)  # 0.5, 0.25, 0.125, ...
    assert len(asked) == expected  # hop 0 included
    assert recursion.result().remaining_mass == 0.5**expected


def test_auto_stops_at_max_hops() -> None:
    recursion = HopRecursion(TARGET, PROMPT, LENGTH, REASONING, hops="auto", max_hops=3)
    assert len(run(recursion, *[scores(input=1, reasoning=99)] * 20)) == 4


def test_a_fixed_number_of_hops_ignores_the_threshold() -> None:
    recursion = HopRecursion(TARGET, PROMPT, LENGTH, REASONING, hops=3, auto_threshold=0.9)
    assert len(run(recursion, *[scores(input=99, reasoning=1)] * 20)) == 4


def test_skipped_tokens_are_neither_explained_nor_credited() -> None:
    skip = mask(1, 5, 9)
    recursion = HopRecursion(TARGET, PROMPT, LENGTH, REASONING, skip_mask=skip)
    first, second = run(recursion, torch.ones(LENGTH), torch.ones(LENGTH))
    assert first.positions.tolist() == [8]
    assert second.positions.tolist() == [4, 6, 7]
    result = recursion.result()
    assert not result.scores[skip].any()
    hop = result.hops[0]
    assert (hop.input_mass, hop.reasoning_mass, hop.target_mass, hop.skipped_mass) == (
        pytest.approx((0.3, 0.3, 0.1 + 0.0, 0.3))
    )
    assert result.skipped_mass == pytest.approx(0.3 + 0.3 * 0.3)


def test_a_target_of_skipped_tokens_only_is_refused() -> None:
    with pytest.raises(ValueError, match="every target token is skipped"):
        HopRecursion(TARGET, PROMPT, LENGTH, REASONING, skip_mask=mask(8, 9))


def test_predicting_rows_are_one_to_the_left_of_what_is_not_skipped() -> None:
    """Skipped are tokens of the target, not the rows before them; later hops do not move."""
    skip = mask(1, 5, 9)
    recursion = HopRecursion(TARGET, PROMPT, LENGTH, REASONING, skip_mask=skip, predicting=True)
    assert recursion.target_tokens.tolist() == [8]
    first, second = run(recursion, torch.ones(LENGTH), torch.ones(LENGTH))
    assert first.positions.tolist() == [7]
    assert second.positions.tolist() == [4, 6, 7]
    begin = TargetWeights.from_spans([(PROMPT, LENGTH)])
    recursion = HopRecursion(begin, PROMPT, LENGTH, NOTHING, predicting=True)
    [first] = run(recursion, torch.ones(LENGTH))
    assert first.spans == [(PROMPT - 1, LENGTH - 1)]


@pytest.mark.parametrize("predicting", [False, True])
def test_the_target_is_weighed_before_its_hop(predicting: bool) -> None:
    target = TargetWeights.from_mapping({8: 2.0, 9: 3.0})
    recursion = HopRecursion(target, PROMPT, LENGTH, REASONING, predicting=predicting)
    for bad in ([1.0], [1.0, 0.0], [1.0, -1.0], [1.0, math.nan]):
        with pytest.raises(ValueError, match="positive factors"):
            recursion.weigh(torch.tensor(bad))
    recursion.weigh(torch.tensor([0.5, 4.0]))
    weights = recursion.next_weights()
    assert weights is not None
    assert weights.weights.tolist() == [1.0, 12.0]
    assert weights.positions.tolist() == ([7, 8] if predicting else [8, 9])
    recursion.add(torch.ones(LENGTH))
    with pytest.raises(RuntimeError, match="has been explained"):
        recursion.weigh(torch.ones(2))


def test_prompt_tokens_in_the_recursion_mask_are_reasoning() -> None:
    recursion = HopRecursion(TARGET, PROMPT, LENGTH, mask(2, 5))
    recursion.add(torch.ones(LENGTH))
    weights = recursion.next_weights()
    assert weights is not None and weights.positions.tolist() == [2, 5]
    hop = recursion.result().hops[0]
    assert (hop.input_mass, hop.reasoning_mass, hop.target_mass) == pytest.approx((0.3, 0.2, 0.5))
    assert float(recursion.result().scores[2]) == 0


def test_a_partial_result_counts_the_unfinished_hop_as_remaining() -> None:
    recursion = HopRecursion(TARGET, PROMPT, LENGTH, REASONING, hops=5)
    recursion.add(scores(input=1, reasoning=3))
    assert recursion.result().remaining_mass == 0.75


@st.composite
def recursions(draw: st.DrawFn) -> tuple[HopRecursion, torch.Generator, int]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    prompt = draw(st.integers(0, 20))
    length = prompt + draw(st.integers(1, 20))
    followed = torch.rand(length, generator=generator) < draw(st.floats(0, 1))
    skipped = torch.rand(length, generator=generator) < draw(st.sampled_from([0, 0.3]))
    skipped[-1] = False
    target = TargetWeights.from_spans([(draw(st.integers(prompt, length - 1)), length)])
    hops = draw(st.one_of(st.integers(0, 5), st.just("auto")))
    return (
        HopRecursion(target, prompt, length, followed, hops=hops, skip_mask=skipped),
        generator,
        length,
    )


@settings(deadline=None)
@given(recursions())
def test_mass_is_conserved(case) -> None:
    recursion, generator, length = case
    while recursion.next_weights() is not None:
        layers = torch.rand(3, length, generator=generator) ** 4
        layers[:, torch.rand(length, generator=generator) < 0.3] = 0
        layers[0, -1] += 1e-3
        recursion.add(layers.sum(0), layers)
        result = recursion.result()
        total = result.input_mass + result.remaining_mass + result.target_mass + result.skipped_mass
        assert abs(total - 1) < 1e-9
        assert abs(float(result.scores.sum()) - result.input_mass) < 1e-9
        assert float(result.scores.min()) >= 0
        for hop in result.hops:
            parts = hop.input_mass + hop.reasoning_mass + hop.target_mass + hop.skipped_mass
            assert abs(parts - 1) < 1e-9
        assert result.layer_scores is not None
        torch.testing.assert_close(
            result.layer_scores.sum(0, dtype=torch.float64), result.scores, rtol=1e-5, atol=1e-7
        )


@settings(deadline=None)
@given(recursions(), st.integers(0, 3))
def test_further_hops_are_those_the_recursion_asks_for(case, begin) -> None:
    recursion, generator, length = case
    for _ in range(begin):  # As if the earlier ones had run alone.
        if recursion.next_weights() is not None:
            recursion.add(torch.rand(length, generator=generator) + 1e-3)
    further, mass = recursion.further_hops(), 1.0
    left = 0 if further is None else further.hops
    while recursion.next_weights() is not None:
        answer = torch.rand(length, generator=generator) ** 4 + 1e-6
        recursion.add(answer)
        asked = recursion.next_weights()
        target = None
        if further is not None and left > 0:
            target, mass = further.after(answer, mass)
            left -= 1
        assert (target is None) == (asked is None)
        if target is not None and asked is not None:
            assert target.positions.equal(asked.positions)
            assert target.weights.equal(asked.weights)


def test_no_hop_follows_the_last_or_one_without_reasoning() -> None:
    assert HopRecursion(TARGET, PROMPT, LENGTH, REASONING, hops=0).further_hops() is None
    assert HopRecursion(TARGET, PROMPT, LENGTH, NOTHING, hops=3).further_hops() is None
    behind = TargetWeights.from_spans([(4, 5)])
    assert HopRecursion(behind, PROMPT, LENGTH, mask(6, 7), hops=3).further_hops() is None
    recursion = HopRecursion(TARGET, PROMPT, LENGTH, REASONING, hops=1)
    recursion.add(scores(input=1, reasoning=1))
    assert recursion.next_weights() is not None and recursion.further_hops() is None


@settings(deadline=None, max_examples=30)
@given(recursions(), st.sampled_from([1e-20, 1e-3, 1e6]))
def test_the_scale_of_scores_does_not_matter(case, factor) -> None:
    recursion, generator, length = case
    answer = torch.rand(length, generator=generator, dtype=torch.float64) + 1e-3
    recursion.add(answer * factor)
    torch.testing.assert_close(recursion.result().per_hop_scores[0], answer / answer.sum())


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (torch.zeros(LENGTH), "all scores"),
        (torch.ones(LENGTH + 1), "scores must be"),
        (torch.full((LENGTH,), math.nan), "finite"),
        (torch.full((LENGTH,), math.inf), "finite"),
        (torch.arange(LENGTH) - 1.0, "not negative"),
    ],
)
def test_bad_scores_are_refused_and_change_nothing(answer, message) -> None:
    recursion = HopRecursion(TARGET, PROMPT, LENGTH, REASONING)
    with pytest.raises(ValueError, match=message):
        recursion.add(answer)
    recursion.add(torch.ones(LENGTH))
    assert len(recursion.result().hops) == 1


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (torch.full((2, LENGTH), 0.4), "do not sum"),
        (torch.ones(LENGTH), "layer_scores must be"),
        (torch.full((2, LENGTH), math.nan), "layer_scores of the hop"),
    ],
)
def test_bad_layer_scores_are_refused(layers, message) -> None:
    recursion = HopRecursion(TARGET, PROMPT, LENGTH, REASONING)
    with pytest.raises(ValueError, match=message):
        recursion.add(torch.ones(LENGTH), layers)


def test_layers_of_many_hops_are_kept_once() -> None:
    """Eight hops of 80 layers and 131,072 tokens would be 670 MB, in float64."""
    layers, length = 7, 1013
    followed = torch.zeros(length, dtype=torch.bool)
    followed[PROMPT:] = True
    recursion = HopRecursion(
        TargetWeights.from_spans([(length - 3, length)]), PROMPT, length, followed, hops=8
    )
    while recursion.next_weights() is not None:
        recursion.add(torch.ones(length), torch.full((layers, length), 1 / layers))
    # Tensors of other kinds may be left of an earlier test's compilation, without sizes.
    plain = [x for x in gc.get_objects() if type(x) is torch.Tensor]
    kept = [x for x in plain if x.shape == (layers, length)]
    assert sum(x.nbytes for x in kept) == 4 * layers * length


def test_layers_come_with_every_hop_or_with_none() -> None:
    halves = torch.full((2, LENGTH), 0.5)
    recursion = HopRecursion(TARGET, PROMPT, LENGTH, REASONING)
    recursion.add(torch.ones(LENGTH), halves)
    with pytest.raises(ValueError, match="this one has none"):
        recursion.add(torch.ones(LENGTH))
    with pytest.raises(ValueError, match="has 1 layers, earlier hops had 2"):
        recursion.add(torch.ones(LENGTH), torch.ones(1, LENGTH))
    recursion = HopRecursion(TARGET, PROMPT, LENGTH, REASONING)
    recursion.add(torch.ones(LENGTH))
    with pytest.raises(ValueError, match="earlier hops had none"):
        recursion.add(torch.ones(LENGTH), halves)


def test_calls_out_of_turn_are_errors() -> None:
    recursion = HopRecursion(TARGET, PROMPT, LENGTH, REASONING, hops=0)
    with pytest.raises(RuntimeError, match="no hop has been run"):
        recursion.result()
    recursion.add(torch.ones(LENGTH))
    with pytest.raises(RuntimeError, match="finished"):
        recursion.add(torch.ones(LENGTH))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hops": -1}, "hops"),
        ({"hops": True}, "hops"),
        ({"hops": 1.5}, "hops"),
        ({"hops": "all"}, "hops"),
        ({"auto_threshold": math.nan}, "auto_threshold"),
        ({"max_hops": -1}, "max_hops"),
        ({"recursion_mask": torch.zeros(LENGTH)}, "recursion_mask"),
        ({"skip_mask": torch.zeros(LENGTH + 1, dtype=torch.bool)}, "skip_mask"),
        ({"prompt_length": LENGTH + 1}, "prompt_length"),
        ({"target": TargetWeights.from_spans([(3, 9)])}, "not all generated"),
        ({"target": TargetWeights.from_spans([(8, 11)])}, "not all generated"),
    ],
)
def test_bad_arguments_are_refused(change, message) -> None:
    args = {
        "target": TARGET,
        "prompt_length": PROMPT,
        "length": LENGTH,
        "recursion_mask": REASONING,
    }
    with pytest.raises(ValueError, match=message):
        HopRecursion(**{**args, **change})
