"""Three panels of `benchmarks.scaling`: cost against context, reasoning and concurrency."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LINES = {
    "seconds": ("attribution", "#b3261e", "o-"),
    "floor_seconds": ("floor", "#555555", "s--"),
    "uncached_prefill_seconds": ("prefill of the context", "#9a9a9a", "^:"),
    "recording_seconds": ("recording", "#1f6fb4", "v-"),
    "proximity_seconds": ("proximity", "#2e8b57", "D-"),
}
PANELS = {
    "context": "tokens of context",
    "reasoning": "tokens of reasoning",
    "concurrency": "attributions at once",
}


def plot(result: dict[str, Any], path: Path) -> None:
    """Draws the measurement; the legend gives fitted exponents."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(11, 3.9), dpi=160, sharey=True)
    for axes, (name, label) in zip(panels, PANELS.items(), strict=True):
        sweep = result[name]
        x = [row[sweep["variable"]] for row in sweep["rows"]]
        for column, (text, colour, style) in LINES.items():
            if column not in sweep["rows"][0]:
                continue
            y = [row[column] for row in sweep["rows"]]
            slope = sweep["exponents"].get(column)
            legend = text if slope is None else f"{text}, exponent {slope:.2f}"
            axes.plot(x, y, style, color=colour, label=legend, markersize=4, linewidth=1.5)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(x)
        axes.minorticks_off()
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel(label, fontsize=11)
        axes.tick_params(labelsize=10)
        axes.grid(True, which="major", alpha=0.3)
        axes.legend(fontsize=8, loc="upper left", framealpha=0.9)
    low, high = panels[0].get_ylim()
    panels[0].set_ylim(low, high * 12)  # room for the legends
    panels[0].set_ylabel("seconds", fontsize=11)
    figure.suptitle(title(result["settings"]), fontsize=12)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def title(settings: dict[str, Any]) -> str:
    """What was measured, and on what."""
    threads = settings["threads"]
    return (
        f"K = 1 attribution, {settings['model']} {settings['dtype']}, {settings['engine']} engine, "
        f"{settings['cores']} CPU cores ({threads} worker thread{'s' * (threads != 1)})"
    )
