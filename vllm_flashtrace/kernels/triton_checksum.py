"""A number for the bits of many tensors, in one launch for each width of their words.

Bits are read as integers and added up in pieces of `PIECE` words; the number is the sum of the
pieces, each times an odd number of its own, modulo 2^64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_flashtrace.kernels.triton_operands import launch
from vllm_flashtrace.kernels.triton_rows import to_device

PIECE = 2048
"""Words of a piece, 16 KiB where they have eight bytes."""

WIDTHS = (8, 4, 2, 1)
"""Bytes that a word may have."""

ODD = (-7046029254386353131, -4658895280553007687)
"""What mixes the number of a piece into its factor."""

_CHUNK_PIECES = 16
_FIELDS = tl.constexpr(3)
_MIX_1, _MIX_2 = tl.constexpr(ODD[0]), tl.constexpr(ODD[1])
_WORDS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}


class WordChunks:
    """Where the words of some tensors lie, cut into chunks of one program each.

    Attributes:
        table: int64 ``[chunks, 3]`` on the device: address, words, number of the first piece.
        width: Bytes of a word.
        pieces: Number of pieces of all tensors; none has words of two tensors.
    """

    def __init__(
        self,
        places: Sequence[tuple[int, int]],
        device: torch.device,
        width: int = 8,
        first_piece: int = 0,
    ) -> None:
        """Makes the table.

        Args:
            places: Of each tensor the address, a multiple of 16, and the number of words.
            device: Where they are.
            width: One of `WIDTHS`.
            first_piece: Number of the first piece.
        """
        self.width = width
        address, words = np.array(places, np.int64).reshape(-1, 2).T
        pieces = -(-words // PIECE)
        starts = first_piece + pieces.cumsum() - pieces
        chunks = -(-pieces // _CHUNK_PIECES)
        tensor = np.arange(len(words)).repeat(chunks)
        chunk = np.arange(len(tensor)) - (chunks.cumsum() - chunks).repeat(chunks)
        done = chunk * _CHUNK_PIECES * PIECE
        table = np.stack(
            [
                address[tensor] + done * width,
                np.minimum(words[tensor] - done, _CHUNK_PIECES * PIECE),
                starts[tensor] + chunk * _CHUNK_PIECES,
            ],
            axis=1,
        )
        self.table = to_device([table], device)[0]
        self.pieces = int(pieces.sum())

    def checksum(self) -> Tensor:
        """The number of the bits as they are now, int64 ``[]``; never waits for the device."""
        sums = torch.empty(len(self.table), dtype=torch.int64, device=self.table.device)
        if len(sums):
            launch(
                _checksum_kernel,
                (len(sums),),
                self.table,
                sums,
                WORDS=PIECE,
                WORD=_WORDS[self.width],
                num_warps=4,
            )
        return sums.sum()


@triton.jit
def _checksum_kernel(table, sums, WORDS: tl.constexpr, WORD: tl.constexpr):
    """A chunk: the sums of its pieces, each times the factor of its number."""
    entry = table + tl.program_id(0) * _FIELDS
    address = tl.multiple_of(tl.load(entry), 16).to(tl.pointer_type(WORD))
    words, first_piece = tl.load(entry + 1), tl.load(entry + 2)
    whole = words // WORDS
    total = tl.zeros([1], tl.int64)
    for piece in range(whole):
        x = tl.load(address + piece * WORDS + tl.arange(0, WORDS))
        total += tl.sum(x.to(tl.int64), axis=0) * _factor(first_piece + piece)
    places = whole * WORDS + tl.arange(0, WORDS)
    rest = tl.load(address + places, mask=places < words, other=0)
    total += tl.sum(rest.to(tl.int64), axis=0) * _factor(first_piece + whole)
    tl.store(sums + tl.program_id(0) + tl.arange(0, 1), total)


@triton.jit
def _factor(piece):
    mixed = (piece + 1) * _MIX_1
    mixed = (mixed ^ (mixed >> 31)) * _MIX_2
    return (mixed ^ (mixed >> 29)) | 1
