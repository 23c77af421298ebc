"""Memory of the host that results are copied to behind a step, without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_flashtrace.base.errors import TraceError

HOST_BYTES = 1 << 30
"""Most memory that a worker's results may take on the host while they wait for pick-up."""

RESERVED_BYTES = HOST_BYTES // 4
"""Most of it that is taken at the start."""

_ALIGNMENT = 16
_PAGE = 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class HostCopy:
    """Tensors in one buffer of the host.

    Attributes:
        tensors: To be read once `arrived`.
        buffer: Goes back with `HostBuffers.give_back`.
        arrived: Tells, without waiting, whether the device has written all of them.
    """

    tensors: list[Tensor]
    buffer: Tensor
    arrived: Callable[[], bool]


def host_bytes(tokens: int, layers: int, heads: int = 0, hops: int = 1) -> int:
    """Host memory for the result of a trace of so many tokens, without scores per layer.

    Args:
        tokens: Its tokens.
        layers: Its layers.
        heads: Heads of a layer, where their mass is measured.
        hops: Hops of all its targets together, whose numbers are copied at once.
    """
    of_hop = (4 * tokens, 8 * layers, 8 * layers, 12 * layers * heads, 16)
    weights = 16
    return sum(_rounded(hops * size, _ALIGNMENT) for size in of_hop) + weights


class HostBuffers:
    """Memory of the host that results are copied to: page-locked where the device is a GPU.

    Page-locking stops the device, so a buffer is used again by later results, and is only freed
    when the bound leaves no room for a larger one.
    """

    def __init__(
        self, device: torch.device, evict: Callable[[], bool], limit_bytes: int = HOST_BYTES
    ) -> None:
        """Starts without a buffer.

        Args:
            device: Where results come from.
            evict: Gives back the buffer that has been taken for longest; False if none is.
            limit_bytes: Most bytes of all buffers together.
        """
        self._cuda = device.type == "cuda"
        self._evict = evict
        self._limit = limit_bytes
        self._free: list[Tensor] = []
        self._allocated = 0

    @property
    def allocated_bytes(self) -> int:
        """Size of all buffers, free or taken."""
        return self._allocated

    def reserve(self, count: int, nbytes: int) -> None:
        """Allocates buffers beforehand, as far as the bound lets it."""
        size = _rounded(nbytes, _PAGE)
        for _ in range(count):
            if self._allocated + size <= self._limit:
                self._free.append(self._allocate(size))

    def copy(self, tensors: Sequence[Tensor]) -> HostCopy:
        """Queues copies of tensors on the device; behind them is what `HostCopy.arrived` tells.

        Raises:
            TraceError: ``overloaded``: the buffers of other results leave no room.
        """
        starts, end = [], 0
        for tensor in tensors:
            starts.append(end)
            end += _rounded(tensor.nbytes, _ALIGNMENT)
        buffer = self._take(end)
        try:
            copies: list[Tensor] = []
            for tensor, start in zip(tensors, starts, strict=True):
                flat = buffer[start : start + tensor.nbytes].view(tensor.dtype)
                copies.append(flat.view(tensor.shape))
                # Row by row where rows lie apart: all at once would need a copy on the device.
                pairs = [(copies[-1], tensor)]
                if not tensor.is_contiguous():
                    pairs = list(zip(copies[-1], tensor, strict=True))
                for copy, source in pairs:
                    copy.copy_(source, non_blocking=True)
            return HostCopy(copies, buffer, self._mark())
        except BaseException:
            self._free.append(buffer)
            raise

    def give_back(self, copied: HostCopy) -> None:
        """Lets the next result have a copy's buffer; its tensors must not be read any more."""
        self._free.append(copied.buffer)

    def _take(self, nbytes: int) -> Tensor:
        while (buffer := self._found(nbytes)) is None:
            if not self._evict():
                raise TraceError(
                    "overloaded",
                    f"the trace's result of {nbytes} bytes has no room on the host, where all "
                    f"results together may take {self._limit} bytes",
                )
        return buffer

    def _found(self, nbytes: int) -> Tensor | None:
        """The smallest free buffer that will do, or a new one; None if there is no room for it."""
        size = _rounded(nbytes, _PAGE)
        best: tuple[int, int] | None = None
        for place, free in enumerate(self._free):
            has = free.nbytes
            if has >= size and (best is None or has < best[0]):
                best = has, place
                if has == size:
                    break
        if best is not None:
            return self._free.pop(best[1])
        if self._allocated - sum(free.nbytes for free in self._free) + size > self._limit:
            return None
        while self._allocated + size > self._limit:
            self._allocated -= self._free.pop().nbytes
        return self._allocate(size)

    def _allocate(self, size: int) -> Tensor:
        with torch.inference_mode(False):  # It is written to with and without.
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self._cuda)
        self._allocated += size
        return buffer

    def _mark(self) -> Callable[[], bool]:
        if not self._cuda:
            return _at_once
        event = torch.cuda.Event()
        event.record()
        return event.query


def _at_once() -> bool:
    return True


def _rounded(nbytes: int, unit: int) -> int:
    return -(-nbytes // unit) * unit
