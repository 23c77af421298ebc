"""The proximity kernels as GPUs would get them, compiled without one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernels.compiler import compiled_only
from tests.kernels.layers import make_layer, trace_of
from vllm_flashtrace.kernels.triton_piece_sums import WordChunks
from vllm_flashtrace.kernels.triton_proximity import triton_proximities

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

KERNELS = {
    "_norms_kernel",
    "_nearest_kernel",
    "_screen_kernel",
    "_complete_kernel",
    "_sum_heads_kernel",
    "_totals_kernel",
}
PRODUCTS = "_screen_kernel", "_complete_kernel"

LEAST_SHARED_MEMORY = 99 * 1024
"""Bytes that a program may have on every GPU from compute capability 8.0 on."""


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    """Nothing is interpreted here."""
    yield


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("values", "weight", "dim", "heads"),
    [
        (torch.bfloat16, torch.bfloat16, 128, {}),
        (torch.float8_e4m3fn, torch.bfloat16, 80, {}),
        (torch.float8_e5m2, torch.float32, 256, {}),
        (torch.bfloat16, torch.bfloat16, 128,
         {"groups": 3, "shared": 1, "block_size": 64, "layout": "HBND"}),
    ],
    ids=str,
)  # fmt: skip
def test_every_kernel_compiles(
    capability: int, values: torch.dtype, weight: torch.dtype, dim: int, heads: dict[str, Any]
) -> None:
    heads = {"shared": 2, **heads}
    layer = make_layer(values=values, weight=weight, dim=dim, tokens=20, **heads)
    with compiled_only(capability) as kernels:
        layer.proximities(triton_proximities)
    assert kernels.keys() == KERNELS
    for name, (kernel,) in kernels.items():
        assert kernel.metadata.shared <= LEAST_SHARED_MEMORY, name
        assert "cubin" in kernel.asm
    # Tensor cores take the products, float32 in three parts included.
    for name in PRODUCTS:
        assert "mma" in kernels[name][0].asm["ptx"], name


@pytest.mark.parametrize("aligned", [True, False])
def test_addresses_from_tables_are_read_from_in_wide_pieces(aligned: bool) -> None:
    """Values and weights, sixteen bytes at a time, unless they do not lie so."""
    layer = make_layer(
        values=torch.bfloat16, weight=torch.bfloat16, dim=128, shared=2, tokens=20, hidden=256
    )
    for name in () if aligned else ("value_cache", "weight"):
        tensor = getattr(layer, name)
        whole = torch.zeros(len(tensor.untyped_storage()) // 2 + 1, dtype=tensor.dtype)
        moved = whole[1:].as_strided(tensor.shape, tensor.stride())
        layer = replace(layer, **{name: moved})
    with compiled_only(90) as kernels:
        layer.proximities(triton_proximities)
    # Others load from scratch memory, which is aligned.
    readers = ["_norms_kernel", "_nearest_kernel", "_screen_kernel", "_complete_kernel"]
    for name in readers if aligned else ["_norms_kernel"]:
        ptx = kernels[name][0].asm["ptx"]
        wide = re.search(r"ld\.global\S*\.v4\.b32|cp\.async\.\S+ \[[^]]*\], \[[^]]*\], 0x10", ptx)
        assert bool(wide) == aligned, name


def test_one_compilation_serves_every_request() -> None:
    layer = make_layer(values=torch.bfloat16, weight=torch.bfloat16, shared=2, tokens=400)
    with compiled_only(90) as kernels:
        for tokens in (1, 7, 16, 256, 400):
            for first in range(3):  # rows of a block table are aligned anyhow
                request = replace(
                    layer,
                    column_sums=layer.column_sums[:, :tokens],
                    block_table=torch.zeros(40, dtype=torch.int32)[first:],
                    value_scale=1.0 + first,
                )
                traces = [trace_of([request, request], 0.5 * (first == 1))] * (1 + first)
                triton_proximities([request.layer(index) for index in range(1 + first % 2)], traces)
    assert kernels.keys() == KERNELS
    for name, compiled in kernels.items():
        assert len(compiled) >= 15
        assert len({kernel.hash for kernel in compiled}) == 1, name


@pytest.mark.parametrize("capability", [80, 90])
def test_piece_sums_keep_a_piece_in_registers(capability: int) -> None:
    weights = torch.zeros(5000, dtype=torch.int64)
    with compiled_only(capability) as kernels:
        WordChunks([(weights.data_ptr(), len(weights))], weights.device).piece_sums()
    [kernel] = kernels["_piece_sums_kernel"]
    assert ".local" not in kernel.asm["ptx"]
