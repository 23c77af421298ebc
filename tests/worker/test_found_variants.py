"""A launch that is repeated gets the variant that Triton would find, and the same arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, compute_cache_key

from tests.kernels.compiler import _AbsentGPU
from vllm_flashtrace.kernels import triton_operands
from vllm_flashtrace.kernels.triton_operands import compiling, launch

NUMBERS = (0, 1, 2, 15, 16, 17, 48, 2**31 - 16, 2**31 - 1, 2**31, 2**40, 2**63 - 1, 2**63)
MEMORY = torch.zeros(64, dtype=torch.uint8)
MEMORY = MEMORY[-MEMORY.data_ptr() % 16 :]
TENSORS = [
    MEMORY[start:][:16].view(dtype)
    for dtype in (torch.float32, torch.bfloat16, torch.int32, torch.int64, torch.uint8)
    for start in (0, 8, 16)
]


@triton.jit(do_not_specialize=["plain"])
def _kernel(tensor, number, plain, factor, TYPE: tl.constexpr, SIZE: tl.constexpr):
    tl.store(tensor, number + plain + factor)


class Compiled:
    """Stands in for a compiled kernel, and notes what it is launched with."""

    function, packed_metadata = 0, ()

    def __init__(self, key: str, seen: list[Any]) -> None:
        self.key, self.seen = key, seen

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, x: int, y: int, z: int, *rest: Any) -> None:
        self.seen.append((self.key, (x, y, z), rest[6:]))

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *arguments: self.run(*grid, *[None] * 6, *arguments)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What has been launched: Triton's key of the variant, the grid and all arguments."""
    launched: list[Any] = []

    def compiled(kernel: Any, key: str, _: Any, device: Any, *__: Any) -> Compiled:
        variant = kernel.device_caches[device][0][key] = Compiled(key, launched)
        return variant

    monkeypatch.setattr(JITFunction, "_do_compile", compiled)
    monkeypatch.setattr(triton_operands, "_launched", {})
    before = driver._active
    driver.set_active(_AbsentGPU(90))
    try:
        yield launched
    finally:
        driver._active = before
        _kernel.device_caches.clear()


def expected(arguments: tuple[Any, ...], constants: dict[str, Any]) -> str:
    """Triton's key of the variant for these arguments."""
    _, keys, _, _, binder = _kernel.device_caches[driver.active.get_current_device()]
    extra = {"debug": False, "instrumentation_mode": triton.knobs.compilation.instrumentation_mode}
    fpsan = getattr(triton.knobs.compilation, "fpsan_homomorphic_casts", None)
    if fpsan is not None:
        extra["fpsan_homomorphic_casts"] = fpsan
    _, specialization, options = binder(*arguments, **constants, **extra)
    key: str = compute_cache_key(keys, specialization, options)
    return key


def as_seen(values: tuple[Any, ...]) -> list[Any]:
    return [value.data_ptr() if isinstance(value, Tensor) else value for value in values]


def test_every_repetition_finds_the_variant_that_triton_finds(seen: list[Any]) -> None:
    """In any order, with numbers and addresses of every kind and other constants."""
    calls = [
        ((tensor, number, plain, 0.5), {"TYPE": kind, "SIZE": size, "num_warps": 4})
        for tensor in TENSORS
        for number, plain in zip(NUMBERS, reversed(NUMBERS), strict=True)
        for kind, size in ((tl.float32, 16), (tl.bfloat16, 1))
    ]
    for arguments, constants in [*calls, *reversed(calls)]:
        launch(_kernel, (3, 2), *arguments, **constants)
        key, grid, given = seen[-1]
        assert key == expected(arguments, constants)
        assert grid == (3, 2, 1)
        last = (constants["TYPE"], constants["SIZE"])
        assert as_seen(given) == as_seen((*arguments, *last))
    assert len(seen) == 2 * len(calls)
    assert len(triton_operands._launched) < len(calls)  # Many are alike.


def test_constants_of_another_launch_are_another_variant(seen: list[Any]) -> None:
    arguments = (TENSORS[0], 16, 16, 1.0)
    for warps in (4, 8, 4):
        launch(_kernel, (1,), *arguments, TYPE=tl.float32, SIZE=16, num_warps=warps)
    assert seen[0][0] == seen[2][0] != seen[1][0]


def test_nothing_is_launched_while_compiling(seen: list[Any]) -> None:
    arguments, constants = (TENSORS[0], 16, 16, 1.0), {"TYPE": tl.float32, "SIZE": 16}
    launch(_kernel, (1,), *arguments, **constants)
    with compiling() as compilation:
        launch(_kernel, (1,), *arguments, **constants)
    assert len(seen) == 1 and not compilation.failures
