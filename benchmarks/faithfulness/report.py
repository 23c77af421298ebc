"""Tables and figures of the results, made from the JSON file alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

Result = dict[str, Any]
Row = dict[str, Any]

OURS = "flashtrace-k1"
"""The method that the others are tested against."""
POOLED = "all"
"""Name of the groups of every generated task at one length."""
_SIGNIFICANT = 0.05
_NAMED = (
    *("flashtrace-k0", "flashtrace-k1", "flashtrace-k2", "flashtrace-auto", "flashtrace-k1-skip"),
    *("flashtrace-auto-skip", "flashtrace-package", "ifr-per-token", "cage", "attention-mean"),
    *("attention-rollout", "value-norm", "attn-lrp", "loo-sentence", "clp-sentence", "random"),
    *("recency", "overlap"),
)
"""Methods that figures show by name; those of close variants would cover each other."""


def behind(row: Row, metric: str) -> int:
    """How many examples a figure of a method rests on."""
    return int(row[metric][3] if len(row[metric]) > 3 else row["n"])


def quality(result: Result) -> str:
    """Markdown: recovery, mass on gold and cost by method, over all tasks at the shortest length.

    A star marks a recovery, of tokens or by sentence, that differs from that of `OURS` (paired
    test, Holm, 0.05).
    """
    group = _pooled(result)
    header, rows = _quality_rows(group, _tests_of(result, group))
    return markdown(header, rows)


def by_task(result: Result) -> str:
    """Markdown: recovery of every method on every task, at lengths with as many examples."""
    most = max(group["examples"] for group in _tasks(result))
    groups = [group for group in _tasks(result) if group["examples"] == most]
    groups = sorted(groups, key=lambda group: int(group["length"]))
    methods = dict.fromkeys(method for group in groups for method in group["methods"])
    header = ["method", *(f"{_title(group)} (n = {group['examples']})" for group in groups)]
    ceiling = ["highest possible", *(_number(group["recovery_ceiling"]) for group in groups)]
    rows = [
        [m, *(_mean(group["methods"].get(m, {}).get("recovery")) for group in groups)]
        for m in methods
    ]
    return markdown(header, [*rows, ceiling])


def by_length(result: Result) -> str:
    """Markdown: recovery over all tasks at the longer lengths, of the methods that run there.

    Stars as in `quality`.
    """
    shortest = _pooled(result)["length"]
    groups = [group for group in result["groups"] if group["length"] > shortest]
    groups = [group for group in groups if group["task"] == _pooled(result)["task"]]
    if not groups:
        return ""
    header = ["method"]
    for group in groups:
        title = f"{group['length']:,} tokens (n = {group['examples']})"
        header += [title, f"{group['length']:,}, by sentence"]
    methods = dict.fromkeys(method for group in groups for method in group["methods"])
    rows = []
    for method in methods:
        cells = [method]
        for group in groups:
            row, tests = group["methods"].get(method, {}), _tests_of(result, group)
            for metric in ("recovery", "recovery_sentence"):
                cells.append(_mean(row.get(metric)) + star(tests.get(metric, {}).get(method)))
        rows.append(cells)
    ceiling = [cell for group in groups for cell in (_number(group["recovery_ceiling"]), "")]
    return markdown(header, [*rows, ["highest possible", *ceiling]])


def perturbation(result: Result) -> str:
    """Markdown: RISE, MAS, comprehensiveness and sufficiency, over all tasks."""
    header, rows = _perturbation_rows(_pooled(result))
    return markdown(header, rows) if rows else ""


def printed(result: Result, console: Console) -> None:
    """Every group's tables as Markdown in the terminal, and what failed."""
    for group in result["groups"]:
        title = f"{_title(group)}: {group['examples']} examples"
        tables = [markdown(*_quality_rows(group, _tests_of(result, group)))]
        if any("rise" in row for row in group["methods"].values()):
            tables.append(markdown(*_perturbation_rows(group)))
        console.print("\n\n".join([title, *tables]), markup=False, highlight=False, soft_wrap=True)
        for method, row in group["methods"].items():
            for reason, count in row.get("reasons", {}).items():
                console.print(f"{method} failed on {count}: {reason}", markup=False)


def _quality_rows(group: Row, tests: Row) -> tuple[list[str], list[list[str]]]:
    header = ["method", "n", "failed", "recovery@10%", "by sentence", "no stop tokens"]
    header += ["mass on gold", "on reasoning", "left there", "seconds"]
    rows = [
        [
            method,
            str(row["n"]),
            str(row["failed"] or ""),
            _interval(row.get("recovery")) + star(tests.get("recovery", {}).get(method)),
            _interval(row.get("recovery_sentence"))
            + star(tests.get("recovery_sentence", {}).get(method)),
            _interval(row.get("recovery_skip")),
            _interval(row.get("mass_on_gold")),
            _mean(row.get("reasoning_mass")),
            _mean(row.get("remaining_mass")),
            seconds_text(row.get("seconds")),
        ]
        for method, row in group["methods"].items()
    ]
    return header, rows


def _perturbation_rows(group: Row) -> tuple[list[str], list[list[str]]]:
    kinds = ("inverted", "flat", "pinned")
    header = ["method", "n", "RISE", "MAS", "compr. 10%", "suff. 10%", *kinds]
    rows = [
        [
            method,
            str(behind(row, "rise")),
            _interval(row["rise"]),
            _interval(row["mas"]),
            _interval(row["comprehensiveness_10"]),
            _interval(row["sufficiency_10"]),
            *(str(row.get("degenerate", {}).get(kind, 0)) for kind in kinds),
        ]
        for method, row in group["methods"].items()
        if "rise" in row
    ]
    return header, rows


def _tasks(result: Result) -> list[Row]:
    return [group for group in result["groups"] if group["task"] != POOLED]


def _pooled(result: Result) -> Row:
    """The group of all tasks; the only one where there is but one."""
    group: Row = result["groups"][0]
    return group


def _tests_of(result: Result, group: Row) -> Row:
    for tests in result["tests"]:
        if (tests["task"], tests["length"]) == (group["task"], group["length"]):
            return {key: value for key, value in tests.items() if isinstance(value, dict)}
    return {}


def star(test: Sequence[float] | None) -> str:
    """A star where a test with its corrected p last found a difference."""
    return " *" if test is not None and test[3] < _SIGNIFICANT else ""


def _title(group: Row) -> str:
    return f"{group['task']} {group['length']}" if group["length"] else str(group["task"])


def _interval(value: Sequence[float] | None) -> str:
    return "" if value is None else f"{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]"


def _mean(value: Sequence[float] | None) -> str:
    return "" if value is None else f"{value[0]:.3f}"


def seconds_text(value: float | None) -> str:
    """Seconds as tables show them."""
    if value is None:
        return ""
    return "< 0.001" if value < 1e-3 else f"{value:.3g}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns in which no row has anything are left out."""
    shown = [i for i in range(len(header)) if any(row[i] for row in rows)]
    ruler = [":---" if i == 0 else "---:" for i in range(len(header))]
    lines = [[row[i] for i in shown] for row in [header, ruler, *rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
        if name in _NAMED:
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
    methods = [name for name in found if name in _NAMED] or list(found)
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
