"""The number of all weights in one launch: its value, and that any change is seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.kernels.attention import CPU
from vllm_flashtrace.kernels.triton_checksum import ODD, PIECE, WordChunks

WORDS = (1, PIECE, PIECE + 1, 17 * PIECE + 5)


def tensors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(-(1 << 62), 1 << 62, (words,), generator=generator) for words in WORDS]


def number_of(weights: list[torch.Tensor]) -> int:
    places = [(weight.data_ptr(), len(weight)) for weight in weights]
    return int(WordChunks(places, CPU).checksum())


def expected(weights: list[torch.Tensor]) -> int:
    total, number = 0, 0
    for weight in weights:
        for piece in weight.split(PIECE):
            number += 1
            with np.errstate(over="ignore"):
                mixed = np.int64(number) * np.int64(ODD[0])
                mixed = (mixed ^ (mixed >> np.int64(31))) * np.int64(ODD[1])
            factor = int((mixed ^ (mixed >> np.int64(29))) | np.int64(1))
            total += sum(piece.tolist()) * factor
    total %= 1 << 64
    return total - (1 << 64) if total >> 63 else total


def test_its_value_and_that_every_change_is_seen() -> None:
    weights = tensors()
    before = number_of(weights)
    assert before == expected(weights)
    for weight in weights:
        for place in {0, len(weight) // 2, len(weight) - 1}:
            weight[place] ^= 1 << 40
            assert number_of(weights) != before
            weight[place] ^= 1 << 40
    assert number_of(weights) == before
    assert number_of([]) == 0
    weights[3][:PIECE], weights[3][PIECE : 2 * PIECE] = (
        weights[3][PIECE : 2 * PIECE].clone(),
        weights[3][:PIECE].clone(),
    )
    assert number_of(weights) != before


@pytest.mark.parametrize(("width", "dtype"), [(4, torch.int32), (2, torch.int16), (1, torch.int8)])
def test_narrower_words(width: int, dtype: torch.dtype) -> None:
    weights = torch.arange(PIECE + 3).to(dtype)
    places = [(weights.data_ptr(), len(weights))]
    before = int(WordChunks(places, CPU, width, first_piece=5).checksum())
    assert before != int(WordChunks(places, CPU, width).checksum())
    for place in (0, PIECE, PIECE + 2):
        weights[place] ^= 1
        assert int(WordChunks(places, CPU, width, first_piece=5).checksum()) != before
        weights[place] ^= 1
    assert int(WordChunks(places, CPU, width, first_piece=5).checksum()) == before
