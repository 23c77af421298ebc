"""How the cost of a K = 1 attribution grows with context, reasoning and concurrency.

Exponents are slopes of least-squares lines in log-log: 1 means linear. Beside the attribution stand
its floor (the same prefill without a trace) and a plain prefill of the whole context, uncached.
Lengths are multiples of the KV block (128 tokens on the CPU), so that every point recomputes the
same part of a block before its first target token.

    python -m benchmarks.scaling [--quick] [--eager] [--json OUT] [--plot OUT.png]
    python -m benchmarks.scaling --from-json IN --plot OUT.png
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.progress import track

from benchmarks.tables import emit
from benchmarks.tables import scaling as table
from benchmarks.trace_latency import Bench, Case, attribute_together, start_engine

if TYPE_CHECKING:
    from tests.engine.harness import Engine

SHORT = 40
"""Tokens of spans that do not grow."""
SWEEPS = {
    "context": [(context, SHORT, 1) for context in (512, 1024, 2048, 4096, 8064)],
    "reasoning": [(4096, reasoning, 1) for reasoning in (128, 384, 1024, 3072)],
    "concurrency": [(2048, SHORT, traces) for traces in (1, 2, 4, 8)],
}
"""Tokens of context and of reasoning, and attributions at once, of every point."""
QUICK = {
    "context": [(context, SHORT, 1) for context in (256, 512, 1024)],
    "reasoning": [(640, reasoning, 1) for reasoning in (128, 256, 384)],
    "concurrency": [(384, SHORT, traces) for traces in (1, 2, 4)],
}
_VARIABLES = {"context": "context", "reasoning": "reasoning", "concurrency": "traces"}


def point(engine: Engine, name: str, size: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    """One point of a sweep."""
    context, reasoning, traces = size
    case = Case(context, reasoning, SHORT)
    if name == "concurrency":
        return together(engine, case, traces, repeats)
    row = Bench(engine, case).row(repeats)
    if name == "context":
        prefills = [uncached_prefill(engine, context, f"Version {i}. ") for i in range(repeats)]
        row["uncached_prefill_seconds"] = statistics.median(prefills)
    return row


def together(engine: Engine, case: Case, traces: int, repeats: int) -> dict[str, Any]:
    """Medians of attributions of different texts, every hop of all submitted at once."""
    from tests.engine.conftest import text_tokens

    texts = [text_tokens(engine, case.context, f"Document {i}. ") for i in range(traces)]
    for token_ids in texts:
        engine.generate(token_ids, 1)
    attribute_together(engine, case, texts)
    runs = []
    for _ in range(repeats):
        began = time.perf_counter()
        reports = attribute_together(engine, case, texts)
        runs.append((time.perf_counter() - began, reports))
    seconds = statistics.median(seconds for seconds, _ in runs)

    def phase(name: str) -> float:
        return statistics.median(sum(r.seconds.get(name, 0.0) for r in found) for _, found in runs)

    return {
        "traces": traces,
        "context": case.context,
        "seconds": seconds,
        "seconds_per_trace": seconds / traces,
        "recording_seconds": phase("recording"),
        "proximity_seconds": phase("proximity"),
    }


def uncached_prefill(engine: Engine, length: int, salt: str) -> float:
    """Seconds of a prompt that is not in the prefix cache."""
    from tests.engine.conftest import text_tokens

    token_ids = text_tokens(engine, length, salt)
    began = time.perf_counter()
    engine.generate(token_ids, 1)
    return time.perf_counter() - began


def exponents(rows: Sequence[dict[str, Any]], variable: str) -> dict[str, float]:
    """Slope in log-log of every measured number of seconds against the variable."""
    fitted = {}
    for name in rows[0]:
        points = [(row[variable], row[name]) for row in rows if name.endswith("seconds")]
        points = [(x, y) for x, y in points if y > 0]
        if len({x for x, _ in points}) > 1:
            x, y = np.log(np.array(points, dtype=np.float64)).T
            fitted[name] = float(np.polyfit(x, y, 1)[0])
    return fitted


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the three sweeps on one engine."""
    sweeps = QUICK if options.quick else SWEEPS
    engine = start_engine(max(s[0] for sizes in sweeps.values() for s in sizes), options.eager)
    try:
        settings = {
            "model": "SmolLM2-135M",
            "dtype": "float32",
            "engine": "eager" if options.eager else "compiled",
            "repeats": options.repeats,
            "cores": os.cpu_count(),
            "threads": engine.on_worker(lambda worker: torch.get_num_threads()),
        }
        result: dict[str, Any] = {"settings": settings}
        for name, sizes in sweeps.items():
            rows = [point(engine, name, size, options.repeats) for size in track(sizes, name)]
            fitted = exponents(rows, _VARIABLES[name])
            result[name] = {"variable": _VARIABLES[name], "rows": rows, "exponents": fitted}
    finally:
        engine.close()
    return result


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
    settings = result["settings"]
    threads = settings["threads"]
    figure.suptitle(
        f"K = 1 attribution, {settings['model']} {settings['dtype']}, {settings['engine']} engine, "
        f"{settings['cores']} CPU cores ({threads} worker thread{'s' * (threads != 1)})",
        fontsize=12,
    )
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, or reads what was measured, and shows it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few short cases")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="an engine without compilation")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--from-json", type=Path, help="show an earlier measurement")
    options = parser.parse_args(arguments)
    source = options.from_json
    result = json.loads(source.read_text()) if source else measure(options)
    emit(result, table(result), options.json)
    if options.plot:
        plot(result, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
