"""Figures of the results.

Invariant: they are drawn from the JSON file alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.faithfulness.options import EXPENSIVE, HEADLINE
from benchmarks.faithfulness.summary import POOLED

Result = dict[str, Any]

_ON_CHAIN = {"k0": "-", "k1": "--", "auto": ":"}
_COLORS = ("C0", "C1", "C2", "C3", "C4", "C5")


def draw(result: Result, folder: Path) -> list[Path]:
    """Writes the figures as PNG and returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Callable[[Result, Any], None]] = {
        "reasoning-mass": reasoning_mass,
        "quality-cost": quality_cost,
        "recovery": recovery_by_task,
    }
    paths = []
    for name, paint in figures.items():
        figure = pyplot.figure(figsize=(9, 5), layout="constrained")
        paint(result, figure)
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        paths.append(path)
    return paths


def reasoning_mass(result: Result, figure: Any) -> None:
    """By tokens of reasoning. Left: mass left on it, as the paper's Figure 1. Right: recovery.

    Left at the shortest context length, right at the longest with as many examples.
    """
    counts: dict[int, int] = {}
    for chain in result["chains"]:
        counts[chain["length"]] = counts.get(chain["length"], 0) + chain["n"]
    full = sorted(length for length, n in counts.items() if n == max(counts.values()))
    left, right = figure.subplots(1, 2)
    for axes, metric, lengths in (
        (left, "remaining_mass", full[:1]),
        (right, "recovery", full[-1:]),
    ):
        chains = [chain for chain in result["chains"] if chain["length"] in lengths]
        for task, color in zip(dict.fromkeys(c["task"] for c in chains), _COLORS, strict=False):
            for hops, style in _ON_CHAIN.items():
                points = sorted(
                    (chain["reasoning_tokens"], chain[metric][hops])
                    for chain in chains
                    if chain["task"] == task and hops in chain[metric]
                )
                if points:
                    label = f"{task}, hops {hops.removeprefix('k')}"
                    line = {"color": color, "linestyle": style, "marker": ".", "label": label}
                    axes.plot(*zip(*points, strict=True), **line)
        axes.set(xlabel="tokens of reasoning", ylim=(0, 1), title=_context(lengths))
    left.set(ylabel="mass left on reasoning")
    right.set(ylabel="recovery at 10 %")
    _legends(left, right)


def quality_cost(result: Result, figure: Any) -> None:
    """Recovery against seconds; methods that none beats in both are joined."""
    methods = result["groups"][0]["methods"]
    points = [
        (row["seconds"], row["recovery"][0], name)
        for name, row in methods.items()
        if "recovery" in row and row.get("seconds", 0) > 0
    ]
    axes = figure.subplots()
    for seconds, quality, name in points:
        axes.scatter(seconds, quality, color=_color(name))
        if name in HEADLINE or name in EXPENSIVE:  # names of close variants would cover each other
            axes.annotate(name, (seconds, quality), (3, 3), textcoords="offset points", fontsize=7)
    front = pareto([(seconds, quality) for seconds, quality, _ in points])
    if front:
        axes.step(*zip(*front, strict=True), where="post", color="0.6", linewidth=1)
    axes.set(xscale="log", xlabel="seconds for one example (median)", ylabel="recovery at 10 %")


def recovery_by_task(result: Result, figure: Any) -> None:
    """Bars with intervals, by method and task; of the headline methods, if any ran."""
    groups = [group for group in result["groups"] if group["task"] != POOLED and group["length"]]
    shortest = min((group["length"] for group in groups), default=0)
    groups = [group for group in groups if group["length"] == shortest]
    found = dict.fromkeys(m for group in groups for m in group["methods"])
    methods = [name for name in found if name in HEADLINE] or list(found)
    axes = figure.subplots()
    width = 0.8 / max(1, len(groups))
    for i, group in enumerate(groups):
        values = [
            (place, group["methods"][method]["recovery"])
            for place, method in enumerate(methods)
            if "recovery" in group["methods"].get(method, {})
        ]
        means = [value[0] for _, value in values]
        errors = [
            [max(0.0, value[0] - value[1]) for _, value in values],
            [max(0.0, value[2] - value[0]) for _, value in values],
        ]
        places = [place + i * width for place, _ in values]
        axes.bar(places, means, width, yerr=errors, label=group["task"], error_kw={"lw": 0.7})
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(methods))], methods)
    axes.tick_params(axis="x", labelrotation=70, labelsize=7)
    axes.set(ylabel="recovery at 10 %", ylim=(0, 1))
    _legends(axes)


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points than which no other is both cheaper and better, by cost."""
    front: list[tuple[float, float]] = []
    for cost, quality in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or quality > front[-1][1]:
            front.append((cost, quality))
    return front


def _context(lengths: list[int]) -> str:
    return f"{lengths[0]:,}-token contexts" if lengths else ""


def _color(method: str) -> str:
    ours = method.startswith("flashtrace-") and method != "flashtrace-package"
    return "C0" if ours else "C1"


def _legends(*all_axes: Any) -> None:
    for axes in all_axes:
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
