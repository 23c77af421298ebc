"""Triton kernels compiled for GPUs that are not there.

Invariant: host code runs as it is, with tensors on the CPU; only the launch is left out. What a GPU
would be given, down to the machine code of the assembler that Triton ships, exists afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction


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

    before = driver._active
    driver.set_active(_AbsentGPU(capability))
    try:
        with patch.object(JITFunction, "run", run):
            yield kernels
    finally:
        driver._active = before
