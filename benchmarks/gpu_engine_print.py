"""Tables of the engine benchmark for a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def print_engine(result: dict[str, Any]) -> None:
    """Whatever was measured before the end."""
    console = Console(width=160)
    backend = result.get("attention_backend")
    console.print(
        f"{result['device']}, {backend}, {result.get('layers')} layers, torch {result['torch']}"
    )
    single = [result["batch"]] if "batch" in result else []
    for title, rows in (
        ("Decoding without traces, plugin to stock", result.get("decoding", [])),
        ("K = 1 attribution to its floor", result.get("latency", [])),
        ("Batch, attributed to not", single),
    ):
        if rows:
            table = Table(title=title)
            names = [name for name, value in rows[0].items() if not isinstance(value, list)]
            for name in names:
                table.add_column(name.replace("_", " "), justify="right")
            for row in rows:
                table.add_row(*(_cell(row[name]) for name in names))
            console.print(table)
    if graphs := result.get("graphs"):
        for when in ("alone", "beside a trace"):
            counts = ", ".join(f"{n} steps {mode}" for mode, n in sorted(graphs[when].items()))
            console.print(f"decoding {when} (runner {graphs['runner']}): {counts}")


def _cell(value: Any) -> str:
    return f"{value:,.3f}" if isinstance(value, float) else f"{value:,}"
