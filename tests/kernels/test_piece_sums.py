"""Sums of the bits of all weights in one launch: their values, and that any change is seen."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.attention import CPU
from vllm_flashtrace.kernels.triton_piece_sums import PIECE, WordChunks

WORDS = (1, PIECE, PIECE + 1, 17 * PIECE + 5)


def tensors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(-(1 << 62), 1 << 62, (words,), generator=generator) for words in WORDS]


def sums_of(weights: list[torch.Tensor]) -> list[int]:
    places = [(weight.data_ptr(), len(weight)) for weight in weights]
    chunks = WordChunks(places, CPU, weights[0].itemsize if weights else 8)
    sums: list[int] = chunks.piece_sums().tolist()
    assert len(sums) == chunks.pieces
    return sums


def expected(weights: list[torch.Tensor]) -> list[int]:
    sums = (sum(piece.tolist()) % (1 << 64) for weight in weights for piece in weight.split(PIECE))
    return [total - (1 << 64) if total >> 63 else total for total in sums]


def test_their_values_and_that_every_change_is_seen() -> None:
    weights = tensors()
    before = sums_of(weights)
    assert before == expected(weights)
    for weight in weights:
        for place in {0, len(weight) // 2, len(weight) - 1}:
            weight[place] ^= 1 << 40
            assert sums_of(weights) != before
            weight[place] ^= 1 << 40
    assert sums_of(weights) == before
    assert sums_of([]) == []
    weights[3][:PIECE], weights[3][PIECE : 2 * PIECE] = (
        weights[3][PIECE : 2 * PIECE].clone(),
        weights[3][:PIECE].clone(),
    )
    assert sums_of(weights) != before


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8])
def test_narrower_words(dtype: torch.dtype) -> None:
    weights = torch.arange(PIECE + 3).to(dtype)
    before = sums_of([weights])
    assert before == expected([weights])
    for place in (0, PIECE, PIECE + 2):
        weights[place] ^= 1
        assert sums_of([weights]) != before
        weights[place] ^= 1
    assert sums_of([weights]) == before
