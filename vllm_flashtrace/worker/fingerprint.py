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

import operator
import weakref
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor, nn

from vllm_flashtrace.worker.output_projections import packed_kernel
from vllm_flashtrace.worker.quantized import packed_int8

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
    launch reads all tensors whose words are of one width, if they have no gaps. Which tensors there
    are is looked up each time, and none is held.

    Attributes:
        layout: Counts how often `take` has found other tensors than the time before: more or fewer
            of them, or one of another address, shape, stride or type.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """Reads nothing yet.

        Args:
            model: The model.
            device: Where numbers are added up.
        """
        self._model = model
        self._device = device
        self._kernels: list[weakref.ref[object]] = []
        self._packings = 0
        self._factors = torch.empty(0, dtype=torch.int64, device=device)
        self._tables: dict[int | None, _Table] = {}
        self._places: _Places = ([], [], [])
        self.layout = 0

    def take(self) -> Tensor:
        """The number now, int64 ``[]`` on the device; never waits for a GPU."""
        modules = _modules_of(self._model)
        # Methods of vLLM's parameters are called through Python otherwise.
        with torch._C.DisableTorchFunctionSubclass():
            tensors = _tensors_of(modules)
            places = _places_of(tensors)
        if places != self._places:
            self._places = places
            self.layout += 1
        packing = 0 if self._device.type == "cuda" else self._packing(modules)
        return self._number(tensors, places, None, packing)

    def take_adapter(self, slot: int) -> Tensor:
        """As `take`, of the LoRA adapter that a slot of the model's modules holds."""
        tensors = list(self._adapter(slot))
        return self._number(tensors, _places_of(tensors), slot, 0)

    def _number(
        self, tensors: list[Tensor], places: _Places, slot: int | None, packing: int
    ) -> Tensor:
        with torch.no_grad():
            sums = []
            if self._device.type == "cuda":
                table = self._tables.get(slot)
                if table is None or table.places != places:
                    table = self._tables[slot] = _Table(tensors, places, self._device)
                tensors = [tensors[index] for index in table.others]
                sums.append(table.piece_sums())
            if packing or not sums:
                sums.append(torch.full((1,), packing, device=self._device))
            for tensor in tensors:
                if not tensor.is_meta:
                    sums += [part.to(self._device) for part in _piece_sums(tensor)]
            pieces = torch.cat(sums) if len(sums) > 1 else sums[0]
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

    def _packing(self, modules: Iterable[nn.Module]) -> int:
        """How often the packed matrices have been others than the time before."""
        found = [packed_kernel(module) or packed_int8(module) for module in modules]
        kernels = [kernel for kernel in found if kernel is not None]
        known = [kernel() for kernel in self._kernels]  # None for one that is gone.
        if len(kernels) != len(known) or not all(map(operator.is_, kernels, known)):
            self._kernels = list(map(weakref.ref, kernels))
            self._packings += 1
        return self._packings

    def _factors_of(self, count: int) -> Tensor:
        if len(self._factors) < count:
            mixed = torch.arange(1, count + 1, device=self._device) * _ODD[0]
            mixed = (mixed ^ (mixed >> 31)) * _ODD[1]
            self._factors = (mixed ^ (mixed >> 29)) | 1
        return self._factors[:count]


class WeightsSeen:
    """Whether the weights were the same in all steps of one trace.

    Attributes:
        numbers: int64 ``[2]`` on the device: the number at the first step, and 0 for as long as it
            has been the same since. Never written to: those of several traces may be the same.
    """

    def __init__(self) -> None:
        self.numbers: Tensor | None = None

    def note(self, number: Tensor) -> None:
        """Takes note of a step's `WeightsFingerprint`; never waits for a GPU."""
        note_weights([self], number)


def note_weights(seen: Sequence[WeightsSeen], number: Tensor) -> None:
    """As `WeightsSeen.note` for several at once, in one go for all with the same past."""
    noted: dict[int, Tensor] = {}
    for each in seen:
        before = each.numbers
        if id(before) not in noted:
            if before is None:
                after = torch.stack([number, torch.zeros_like(number)])
            else:
                after = torch.stack([before[0], before[1] | (before[0] ^ number)])
            noted[id(before)] = after
        each.numbers = noted[id(before)]


def numbers_of(weights: WeightsSeen, adapter: WeightsSeen | None) -> Tensor | None:
    """As `WeightsSeen.numbers`, of a model and of the adapter that it is computed with, if any.

    None if one of them was not noted.
    """
    model = weights.numbers
    if model is None or adapter is None:
        return model
    if adapter.numbers is None:
        return None
    return torch.stack([model[0] ^ adapter.numbers[0], model[1] | adapter.numbers[1]])


def _modules_of(model: nn.Module) -> list[nn.Module]:
    """As ``nn.Module.modules`` in another order, in a third of its time."""
    found, waiting = {model: None}, [model]
    while waiting:
        for child in waiting.pop()._modules.values():
            if child is not None and child not in found:
                found[child] = None
                waiting.append(child)
    return list(found)


def _tensors_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Each parameter and buffer once, without a step of Python's interpreter for each."""
    held = chain.from_iterable(map(_HELD, modules))
    every = list(chain.from_iterable(map(dict.values, held)))
    once = dict(zip(map(id, every), every, strict=True))
    once.pop(id(None), None)
    return list(once.values())


_HELD = operator.attrgetter("_parameters", "_buffers")
_SHAPE = operator.attrgetter("shape", "dtype")
_base = torch._C.TensorBase

_Places = tuple[list[int], list[tuple[int, ...]], list[Any]]
"""Addresses, strides, and shapes and types of tensors."""


def _places_of(tensors: Sequence[Tensor]) -> _Places:
    return (
        list(map(_base.data_ptr, tensors)),
        list(map(_base.stride, tensors)),
        list(map(_SHAPE, tensors)),
    )


class _Table:
    """Tensors that launches read together, one for each width of words that occurs.

    Attributes:
        places: Of all tensors.
        others: Which of them launches cannot read.
    """

    def __init__(self, tensors: Sequence[Tensor], places: _Places, device: torch.device) -> None:
        from vllm_flashtrace.kernels.triton_piece_sums import WIDTHS, WordChunks

        self.places = places
        self.others: list[int] = []
        by_width: dict[int, list[tuple[int, int]]] = {}
        for index, tensor in enumerate(tensors):
            address, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
            if (
                tensor.device.type == device.type
                and _has_no_gaps(tensor)
                and address % _ALIGNMENT == 0
            ):
                width = next(width for width in WIDTHS if size % width == 0)
                by_width.setdefault(width, []).append((address, size // width))
            else:
                self.others.append(index)
        self._chunks = [WordChunks(words, device, width) for width, words in by_width.items()]
        # Each part begins at an address that kernels are compiled for.
        words = _ALIGNMENT // torch.int64.itemsize
        ends = list(accumulate(-(-chunks.pieces // words) * words for chunks in self._chunks))
        with torch.inference_mode(False):  # It is written to with and without.
            self._sums = torch.zeros(ends[-1] if ends else 1, dtype=torch.int64, device=device)
        self._parts = [
            self._sums[start : start + chunks.pieces]
            for start, chunks in zip([0, *ends], self._chunks, strict=False)
        ]

    def piece_sums(self) -> Tensor:
        """The sums of all pieces, int64, until they are asked for again."""
        for chunks, part in zip(self._chunks, self._parts, strict=True):
            chunks.piece_sums(part)
        return self._sums


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
