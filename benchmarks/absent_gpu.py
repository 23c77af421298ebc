"""A CUDA device that is not there: the host's code for a GPU runs as it is, and computes nothing.

Within `absent_gpu`, tensors on PyTorch's ``meta`` device say that they are on CUDA device 0. They
have shapes, strides and types but no memory, so an operation on them costs what the host pays for
it and no more: whatever reads a number of theirs, as a synchronisation would, raises an exception.
Triton's own Python code runs up to the launcher, which counts. What stands in for a kernel of CUDA
and for the launcher, which are code of C++, takes less time than they do.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

CAPABILITY = 90
_TRITON_DEVICE = "absent GPU"
_LAUNCHES = "vllm_flashtrace.kernels.triton_operands"
MEMORY = 140 << 30

# What only describes memory that is there.
_VIEWS = {
    "alias", "as_strided", "detach", "expand", "permute", "resolve_conj", "resolve_neg", "select",
    "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unflatten",
    "unsqueeze", "view", "view_as", "_reshape_alias", "_unsafe_view", "lift_fresh",
}  # fmt: skip
_ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided")


class AbsentDevice(str):
    """What PyTorch takes for its ``meta`` device, and everybody else for one of CUDA."""

    __slots__ = ()
    type, index = "cuda", 0


DEVICE: Any = AbsentDevice("meta")


@contextmanager
def absent_gpu() -> Iterator[Counter[str]]:
    """Pretends within the block.

    Yields:
        Counts of what went to the device beside PyTorch's operations: Triton's launches by kernel,
        ``copy from the device``, ``copy that waits``, ``page-locked``, ``event``, ``wait``.
    """
    counts: Counter[str] = Counter()
    kernels: list[Any] = []
    base = torch._C.TensorBase
    stock_device, stock_is_meta = base.device.__get__, base.is_meta.__get__
    stock_empty, stock_copy = torch.empty, base.copy_

    def device(tensor: Tensor) -> Any:
        return DEVICE if stock_is_meta(tensor) else stock_device(tensor)

    def empty(*sizes: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        counts["page-locked"] += pin_memory
        return stock_empty(*sizes, **options)

    def copy_(tensor: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if not stock_is_meta(source) or stock_is_meta(tensor):
            return stock_copy(tensor, source, non_blocking)
        counts["copy from the device" if non_blocking else "copy that waits"] += 1
        return tensor

    def compiled(kernel: Any, key: Any, _: Any, device: Any, *__: Any) -> Any:
        kernels.append(kernel)
        cache = kernel.device_caches[device][0]
        cache[key] = _Launcher(kernel.__name__, counts)
        return cache[key]

    class Event:
        def __init__(self, **_: Any) -> None:
            counts["event"] += 1

        def record(self, *_: Any) -> None:
            pass

        def query(self) -> bool:
            return True

        def elapsed_time(self, _: Any) -> float:
            return 0.0

        def synchronize(self) -> None:
            counts["wait"] += 1

    def wait(*_: Any) -> None:
        counts["wait"] += 1

    before = driver._active
    driver.set_active(_Driver())
    try:
        with ExitStack() as stack:

            def replace(place: Any, name: str, value: Any) -> None:
                stack.enter_context(patch.object(place, name, value, create=True))

            replace(Tensor, "device", property(device))
            replace(Tensor, "is_cuda", property(stock_is_meta))
            replace(Tensor, "is_meta", property(lambda tensor: False))
            replace(Tensor, "copy_", copy_)
            replace(torch, "empty", empty)
            replace(JITFunction, "_do_compile", compiled)
            replace(torch.cuda, "Event", Event)
            replace(torch.cuda, "synchronize", wait)
            replace(torch.cuda, "mem_get_info", lambda *_: (MEMORY, MEMORY))
            replace(torch.cuda, "memory_snapshot", list)
            for name in ("_exchange_device", "_maybe_exchange_device"):
                replace(torch.cuda, name, lambda index: index)
            yield counts
    finally:
        driver._active = before
        for kernel in kernels:  # Whoever comes next has launchers of its own.
            kernel.device_caches.pop(_TRITON_DEVICE, None)
        launched = vars(sys.modules.get(_LAUNCHES, sys)).get("_launched", {})
        for key in [key for key in launched if _TRITON_DEVICE in key]:
            del launched[key]


_empty = torch.empty


def _like(tensor: Tensor, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
    return _empty(sizes, dtype=dtype or tensor.dtype, device="meta")


def _both(one: Tensor, other: Any, alpha: float = 1) -> Tensor:
    if not isinstance(other, Tensor) or one.shape == other.shape:
        return _like(one, *one.shape)
    sizes = zip_longest(reversed(one.shape), reversed(other.shape), fillvalue=1)
    return _like(one, *reversed([max(pair) for pair in sizes]))


def _joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    before, after = parts[0].shape[:dim], parts[0].shape[dim + 1 :]
    return _like(parts[0], *before, sum(part.shape[dim] for part in parts), *after)


_STAND_INS: dict[str, Callable[..., Any]] = {
    "add.Tensor": _both,
    "mul.Tensor": _both,
    "bitwise_xor.Tensor": _both,
    "bitwise_or.Tensor": _both,
    "bitwise_or_.Tensor": lambda one, other: one,
    "index_select": lambda one, dim, index: _like(
        one, *one.shape[:dim], len(index), *one.shape[dim + 1 :]
    ),
    "index_select.out": lambda one, dim, index, *, out: out,
    "cat": _joined,
    "stack": lambda parts, dim=0: _like(
        parts[0], *parts[0].shape[:dim], len(parts), *parts[0].shape[dim:]
    ),
    "sum": lambda one, *, dtype=None: _like(one, dtype=dtype),
    "zeros_like": lambda one, **_: _like(one, *one.shape),
    "_foreach_add_.List": lambda ones, others, alpha=1: None,
}


@contextmanager
def cheap_operations() -> Iterator[None]:
    """Operations whose shapes PyTorch finds on the ``meta`` device by code of Python.

    That takes many times what a launch on a real device does; within the block they take about as
    long, and results have the right shapes.
    """
    library = torch.library.Library("aten", "IMPL")
    for name, stand_in in _STAND_INS.items():
        library.impl(name, stand_in, "Meta", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


class _Driver:
    """What `JITFunction.run` asks of a driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> str:
        return _TRITON_DEVICE

    def get_current_stream(self, _: str) -> int:
        return 0


class _Launcher:
    """Stands in for a compiled kernel."""

    function, packed_metadata = 0, ()

    def __init__(self, name: str, counts: Counter[str]) -> None:
        self.name, self._counts = name, counts
        self.metadata = SimpleNamespace(name=name)

    def __getitem__(self, _: Any) -> Callable[..., None]:
        return self.run

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *_: Any) -> None:
        self._counts[self.name] += 1


class CountedOperations(TorchDispatchMode):
    """Counts PyTorch's operations on the absent device, within a ``with`` block.

    Attributes:
        launches: Operations that launch a kernel or a copy there, by name.
        allocations: Tensors that got memory there, by name of the operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.allocations: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        outputs = result if isinstance(result, list | tuple) else (result,)
        if not any(isinstance(one, Tensor) and one.is_cuda for one in (*outputs, *args)):
            return result
        if name in _VIEWS:
            return result
        if name not in _ALLOCATIONS:
            self.launches[name] += 1
        given = {id(one) for one in (*args, *(kwargs or {}).values())}
        if any(isinstance(one, Tensor) and id(one) not in given for one in outputs):
            self.allocations[name] += 1
        return result


def count_of(call: Callable[[], Any], counts: Counter[str]) -> dict[str, Any]:
    """What a call within `absent_gpu` asks of the device.

    Args:
        call: To be called once.
        counts: As `absent_gpu` yields them.

    Returns:
        ``launches`` by name, numbers of ``allocations`` there and of ``page_locked`` ones here, and
        ``waits`` for the device.
    """
    before = counts.copy()
    with CountedOperations() as operations:
        call()
    own = counts - before
    other = {name: own.pop(name, 0) for name in ("page-locked", "event", "wait")}
    waits = other["wait"] + own.pop("copy that waits", 0)
    return {
        "launches": dict(own + operations.launches),
        "allocations": operations.allocations.total(),
        "page_locked": other["page-locked"],
        "events": other["event"],
        "waits": waits,
    }
