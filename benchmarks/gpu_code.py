"""Machine code of the kernels over attention, without a GPU.

The kernels are compiled for NVIDIA's Hopper as they would be there, by the Triton and the assembler
that are installed, and their code is taken apart: registers, how many programs share a
multiprocessor, and the instructions of the loops in which matrix products are taken, per attention
weight. The first of them is that of whole steps, whose rows see all keys, the last has masks.
Nothing runs, so this says nothing about time.

    python -m benchmarks.gpu_code [--against FOLDER] [--json OUT]

`--against` takes another checkout of this repository apart as well.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.gpu_host import ROOT, import_from

CAPABILITY = 90
KERNELS = {"_lse_kernel": "log-sum-exps", "_column_sums_kernel": "column sums"}
LAYERS = (
    ("8B", 32, 8, 128, 4096),
    ("70B, TP 8", 8, 1, 128, 8192),
    ("1B", 32, 8, 64, 2048),
    ("Gemma 3 4B", 8, 4, 256, 2560),
)
"""As `gpu_timing.Shape`, which can't be imported before it is known which code is meant."""

_CONTEXT, _ROWS = 256, 200

# Of a multiprocessor of Hopper: registers, and bytes of shared memory, of which each program takes
# some more than it has asked for.
_REGISTERS, _SHARED, _SHARED_OF_ALL = 65536, 228 << 10, 1 << 10
_WARP = 32

# Threads that take a matrix product together, and its sizes.
_PRODUCT = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)|HMMA\.(16)(8)(16)")
_LABEL = re.compile(r"\s*(\.L_\w+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;")
_BRANCH = re.compile(r"BRA\b.*\((\.L_\w+)\)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Takes this checkout's kernels apart, and another's beside them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", type=Path, metavar="FOLDER")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--tree", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.tree:
        import_from(options.tree.resolve())
        print(json.dumps([row for layer in LAYERS for row in take_apart(layer)]))
        return 0
    trees = {"before": options.against} if options.against else {}
    result = compare(trees | {"now": ROOT})
    tables.emit(result, tables.gpu_code(result), options.json)
    return 0


def compare(trees: dict[str, Path]) -> dict[str, Any]:
    """What `take_apart` finds in each tree."""
    import triton

    rows = []
    for name, tree in trees.items():
        command = [sys.executable, "-m", __spec__.name, "--tree", str(tree.resolve())]
        output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        rows += [{"code": name, **row} for row in json.loads(output.stdout.splitlines()[-1])]
    version, date = triton.__version__, time.strftime("%Y-%m-%d")
    return {"capability": CAPABILITY, "triton": version, "date": date, "rows": rows}


def take_apart(
    sizes: tuple[str, int, int, int, int], capability: int = CAPABILITY
) -> list[dict[str, Any]]:
    """The code of both passes over attention in bfloat16.

    Args:
        sizes: Of the layer, see `LAYERS`.
        capability: Compute capability times ten of the GPU that it is compiled for.

    Returns:
        For each kernel its resources and, for each of its loops with matrix products, instructions
        of a thread per attention weight, in all and by kind.
    """
    import torch

    from benchmarks.gpu_timing import Layer, Shape, forms_on
    from tests.kernels.compiler import compiled_only

    shape, device = Shape(*sizes), torch.device("cpu")
    layer = Layer.draw(shape, _CONTEXT, _ROWS, device)
    with compiled_only(capability) as kernels:
        forms_on(device).column_sums(layer.inputs, 0)
    return [
        {"layer": shape.name, "kernel": KERNELS[name], **_resources(kernel)}
        | {"loops": loops(_tool("nvdisasm", kernel, "-c"), shape.head_dim)}
        for name in KERNELS
        for kernel in kernels[name]
    ]


def _resources(kernel: Any) -> dict[str, int]:
    usage = _tool("cuobjdump", kernel, "-res-usage")
    registers, stack = map(int, re.findall(r"(?:REG|STACK):(\d+)", usage))
    shared, threads = kernel.metadata.shared, kernel.metadata.num_warps * _WARP
    programs = min(
        _REGISTERS // (-(-registers // 8) * 8 * threads), _SHARED // (shared + _SHARED_OF_ALL)
    )
    return {
        "registers": registers,
        "stack_bytes": stack,
        "shared_bytes": shared,
        "programs_at_once": programs,
    }


def _tool(name: str, kernel: Any, *options: str) -> str:
    """Output of a program that Triton brings along, for a kernel's code."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(program), *options, file.name]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def loops(code: str, head_dim: int) -> list[dict[str, Any]]:
    """The innermost loops that take matrix products, in the order in which they stand.

    Args:
        code: As ``nvdisasm -c`` prints it.
        head_dim: Products that make one attention weight.
    """
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := _INSTRUCTION.search(line):
            instructions.append(instruction[1])
    spans = []
    for end, instruction in enumerate(instructions):
        branch = _BRANCH.match(instruction)
        if branch and labels.get(branch[1], end) < end:
            spans.append((labels[branch[1]], end))
    found = []
    for start, end in spans:
        inner = any(
            start <= other < last < end for other, last in spans if (other, last) != (start, end)
        )
        own = instructions[start : end + 1]
        weights = _products_of_a_thread(own) / head_dim
        if weights and not inner:
            kinds = Counter(instruction.split()[0].split(".")[0] for instruction in own)
            found.append(
                {
                    "weights_of_a_thread": weights,
                    "instructions_per_weight": round(len(own) / weights, 2),
                    "from_stack": kinds["LDL"] + kinds["STL"],
                    "kinds": dict(kinds.most_common()),
                }
            )
    return found


def _products_of_a_thread(instructions: Sequence[str]) -> float:
    products = 0.0
    for instruction in instructions:
        if match := _PRODUCT.match(instruction):
            sizes = [int(size) for size in match.groups() if size]
            threads = 4 * _WARP if instruction.startswith("HGMMA") else _WARP
            products += sizes[0] * sizes[1] * sizes[2] / threads
    return products


if __name__ == "__main__":
    sys.exit(main())
