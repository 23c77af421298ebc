"""The Triton kernels on a GPU: right, and how fast.

    python -m benchmarks.gpu_kernels --json benchmarks/results/gpu_kernels.json

1. Every kernel against float64 over types, head sizes, layouts, windows, caps, sinks, slopes and
   shapes of batches; relative errors up to 1e-3, in float32 up to 1e-5. Exits 1 if anything fails.
2. Times of each kernel for one layer of models in use: on the device (CUDA events, median of
   ``--repeats`` calls, the L2 cache overwritten before each), and until the host may go on. Beside
   the floor, which is the longer of all products at the device's best rate and all memory read or
   written once, and beside PyTorch's own attention over contiguous keys and values.

``--tune`` instead looks for faster tiles. Needs torch, triton and this package, not vLLM. Takes up
to 8 minutes on an H100, most of it compilation, which ``--jobs`` processes share; every part has a
time limit. ``--interpret`` runs a few tiny shapes in Triton's interpreter on the CPU, which shows
that the script works and times nothing of interest.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from rich.progress import Progress, track

from benchmarks import gpu_timing as sizes
from benchmarks.gpu_cases import full_grid, small_grid
from benchmarks.gpu_checks import run_checks
from benchmarks.gpu_tune import tune
from benchmarks.tables import emit, plain

CORRECTNESS_SECONDS = 240.0
TIMING_SECONDS = 150.0
TUNE_SECONDS = 400.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts that were asked for; 1 if a check failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where to write results")
    parser.add_argument("--tune", action="store_true", help="look for faster tiles, nothing else")
    parser.add_argument("--skip-correctness", action="store_true")
    parser.add_argument("--skip-timings", action="store_true")
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of each kernel")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument(
        "--interpret", "--dry-run", action="store_true", help="tiny shapes on the CPU"
    )
    options = parser.parse_args(arguments)
    if not options.interpret and not torch.cuda.is_available():
        print("no CUDA device; --interpret runs tiny shapes on the CPU", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.interpret else "cuda")
    peak = sizes.peak_of(device)
    result: dict[str, Any] = {
        "device": "interpreter" if options.interpret else torch.cuda.get_device_name(device),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "repeats": options.repeats,
        "peak": peak and peak._asdict(),
    }
    checked = None
    if not options.tune and not options.skip_correctness:
        checked = result["correctness"] = check(options, device)
    text = ""
    with sizes.triton_on(device):
        if options.tune:
            layers = [(sizes.SHAPES[0], 16384, 1024), (sizes.SHAPES[0], 65536, 32)]
            tiny = [(sizes.TINY_SHAPES[0], 40, 4)]
            found = (
                tune(tiny, device, options.repeats, 4.0)
                if options.interpret
                else tune(layers, device, options.repeats, TUNE_SECONDS)
            )
            rows = result["tiles"] = list(track(found, "tiles"))
            text = plain([{k: v if k == "key" else str(v) for k, v in row.items()} for row in rows])
        elif not options.skip_timings:
            result.update(time_all(options, device))
            text = plain(result["timings"])
    emit(result, text, options.json)
    return int(checked is not None and bool(checked["failed"] or checked["not_run"]))


def check(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Compares the kernels with float64 and prints what was wrong."""
    cases = small_grid() if options.interpret else full_grid()
    with Progress() as progress:
        bar = progress.add_task("cases against float64", total=len(cases))
        checked = run_checks(
            cases, device.type, options.jobs, CORRECTNESS_SECONDS, lambda: progress.advance(bar)
        )
    missing = checked["not_run"]
    passed = checked["cases"] - checked["failed"] - len(missing)
    print(
        f"{passed} of {checked['cases']} cases agree with float64, {checked['failed']} fail, "
        f"{len(missing)} were not run; {checked['seconds']:.0f} s"
    )
    for kind, errors in checked["errors"].items():
        listed = ", ".join(f"{kernel} {error:.1e}" for kernel, error in errors.items())
        print(f"largest relative errors, {kind}: {listed}")
    for failure in checked["failures"]:
        print("\n  ".join([f"FAILED {failure['name']}", *failure["failures"]]))
    for name in missing:
        print(f"NOT RUN {name}")
    return checked


def time_all(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Timings until the time is up; ``complete`` says whether that was all."""
    grid = (sizes.SHAPES, sizes.CONTEXTS, sizes.ROWS)
    if options.interpret:
        grid = (sizes.TINY_SHAPES, sizes.TINY_CONTEXTS, sizes.TINY_ROWS)
    deadline, rows = time.perf_counter() + TIMING_SECONDS, []
    for row in track(sizes.Bench(device, options.repeats).time_all(*grid), "timings"):
        rows.append(row)
        if time.perf_counter() > deadline:
            print("The time was up before all shapes were timed.", file=sys.stderr)
            return {"timings": rows, "complete": False}
    return {"timings": rows, "complete": True}


if __name__ == "__main__":
    sys.exit(main())
