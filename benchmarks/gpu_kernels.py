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
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import plain

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
    if os.environ.pop("TRITON_INTERPRET", "0") == "1":
        print("TRITON_INTERPRET is ignored; --interpret runs on the CPU", file=sys.stderr)
    import torch

    if not options.interpret and not torch.cuda.is_available():
        print("no CUDA device; --interpret runs tiny shapes on the CPU", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.interpret else "cuda")
    from benchmarks.gpu_timing import triton_on

    result = _header(options, device)
    if not options.tune and not options.skip_correctness:
        result["correctness"] = _check(options, device)
    with triton_on(device):
        if options.tune:
            result["tiles"] = _tune(options, device)
        elif not options.skip_timings:
            result.update(_time(options, device))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    checked = result.get("correctness")
    return int(checked is not None and bool(checked["failed"] or checked["not_run"]))


def _header(options: argparse.Namespace, device: Any) -> dict[str, Any]:
    import torch
    import triton

    from benchmarks.gpu_timing import peak_of

    peak = peak_of(device)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "repeats": options.repeats,
        "peak": peak and peak._asdict(),
    }


def _check(options: argparse.Namespace, device: Any) -> dict[str, Any]:
    from rich.progress import Progress

    from benchmarks.gpu_cases import full_grid, small_grid
    from benchmarks.gpu_checks import run_checks

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


def _time(options: argparse.Namespace, device: Any) -> dict[str, Any]:
    """Timings until the time is up; ``complete`` says whether that was all."""
    import time

    from rich.progress import track

    from benchmarks import gpu_timing as sizes
    from benchmarks.gpu_timing import Bench

    bench = Bench.on(device, options.repeats)
    shapes, contexts, counts = sizes.SHAPES, sizes.CONTEXTS, sizes.ROWS
    if options.interpret:
        shapes, contexts, counts = sizes.TINY_SHAPES, sizes.TINY_CONTEXTS, sizes.TINY_ROWS
    deadline, rows, complete = time.perf_counter() + TIMING_SECONDS, [], True
    for row in track(bench.time_all(shapes, contexts, counts), "timings"):
        rows.append(row)
        if time.perf_counter() > deadline:
            complete = False
            break
    print(plain(rows))
    if not complete:
        print("The time was up before all shapes were timed.", file=sys.stderr)
    return {"timings": rows, "complete": complete}


def _tune(options: argparse.Namespace, device: Any) -> list[dict[str, Any]]:
    from rich.progress import track

    from benchmarks import gpu_timing as sizes
    from benchmarks.gpu_tune import tune

    layers, limit = [(sizes.SHAPES[0], 16384, 1024), (sizes.SHAPES[0], 65536, 32)], TUNE_SECONDS
    if options.interpret:
        layers, limit = [(sizes.TINY_SHAPES[0], 40, 4)], 4.0
    rows = list(track(tune(layers, device, options.repeats, limit), "tiles"))
    tiles = [{k: str(row[k]) for k in ("default", "best")} for row in rows]
    print(plain([{**row, **tile} for row, tile in zip(rows, tiles, strict=True)]))
    return rows


if __name__ == "__main__":
    sys.exit(main())
