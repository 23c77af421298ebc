"""Sums of the bits of many tensors, in one launch for each width of their words.

Bits are read as integers and added up in pieces of `PIECE` words, modulo 2^64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_flashtrace.kernels.triton_operands import launch
from vllm_flashtrace.kernels.triton_rows import cdiv, counted, to_device

PIECE = 2048
"""Words of a piece, 16 KiB where they have eight bytes."""

WIDTHS = (8, 4, 2, 1)
"""Bytes that a word may have."""

_CHUNK_PIECES = 16
_FIELDS = tl.constexpr(3)
_WORDS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}


class WordChunks:
    """Where the words of some tensors lie, cut into chunks of one program each.

    Attributes:
        table: int64 ``[chunks, 3]`` on the device: address, words, number of the first piece.
        width: Bytes of a word.
        pieces: Number of pieces of all tensors; none has words of two tensors.
    """

    def __init__(
        self, places: Sequence[tuple[int, int]], device: torch.device, width: int = 8
    ) -> None:
        """Makes the table.

        Args:
            places: Of each tensor the address, a multiple of 16, and the number of words.
            device: Where they are.
            width: One of `WIDTHS`.
        """
        self.width = width
        address, words = np.array(places, np.int64).reshape(-1, 2).T
        pieces = cdiv(words, PIECE)
        tensor, chunk = counted(cdiv(pieces, _CHUNK_PIECES))
        done = chunk * _CHUNK_PIECES * PIECE
        table = np.stack(
            [
                address[tensor] + done * width,
                np.minimum(words[tensor] - done, _CHUNK_PIECES * PIECE),
                (pieces.cumsum() - pieces)[tensor] + chunk * _CHUNK_PIECES,
            ],
            axis=1,
        )
        self.table = to_device([table], device)[0]
        self.pieces = int(pieces.sum())

    def piece_sums(self, out: Tensor | None = None) -> Tensor:
        """The sums of the bits as they are now; never waits for the device.

        Args:
            out: int64 ``[pieces]``, contiguous, its address a multiple of 16: gets them; None for
                memory of their own.
        """
        sums = out
        if sums is None:
            sums = torch.empty(self.pieces, dtype=torch.int64, device=self.table.device)
        if self.pieces:
            launch(
                _piece_sums_kernel,
                (len(self.table),),
                self.table,
                sums,
                WORDS=PIECE,
                WORD=_WORDS[self.width],
                num_warps=4,
            )
        return sums


@triton.jit
def _piece_sums_kernel(table, sums, WORDS: tl.constexpr, WORD: tl.constexpr):
    """A chunk: its whole pieces, and what is left behind them."""
    entry = table + tl.program_id(0) * _FIELDS
    address = tl.multiple_of(tl.load(entry), 16).to(tl.pointer_type(WORD))
    words = tl.load(entry + 1)
    sums += tl.load(entry + 2)
    whole = words // WORDS
    for piece in range(whole):
        x = tl.load(address + piece * WORDS + tl.arange(0, WORDS))
        tl.store(sums + piece, tl.sum(x.to(tl.int64), axis=0))
    if whole * WORDS < words:
        places = whole * WORDS + tl.arange(0, WORDS)
        rest = tl.load(address + places, mask=places < words, other=0)
        tl.store(sums + whole, tl.sum(rest.to(tl.int64), axis=0))
