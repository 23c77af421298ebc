"""Tables of the results, for the README and for the terminal.

Invariant: they are made from the JSON file alone, and say how many examples each row rests on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.faithfulness.summary import OURS, POOLED, behind

Result = dict[str, Any]
Row = dict[str, Any]
Interval = Callable[[Sequence[float] | None], str]

_SIGNIFICANT = 0.05


def quality(result: Result) -> str:
    """Markdown: recovery, mass on gold and cost by method, over all tasks at the shortest length.

    A star marks a recovery, of tokens or by sentence, that differs from that of `OURS` (paired
    test, Holm, 0.05).
    """
    group = _pooled(result)
    header, rows = _quality_rows(group, _tests_of(result, group), _interval)
    return _markdown(header, rows)


def by_task(result: Result) -> str:
    """Markdown: recovery of every method on every task, at lengths with as many examples."""
    most = max(group["examples"] for group in _tasks(result))
    groups = [group for group in _tasks(result) if group["examples"] == most]
    return _recoveries(sorted(groups, key=lambda group: int(group["length"])))


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
                cells.append(_mean(row.get(metric)) + _star(tests, metric, method))
        rows.append(cells)
    ceiling = [cell for group in groups for cell in (_number(group["recovery_ceiling"]), "")]
    return _markdown(header, [*rows, ["highest possible", *ceiling]])


def perturbation(result: Result) -> str:
    """Markdown: RISE, MAS, comprehensiveness and sufficiency, over all tasks."""
    header, rows = _perturbation_rows(_pooled(result), _interval)
    return _markdown(header, rows) if rows else ""


def printed(result: Result, console: Console) -> None:
    """Every group as tables in the terminal, and what failed."""
    for group in result["groups"]:
        title = f"{_title(group)}: {group['examples']} examples"
        _print(console, title, *_quality_rows(group, _tests_of(result, group), _short))
        header, rows = _perturbation_rows(group, _short)
        if rows:
            _print(console, f"{title}, perturbation", header, rows)
        for method, row in group["methods"].items():
            for reason, count in row.get("reasons", {}).items():
                console.print(f"{method} failed on {count}: {reason}", markup=False)
    cost = result["perturbation_cost"]
    if cost["evaluated"]:
        console.print(
            f"perturbation: {cost['evaluated']} sequences in {cost['seconds']:.0f} s; "
            f"one pass for every step would have been {cost['without_stop']}"
        )
    for task, found in result.get("generated", {}).items():
        console.print(f"own responses, {task}: {found['kept']} of {found['asked']} held the answer")


def _quality_rows(group: Row, tests: Row, interval: Interval) -> tuple[list[str], list[list[str]]]:
    header = [
        "method",
        "n",
        "failed",
        "recovery@10%",
        "by sentence",
        "no stop tokens",
        "mass on gold",
        "on reasoning",
        "left there",
        "seconds",
    ]

    rows = [
        [
            method,
            str(row["n"]),
            str(row["failed"] or ""),
            interval(row.get("recovery")) + _star(tests, "recovery", method),
            interval(row.get("recovery_sentence")) + _star(tests, "recovery_sentence", method),
            interval(row.get("recovery_skip")),
            interval(row.get("mass_on_gold")),
            _mean(row.get("reasoning_mass")),
            _mean(row.get("remaining_mass")),
            _seconds(row.get("seconds")),
        ]
        for method, row in group["methods"].items()
    ]
    return header, rows


def _perturbation_rows(group: Row, interval: Interval) -> tuple[list[str], list[list[str]]]:
    kinds = ("inverted", "flat", "pinned")
    header = ["method", "n", "RISE", "MAS", "compr. 10%", "suff. 10%", *kinds]
    rows = [
        [
            method,
            str(behind(row, "rise")),
            interval(row["rise"]),
            interval(row["mas"]),
            interval(row["comprehensiveness_10"]),
            interval(row["sufficiency_10"]),
            *(str(row.get("degenerate", {}).get(kind, 0)) for kind in kinds),
        ]
        for method, row in group["methods"].items()
        if "rise" in row
    ]
    return header, rows


def _tasks(result: Result) -> list[Row]:
    return [group for group in result["groups"] if group["task"] != POOLED]


def _recoveries(groups: Sequence[Row]) -> str:
    if not groups:
        return ""
    methods = dict.fromkeys(method for group in groups for method in group["methods"])
    header = ["method", *(f"{_title(group)} (n = {group['examples']})" for group in groups)]
    ceiling = ["highest possible", *(_number(group["recovery_ceiling"]) for group in groups)]
    rows = [
        [
            method,
            *(_mean(group["methods"].get(method, {}).get("recovery")) for group in groups),
        ]
        for method in methods
    ]
    return _markdown(header, [*rows, ceiling])


def _pooled(result: Result) -> Row:
    """The group of all tasks; the only one where there is but one."""
    group: Row = result["groups"][0]
    return group


def _tests_of(result: Result, group: Row) -> Row:
    for tests in result["tests"]:
        if (tests["task"], tests["length"]) == (group["task"], group["length"]):
            return {key: value for key, value in tests.items() if isinstance(value, dict)}
    return {}


def _star(tests: Row, metric: str, method: str) -> str:
    found = tests.get(metric, {}).get(method)
    return " *" if found is not None and found[3] < _SIGNIFICANT else ""


def _title(group: Row) -> str:
    return f"{group['task']} {group['length']}" if group["length"] else str(group["task"])


def _interval(value: Sequence[float] | None) -> str:
    return "" if value is None else f"{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]"


def _short(value: Sequence[float] | None) -> str:
    """The interval as half its width."""
    return "" if value is None else f"{value[0]:.3f} ±{(value[2] - value[1]) / 2:.3f}"


def _mean(value: Sequence[float] | None) -> str:
    return "" if value is None else f"{value[0]:.3f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    return "< 0.001" if value < 1e-3 else f"{value:.3g}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns in which no row has anything are left out."""
    shown = [i for i in range(len(header)) if any(row[i] for row in rows)]
    ruler = [":---" if i == 0 else "---:" for i in range(len(header))]
    lines = [[row[i] for i in shown] for row in [header, ruler, *rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _print(
    console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row, style="bold" if row[0] == OURS else None)
    console.print(table)
