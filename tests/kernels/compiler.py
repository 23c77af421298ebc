"""Triton kernels compiled for GPUs that are not there.

Invariant: host code runs as it is, with tensors on the CPU; only the launch is left out. What a GPU
would be given, down to the machine code of the assembler that Triton ships, exists after
`compiled_only`; `variants_only` only tells what would be compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, compute_cache_key

import vllm_flashtrace


class _AbsentGPU:
    """What `JITFunction.run` asks of a driver before it launches."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return f"absent {self._target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def compiled_only(capability: int) -> Iterator[dict[str, list[CompiledKernel]]]:
    """Compiles every launch of the block for an NVIDIA GPU instead of running it.

    Args:
        capability: Compute capability times ten: 80 for an A100, 90 for an H100.

    Yields:
        The kernels by the names of their functions, filled as they are launched; results of the
        host code are meaningless.
    """
    kernels: dict[str, list[CompiledKernel]] = {}
    stock_run = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = stock_run(self, *args, grid=grid, warmup=True, **kwargs)
        kernels.setdefault(self.__name__, []).append(kernel)
        return kernel

    with _run_as(run, capability):
        yield kernels


Variant = tuple[str, str]
"""A kernel's name, and what Triton tells its variants apart by: types, constants, alignments."""


@dataclass
class Variants:
    """The variants of our kernels that were warmed up, and those that launches needed."""

    warmed: set[Variant] = field(default_factory=set)
    launched: set[Variant] = field(default_factory=set)

    def missing(self) -> set[Variant]:
        return self.launched - self.warmed


@contextmanager
def variants_only(capability: int = 90) -> Iterator[Variants]:
    """Tells which variants the launches of the block would need; nothing is compiled or run."""
    found = Variants()

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Variant:
        assert self.module.startswith(vllm_flashtrace.__name__), self.module
        _, keys, _, _, binder = self.device_caches[driver.active.get_current_device()]
        _, specialization, options = binder(*args, **kwargs)
        variant = (self.__name__, compute_cache_key(keys, specialization, options))
        (found.warmed if warmup else found.launched).add(variant)
        return variant

    with _run_as(run, capability):
        yield found


@contextmanager
def _run_as(run: Any, capability: int) -> Iterator[None]:
    before = driver._active
    driver.set_active(_AbsentGPU(capability))
    try:
        with patch.object(JITFunction, "run", run):
            yield
    finally:
        driver._active = before
