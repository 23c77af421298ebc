"""How the memory of a soak went on after its warm-up: slopes and a picture.

Invariant: only samples after the warm-up are judged; the picture shows all of them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROLES = {"server": "API server", "engine": "engine core", "worker": "worker"}
_LEAST_RANGE_MB = 100.0


@dataclass(frozen=True, slots=True)
class Slope:
    """A straight line through samples of memory.

    Attributes:
        per_100: MiB per 100 traces.
        stderr: Standard error of ``per_100``.
        intercept: MiB at no traces.
    """

    per_100: float
    stderr: float
    intercept: float


def slope(rows: Sequence[Mapping[str, float]], role: str, warm_up: int) -> Slope:
    """Least squares over the samples from ``warm_up`` traces on; at least three."""
    judged = [row for row in rows if row["traces"] >= warm_up]
    traces = [row["traces"] / 100 for row in judged]
    memory = [row[f"{role}_mb"] for row in judged]
    line = statistics.linear_regression(traces, memory)
    residuals = [m - line.intercept - line.slope * t for t, m in zip(traces, memory, strict=True)]
    mean = statistics.fmean(traces)
    spread = math.fsum((t - mean) ** 2 for t in traces)
    variance = math.fsum(r * r for r in residuals) / (len(judged) - 2)
    return Slope(line.slope, math.sqrt(variance / spread), line.intercept)


def draw(
    rows: Sequence[Mapping[str, float]], slopes: Mapping[str, Slope], warm_up: int, path: Path
) -> None:
    """Writes a PNG with one panel per process."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    traces = [row["traces"] for row in rows]
    figure, panels = pyplot.subplots(
        len(ROLES), 1, sharex=True, figsize=(7, 6), layout="constrained"
    )
    for panel, (role, name) in zip(panels, ROLES.items(), strict=True):
        memory = [row[f"{role}_mb"] for row in rows]
        fitted = slopes[role]
        judged = [warm_up, traces[-1]]
        panel.plot(traces, memory, ".-", markersize=4, linewidth=1, color="#3b6ea5")
        panel.plot(
            judged,
            [fitted.intercept + fitted.per_100 * t / 100 for t in judged],
            color="#c0392b",
            label=f"{fitted.per_100:+.2f} ± {fitted.stderr:.2f} MiB per 100 traces",
        )
        panel.axvspan(0, warm_up, color="0.93", zorder=0)
        middle = (max(memory) + min(memory)) / 2
        half = max(_LEAST_RANGE_MB, 1.2 * (max(memory) - min(memory))) / 2
        panel.set_ylim(middle - half, middle + half)
        panel.set_title(name, loc="left", fontsize=10)
        panel.set_ylabel("MiB resident")
        panel.legend(loc="lower right", frameon=False, fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("traced completions (warm-up shaded)")
    panels[-1].set_xlim(0, traces[-1])
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
