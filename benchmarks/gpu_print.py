"""Tables of the kernel benchmark for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]

_WIDTH = 180
_COLUMNS = {
    "operation": "operation",
    "layer": "layer",
    "context": "context",
    "rows": "rows",
    "ms": "ms",
    "host_ms": "host ms",
    "floor_ms": "floor ms",
    "ratio_to_floor": "to floor",
    "exponentials_ms": "exponentials ms",
    "tflops": "TFLOP/s",
    "gbs": "GB/s",
    "ratio_to_torch": "to PyTorch",
    "backend": "backend",
    "far_share": "far pairs",
}


def print_checks(checked: Row) -> None:
    """What the comparison with float64 showed."""
    console = Console(width=_WIDTH)
    missing = checked["not_run"]
    passed = checked["cases"] - checked["failed"] - len(missing)
    console.print(
        f"{passed} of {checked['cases']} cases agree with float64, {checked['failed']} fail, "
        f"{len(missing)} were not run; {checked['seconds']:.0f} s"
    )
    for kind, errors in checked["errors"].items():
        listed = ", ".join(f"{kernel} {error:.1e}" for kernel, error in errors.items())
        console.print(f"largest relative errors, {kind}: {listed}")
    for failure in checked["failures"]:
        console.print(f"FAILED {failure['name']}", style="red", markup=False)
        for line in failure["failures"]:
            console.print(f"  {line}", markup=False)
    for name in missing:
        console.print(f"NOT RUN {name}", style="red", markup=False)


def print_timings(rows: Sequence[Row], complete: bool) -> None:
    """Every timing."""
    keys = [key for key in _COLUMNS if any(row.get(key) is not None for row in rows)]
    table = Table(title="Kernels of one layer, bfloat16, block size 16, last rows of the context")
    for key in keys:
        table.add_column(_COLUMNS[key], justify="left" if key == "operation" else "right")
    for row in rows:
        table.add_row(*(_cell(row.get(key)) for key in keys))
    console = Console(width=_WIDTH)
    console.print(table)
    if not complete:
        console.print("The time was up before all shapes were timed.", style="red")


def print_tiles(rows: Sequence[Row]) -> None:
    """The best tile that was found for each kernel and shape."""
    table = Table(title="Tiles")
    names = ("kernel", "layer", "context", "rows", "key", "in use", "ms", "best", "ms", "tried")
    for name in names:
        table.add_column(name)
    for row in rows:
        place = [str(row[key]) for key in ("kernel", "layer", "context", "rows", "key")]
        used, best = (tuple(row[key].values()) for key in ("default", "best"))
        tried = f"{row['tried']}{'' if row['complete'] else ', time was up'}"
        times = (f"{row[key]:.3f}" for key in ("default_ms", "best_ms"))
        table.add_row(*place, str(used), next(times), str(best), next(times), tried)
    Console(width=_WIDTH).print(table)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)
