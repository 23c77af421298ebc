"""Notices that a model's weights have changed, by whatever way.

Training frameworks write weights in many ways: through vLLM's methods, through a method of a worker
extension, by copies into ``param.data`` that no counter of PyTorch sees, by new tensors, or from
another process that shares the memory. Two things follow:

- Nothing that is derived from weights is kept beyond the step it is derived in, except from the
  packed matrices of the CPU backend, which cannot be written to; see
  `output_projections.packed_kernel`.
- All forward passes of a trace must have had the same weights. So the bits of all weights are added
  up at each step that computes tokens of a trace, on the device and without waiting for it, and
  what comes out is compared with the trace's first step and, at the end, between its hops.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vllm_flashtrace.worker.output_projections import packed_kernel
from vllm_flashtrace.worker.quantized import packed_int8

if TYPE_CHECKING:
    from vllm_flashtrace.kernels.triton_piece_sums import WordChunks

_PIECE, _ALIGNMENT = 2048, 16
# Attributes of vLLM's modules that hold the matrices of all slots.
_STACKS, _STACK_DIMS = ("lora_a_stacked", "lora_b_stacked"), 3
_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)
_ODD = (-7046029254386353131, -4658895280553007687)


class WeightsFingerprint:
    """A number for all parameters and buffers of a model, as they are when it is asked for.

    The bits are read as integers of 64 bits and added up in pieces of 16 KiB; the number is the sum
    of the pieces, each times an odd number of its own, modulo 2^64. So any change within one piece
    that changes its sum, that of a single weight above all, is certain to change the number. Not
    noticed are changes that leave the sum of every piece as it was, such as another order of the
    words within a piece, and of all others one in 2^64.

    A matrix that the CPU backend has packed for its kernels, outside of PyTorch's memory if it is
    int8, counts as the kernel that holds it.

    Reading is bound by memory: it takes about as long as a decode step with one token. On CUDA one
    launch reads all tensors whose words are of one width, if they have no gaps.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """Reads nothing yet.

        Args:
            model: The model.
            device: Where numbers are added up.
        """
        self._model = model
        self._device = device
        self._kernels: list[object] = []
        self._packings = 0
        self._factors = torch.empty(0, dtype=torch.int64, device=device)
        self._tables: dict[int | None, tuple[list[tuple[int, int]], list[WordChunks]]] = {}

    def take(self) -> Tensor:
        """The number now, int64 ``[]`` on the device; never waits for a GPU."""
        kernels: list[object] = []
        tensors = list(self._tensors(kernels))
        return self._number(tensors, None, self._packing(kernels))

    def take_adapter(self, slot: int) -> Tensor:
        """As `take`, of the LoRA adapter that a slot of the model's modules holds."""
        return self._number(list(self._adapter(slot)), slot, 0)

    def _number(self, tensors: list[Tensor], slot: int | None, packing: int) -> Tensor:
        with torch.no_grad():
            sums = [torch.full((1,), packing, device=self._device)]
            if self._device.type == "cuda":
                tensors, together = self._read_together(tensors, slot)
                sums += together
            for tensor in tensors:
                sums += [part.to(self._device) for part in _piece_sums(tensor)]
            pieces = torch.cat(sums)
            return (pieces * self._factors_of(len(pieces))).sum()

    def _adapter(self, slot: int) -> Iterator[Tensor]:
        """The matrices of a slot, each once."""
        seen: set[tuple[int, int]] = set()
        for module in self._model.modules():
            for name, stacks in vars(module).items():
                if not name.endswith(_STACKS):
                    continue
                for stack in [stacks] if isinstance(stacks, Tensor) else stacks:
                    if stack.dim() < _STACK_DIMS:
                        continue  # A view of a part of another.
                    matrix = stack[slot]
                    place = matrix.data_ptr(), matrix.numel()
                    if place not in seen:
                        seen.add(place)
                        yield matrix

    def _read_together(
        self, tensors: list[Tensor], slot: int | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors that launches cannot read together, and the piece sums of those they can."""
        others, places = [], []
        for tensor in tensors:
            address = tensor.data_ptr()
            if (
                tensor.device.type == self._device.type
                and _has_no_gaps(tensor)
                and address % _ALIGNMENT == 0
            ):
                places.append((address, tensor.numel() * tensor.element_size()))
            else:
                others.append(tensor)
        known = self._tables.get(slot)
        if known is None or known[0] != places:
            known = self._tables[slot] = places, _chunks_of(places, self._device)
        return others, [chunks.piece_sums() for chunks in known[1]]

    def _tensors(self, kernels: list[object]) -> Iterator[Tensor]:
        """Each parameter and buffer once; what packs a module's matrix goes to ``kernels``."""
        seen: set[int] = set()
        for module in self._model.modules():
            kernel = packed_kernel(module) or packed_int8(module)
            if kernel is not None:
                kernels.append(kernel)
            for tensors in (module._parameters, module._buffers):
                for tensor in tensors.values():
                    if tensor is not None and id(tensor) not in seen and not tensor.is_meta:
                        seen.add(id(tensor))
                        yield tensor

    def _packing(self, kernels: list[object]) -> int:
        """How often the packed matrices have been others than the time before."""
        known = self._kernels
        if len(kernels) != len(known) or any(
            new is not old for new, old in zip(kernels, known, strict=True)
        ):
            self._kernels = kernels  # Held, so that none of them can be taken for a later one.
            self._packings += 1
        return self._packings

    def _factors_of(self, count: int) -> Tensor:
        if len(self._factors) < count:
            mixed = torch.arange(1, count + 1, device=self._device) * _ODD[0]
            mixed = (mixed ^ (mixed >> 31)) * _ODD[1]
            self._factors = (mixed ^ (mixed >> 29)) | 1
        return self._factors[:count]


def _chunks_of(places: list[tuple[int, int]], device: torch.device) -> list[WordChunks]:
    """Tables of tensors by address and size in bytes, one for each width of words that occurs."""
    from vllm_flashtrace.kernels.triton_piece_sums import WIDTHS, WordChunks

    by_width: dict[int, list[tuple[int, int]]] = {}
    for address, size in places:
        width = next(width for width in WIDTHS if size % width == 0)
        by_width.setdefault(width, []).append((address, size // width))
    return [WordChunks(words, device, width) for width, words in by_width.items()]


def _piece_sums(tensor: Tensor) -> list[Tensor]:
    """The sum of each piece of a tensor's bits, and single words where there is no whole piece."""
    words = _words(tensor)
    whole = len(words) // _PIECE * _PIECE
    parts = []
    if whole:
        parts.append(words[:whole].view(-1, _PIECE).sum(1, dtype=torch.int64))
    if whole < len(words):
        parts.append(words[whole:].to(torch.int64))
    return parts


def _has_no_gaps(tensor: Tensor) -> bool:
    """Whether a tensor's numbers lie side by side, in whatever order (a transposed one's do)."""
    if tensor.is_contiguous():
        return True
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return 0 not in tensor.stride() and tensor.permute(order).is_contiguous()


def _words(tensor: Tensor) -> Tensor:
    """A tensor's bits in the order of memory, as the widest integers that fit, ``[words]``."""
    flat = tensor.detach()
    if not flat.is_contiguous():
        # What is there once in memory counts once: twice a change may be none modulo 2^64.
        flat = flat[tuple(slice(None) if stride else 0 for stride in flat.stride())]
        flat = flat.permute(sorted(range(flat.dim()), key=flat.stride, reverse=True))
    flat = flat.reshape(-1).contiguous()  # A copy only where there are gaps between the numbers.
    size, start = flat.itemsize * len(flat), flat.itemsize * int(flat.storage_offset())
    widest = next(word for word in _WORDS if not (size | start) % word.itemsize)
    return flat.view(widest)
