"""What the kernels over attention need of a GPU, from their machine code."""

from __future__ import annotations

import pytest

from benchmarks import gpu_code, tables
from benchmarks.gpu_code import LAYERS, loops
from tests.kernels.interpreter import kernel_modules

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

kernel_modules()  # What is first imported while a test interprets kernels stays interpreted.


def test_column_sums_of_whole_steps_take_few_instructions() -> None:
    """A product, an exponential and two additions at least; three programs share a processor."""
    rows = gpu_code.take_apart(LAYERS[0])
    first, second = rows
    assert (first["kernel"], second["kernel"]) == ("log-sum-exps", "column sums")
    for row in rows:
        assert row["programs_at_once"] >= 3
        whole, masked = row["loops"]
        assert whole["weights_of_a_thread"] == masked["weights_of_a_thread"] == 64
        assert whole["from_stack"] == masked["from_stack"] == 0
    assert second["loops"][0]["instructions_per_weight"] <= 4.5
    assert second["loops"][1]["instructions_per_weight"] <= 11

    result = {"capability": 90, "triton": "", "date": "", "rows": [{"code": "now", **second}]}
    assert "| 8B | column sums | now | 168 |" in tables.gpu_code(result)


def test_loops_with_products_are_found() -> None:
    def line(number: int, text: str) -> str:
        return f"        /*{number * 16:04x}*/                   {text} ;"

    code = [
        line(0, "MOV R1, c[0x0][0x28]"),
        ".L_x_0:",  # Around the next, so not counted.
        ".L_x_1:",
        line(1, "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR32], RZ, !UPT"),
        line(2, "@!P0 LDL R2, [R1]"),
        line(3, "@P1 BRA `(.L_x_1)"),
        ".L_x_2:",  # Has no products.
        line(4, "FADD R2, R2, R3"),
        line(5, "@P2 BRA `(.L_x_2)"),
        line(6, "@P3 BRA `(.L_x_0)"),
    ]
    [found] = loops("\n".join(code), head_dim=16)
    assert found == {
        "weights_of_a_thread": 64,
        "instructions_per_weight": 0.05,
        "from_stack": 1,
        "kinds": {"HGMMA": 1, "LDL": 1, "BRA": 1},
    }
