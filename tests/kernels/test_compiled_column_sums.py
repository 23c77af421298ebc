"""The kernels over attention and the stream as GPUs would get them, compiled without one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.kernels.attention import HIDDEN, Case, Shape, make_case
from tests.kernels.compiler import compiled_only
from tests.kernels.test_compiled_proximity import LEAST_SHARED_MEMORY
from vllm_flashtrace.kernels import AttentionForm
from vllm_flashtrace.kernels.triton_column_sums import triton_column_sums
from vllm_flashtrace.kernels.triton_row_sums import triton_inverse_rms, triton_row_sums

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

KERNELS = {
    "_lse_kernel",
    "_offsets_kernel",
    "_column_sums_kernel",
    "_add_parts_kernel",
    "_row_sums_kernel",
    "_inverse_rms_kernel",
}
PRODUCTS = "_lse_kernel", "_column_sums_kernel"


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    """Nothing is interpreted here."""
    yield


def launch(case: Case, form: AttentionForm, layer: int = 0) -> None:
    inputs = case.inputs(form)
    scales = torch.ones(-(-len(case.rows) // 4) * 4)[: len(case.rows)]
    triton_column_sums(replace(inputs, scales=scales), layer)
    lse = torch.zeros(case.rows.num_heads, len(case.query))
    triton_column_sums(replace(inputs, scales=scales, lse=lse), layer)
    stream = torch.zeros(len(case.query), HIDDEN, dtype=torch.bfloat16)
    triton_row_sums(case.rows, layer, residual=stream, stream=stream)
    triton_inverse_rms(case.rows, stream, 1e-6, scales)
    triton_row_sums(case.rows, layer, stream=stream, scales=scales)


CASES = [
    (Shape(groups=1, shared=4, dim=128, dtype=torch.bfloat16), {}),
    (Shape(groups=1, shared=5, dim=128, dtype=torch.bfloat16), {"chunk_size": 64}),
    (Shape(groups=1, shared=7, dim=80, dtype=torch.float8_e4m3fn, query_dtype=torch.bfloat16),
     {"sliding_window": 9, "soft_cap": 2.0}),
    (Shape(groups=1, shared=1, dim=256, dtype=torch.float16), {"sinks": torch.zeros(1)}),
    (Shape(groups=1, shared=2, dim=64, dtype=torch.float32), {"alibi_slopes": torch.zeros(2)}),
    (Shape(groups=3, shared=1, dim=192, block_size=64, dtype=torch.bfloat16, heads_first=True), {}),
]  # fmt: skip
# For which they are compiled always; for the other one in the long runs.
CAPABILITIES = [(80, 90), (90,), (90,), (80,), (80,), (80, 90)]


@pytest.mark.parametrize(
    ("shape", "features", "capability"),
    [
        pytest.param(*case, target, marks=[] if target in always else pytest.mark.long, id=None)
        for case, always in zip(CASES, CAPABILITIES, strict=True)
        for target in (80, 90)
    ],
    ids=str,
)
def test_every_kernel_compiles(capability: int, shape: Shape, features) -> None:
    case = make_case(shape, [[*range(200)], [3]])
    with compiled_only(capability) as kernels:
        launch(case, AttentionForm(0.1, **features))
    assert kernels.keys() == KERNELS
    for name, compiled in kernels.items():
        for kernel in compiled:
            assert kernel.metadata.shared <= LEAST_SHARED_MEMORY, name
            assert "cubin" in kernel.asm
    if shape.dtype != torch.float32:  # whose products no tensor core takes without loss
        for name in PRODUCTS:
            assert "mma" in kernels[name][0].asm["ptx"], name


def test_one_compilation_serves_every_step() -> None:
    """Steps of many rows and long contexts, of any number of traces, and all layers."""
    shape = Shape(groups=1, shared=4, dim=128, dtype=torch.bfloat16)
    form = AttentionForm(0.1)
    steps = [[[*range(200)]], [[*range(64, 300)], [7]], [[*range(70)], [3, 5], [*range(16, 33)]]]
    with compiled_only(90) as kernels:
        for layer, positions in enumerate(steps):
            launch(make_case(shape, positions), form, layer)
    for name in PRODUCTS:
        # The sums are computed twice, the log-sum-exp is told once.
        assert len(kernels[name]) == len(steps) * (1 + (name == "_column_sums_kernel"))
        assert len({kernel.hash for kernel in kernels[name]}) == 1, name
