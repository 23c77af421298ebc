from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.core.single_layer import weighted_column_sums
from vllm_flashtrace.core import AttentionForm, TargetRowBlocks
from vllm_flashtrace.core import attention as column_sums

SCALE = 0.3
FORM = AttentionForm(SCALE)


def dense(query: Tensor, key: Tensor, weights: Tensor, positions: Tensor) -> Tensor:
    """The definition in float64, row by row."""
    rows, heads, _ = query.shape
    shared = heads // key.shape[1]
    sums = torch.zeros(heads, key.shape[0], dtype=torch.float64)
    for i in range(rows):
        visible = int(positions[i]) + 1
        for h in range(heads):
            logits = SCALE * key[:visible, h // shared].double() @ query[i, h].double()
            sums[h, :visible] += float(weights[i]) * logits.softmax(0)
    return sums


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    groups = draw(st.integers(1, 3))
    heads = groups * draw(st.integers(1, 3))
    context = draw(st.integers(1, 40))
    rows = draw(st.integers(0, 20))
    query = 4 * torch.randn(rows, heads, 8, generator=generator)
    key = 4 * torch.randn(context, groups, 8, generator=generator)
    weights = torch.rand(rows, generator=generator)
    weights[torch.rand(rows, generator=generator) < 0.2] = 0
    positions = torch.randint(0, context, (rows,), generator=generator)
    return query, key, weights, positions


@settings(deadline=None, max_examples=60)
@given(cases(), st.integers(1, 25))
def test_equals_the_definition_for_any_block_size(case, block_rows) -> None:
    query, key, weights, positions = case
    ours = weighted_column_sums(query, key, weights, positions, FORM, block_rows=block_rows)
    torch.testing.assert_close(
        ours.double(), dense(query, key, weights, positions), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    "form", [FORM, AttentionForm(SCALE, sliding_window=9), AttentionForm(SCALE, chunk_size=11)]
)
@pytest.mark.parametrize("targets", [1, 2])
def test_factors_of_rows_heads_and_coordinates(form: AttentionForm, targets: int) -> None:
    """Those of each coordinate give as many sums, those of a head side by side."""
    generator = torch.Generator().manual_seed(7)
    query, key = torch.randn(12, 4, 8, generator=generator), torch.randn(30, 2, 8)
    weights, positions = torch.rand(targets, 12, generator=generator), torch.arange(18, 30)
    by_coordinate = torch.randn(4, 3, 12, generator=generator)
    blocks = TargetRowBlocks(weights, positions, 4, 2, block_rows=5)

    def sums(factors: Tensor | None, of: TargetRowBlocks, heads: int, count: int) -> list[Tensor]:
        outs = [torch.zeros(heads, 30) for _ in range(count)]
        of.add(query, key.permute(1, 2, 0).clone(), form, outs, factors)
        return outs

    ours = sums(by_coordinate, blocks, 12, targets)
    by_head = sums(by_coordinate[:, 0].contiguous(), blocks, 4, targets)
    for target, row_weights in enumerate(weights):
        for head in range(4):
            for coordinate in range(3):
                factors = by_coordinate[head, coordinate]
                alone = TargetRowBlocks(row_weights * factors, positions, 4, 2)
                [expected] = sums(None, alone, 4, 1)
                own = ours[target].view(4, 3, 30)[head, coordinate]
                torch.testing.assert_close(own, expected[head], rtol=1e-5, atol=1e-6)
                if coordinate == 0:
                    torch.testing.assert_close(
                        by_head[target][head], expected[head], rtol=1e-5, atol=1e-6
                    )


@settings(deadline=None, max_examples=40)
@given(cases(), st.integers(0, 20), st.randoms(use_true_random=False))
def test_pieces_in_any_order_add_up(case, cut, random) -> None:
    query, key, weights, positions = case
    order = torch.tensor(random.sample(range(len(query)), len(query)), dtype=torch.int64)
    out = torch.zeros(query.shape[1], len(key) + 3)
    for piece in (order[:cut], order[cut:]):
        # As in chunked prefill: later keys do not exist yet.
        seen = int(positions[piece].max()) + 1 if len(piece) else 0
        weighted_column_sums(
            query[piece], key[:seen], weights[piece], positions[piece], FORM, out=out
        )
    whole = weighted_column_sums(query, key, weights, positions, FORM)
    torch.testing.assert_close(out[:, : len(key)], whole, rtol=1e-5, atol=1e-6)
    assert not out[:, len(key) :].any()


def test_each_row_spreads_its_weight_over_the_tokens_it_sees() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(3, 2, 8, generator=generator), torch.randn(9, 1, 8)
    sums = weighted_column_sums(
        query, key, torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2, 5, 5]), FORM
    )
    torch.testing.assert_close(sums.sum(1), torch.tensor([7.0, 7.0]))
    assert (sums[:, :6] > 0).all() and not sums[:, 6:].any()


def test_small_memory_budget_changes_nothing(monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(30, 4, 8, generator=generator)
    key = torch.randn(50, 2, 8, generator=generator)
    args = (query, key, torch.rand(30, generator=generator), torch.arange(20, 50), FORM)
    whole = weighted_column_sums(*args)
    monkeypatch.setattr(column_sums, "_BLOCK_FLOATS", 1)
    torch.testing.assert_close(weighted_column_sums(*args), whole)


def test_large_logits_do_not_overflow() -> None:
    query, key = torch.full((1, 1, 2), 1e4), torch.tensor([[[1e4, 0.0]], [[-1e4, 0.0]]])
    sums = weighted_column_sums(query, key, torch.ones(1), torch.tensor([1]), AttentionForm(1.0))
    assert sums.tolist() == [[1.0, 0.0]]


def test_first_key_far_below_the_others_does_not_overflow() -> None:
    # The logit of the first key is the reference of a row's exponentials; here it misleads.
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(12, 2, 8, generator=generator)
    key = torch.randn(30, 1, 8, generator=generator)
    query[3:9] = 40.0
    key[0] = -40.0
    weights, positions = torch.rand(12, generator=generator), torch.arange(18, 30)
    ours = weighted_column_sums(query, key, weights, positions, FORM)
    torch.testing.assert_close(
        ours.double(), dense(query, key, weights, positions), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("apart", [1, 3])
def test_rows_among_those_of_other_requests(apart: int) -> None:
    generator = torch.Generator().manual_seed(0)
    step = torch.randn(40, 4, 8, generator=generator)
    key = torch.randn(20, 2, 8, generator=generator)
    rows, positions = torch.arange(5, 5 + 12 * apart, apart), torch.arange(8, 20)
    weights = torch.rand(12, generator=generator)
    out = torch.zeros(4, 20)
    blocks = TargetRowBlocks(weights, positions, 4, 2, rows=rows, block_rows=5)
    assert blocks.columns == 20
    blocks.add(step, key.permute(1, 2, 0).clone(), FORM, out)
    torch.testing.assert_close(
        out.double(), dense(step[rows], key, weights, positions), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("form", [FORM, AttentionForm(0.3, sliding_window=7, soft_cap=5.0)])
def test_several_targets_are_what_each_is_alone(form: AttentionForm) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(12, 4, 8, generator=generator)
    key = torch.randn(20, 2, 8, generator=generator)
    positions, scales = torch.arange(8, 20), torch.rand(12, generator=generator)
    weights = torch.rand(3, 12, generator=generator)
    weights[0, :9] = weights[1, 4:] = 0.0  # Their rows differ and overlap with those of the third.
    together = [torch.zeros(4, 20) for _ in weights]
    blocks = TargetRowBlocks(weights, positions, 4, 2, block_rows=5)
    blocks.add(query, key.permute(1, 2, 0).clone(), form, together, scales)
    for own, out in zip(weights, together, strict=True):
        alone = torch.zeros(4, 20)
        blocks = TargetRowBlocks(own, positions, 4, 2, block_rows=5)
        blocks.add(query, key.permute(1, 2, 0).clone(), form, alone, scales)
        torch.testing.assert_close(out, alone, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="of one length"):
        TargetRowBlocks(weights[:, :5], positions, 4, 2)


def test_low_precision_inputs_are_computed_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(5, 2, 16, generator=generator).bfloat16()
    key = torch.randn(20, 1, 16, generator=generator).bfloat16()
    weights, positions = torch.ones(5), torch.arange(15, 20)
    ours = weighted_column_sums(query, key, weights, positions, FORM)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(
        ours.double(), dense(query, key, weights, positions), rtol=1e-5, atol=1e-6
    )


def test_a_row_of_weight_zero_is_not_read() -> None:
    query = torch.full((1, 1, 4), float("nan"))
    sums = weighted_column_sums(query, torch.ones(3, 1, 4), torch.zeros(1), torch.tensor([2]), FORM)
    assert not sums.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": torch.tensor([-1, 3])}, "not be negative, got -1"),
        ({"positions": torch.tensor([3])}, "weights and positions"),
        ({"num_kv_heads": 3}, "not a multiple of 3"),
        ({"block_rows": 0}, "block_rows"),
    ],
)
def test_misfits_are_refused(change, message) -> None:
    args = {
        "weights": torch.ones(2),
        "positions": torch.tensor([3, 4]),
        "num_heads": 4,
        "num_kv_heads": 2,
    }
    with pytest.raises(ValueError, match=message):
        TargetRowBlocks(**{**args, **change})
