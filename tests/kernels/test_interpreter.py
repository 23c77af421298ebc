"""The interpreter as these tests use it: right for the types in question, and gone afterwards."""

from __future__ import annotations

import os

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from tests.kernels.attention import Shape, make_case
from tests.kernels.interpreter import interpreted, kernel_modules
from tests.kernels.paged import DEVICE
from vllm_flashtrace.kernels import AttentionForm
from vllm_flashtrace.kernels.triton_lse import triton_lse
from vllm_flashtrace.kernels.triton_operands import widen


@triton.jit
def _widen_kernel(stored, result, EIGHT_BIT: tl.constexpr):
    places = tl.arange(0, 256)
    tl.store(result + places, widen(tl.load(stored + places), EIGHT_BIT).to(tl.float32))


@triton.jit
def _product_kernel(left, right, result):
    places = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    product = tl.dot(tl.load(left + places), tl.load(right + places))
    tl.store(result + places, product)


@pytest.mark.parametrize(
    ("name", "dtype"), [("e4m3fn", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)]
)
def test_every_eight_bit_number_is_widened_exactly(name: str, dtype: torch.dtype) -> None:
    stored = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    ours = torch.empty(256, device=DEVICE)
    _widen_kernel[(1,)](stored, ours, EIGHT_BIT=name)
    exact = stored.view(dtype).float()
    torch.testing.assert_close(ours, exact, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(ours.signbit() | ours.isnan(), exact.signbit() | exact.isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_narrow_types_are_exact(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randint(-9, 9, (2, 16, 16), generator=generator).to(dtype).to(DEVICE)
    result = torch.empty(16, 16, device=DEVICE)
    _product_kernel[(1,)](left, right, result)
    assert torch.equal(result, (left.double() @ right.double()).float())


def test_a_block_leaves_no_trace(interpreter: None) -> None:
    library = [tl.sum, tl.cumsum, tl.argmin, tl.tensor.sum]
    environment = dict(os.environ)
    kernels = [vars(module).copy() for module in kernel_modules()]
    with interpreted():
        pass
    assert [tl.sum, tl.cumsum, tl.argmin, tl.tensor.sum] == library
    assert [vars(module) for module in kernel_modules()] == kernels
    assert dict(os.environ) == environment


@pytest.mark.skipif(DEVICE != "cpu", reason="nothing is interpreted where there is a GPU")
def test_kernels_are_interpreted_here() -> None:
    for module in kernel_modules():
        functions = [m for m in vars(module).values() if isinstance(m, JITFunction)]
        assert not functions, module.__name__


def test_the_compiler_works_after_nested_calls_were_interpreted() -> None:
    """By itself Triton's interpreter leaves `triton.language.core` changed by such calls."""
    places = (tl, tl.core, tl.math, tl.standard, tl.tensor, tl.dtype)
    before = [dict(vars(place)) for place in places]
    case = make_case(Shape(dim=64), [[1, 2]])
    with interpreted():
        triton_lse(case.inputs(AttentionForm(0.1)))
    for place, members in zip(places, before, strict=True):
        changed = [name for name, value in members.items() if vars(place).get(name) is not value]
        assert not changed
