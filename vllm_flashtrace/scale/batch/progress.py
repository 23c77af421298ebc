"""How far a run is: a bar in a terminal, a line now and then elsewhere.

Invariant: the last figures are always shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

_LINE_SECONDS = 10.0

Report = Callable[[int, int], None]


@contextmanager
def progress(console: TextIO, total: int, done: int) -> Iterator[Report]:
    """Shows progress for as long as the block lasts.

    Args:
        console: Where to show it.
        total: Rows of the input.
        done: Rows that earlier runs finished.

    Yields:
        ``report(rows, errors)`` to call with the rows finished since the last call, and how many of
        these are errors.
    """
    if console.isatty():
        with _bar(console, total, done) as report:
            yield report
        return
    lines = _Lines(console, total, done)
    try:
        yield lines.report
    finally:
        lines.show()


class _Lines:
    def __init__(self, console: TextIO, total: int, done: int) -> None:
        self._console = console
        self._total, self._done, self._errors, self._new = total, done, 0, 0
        self._began = self._shown = time.monotonic()

    def report(self, rows: int, errors: int) -> None:
        self._done, self._errors, self._new = (
            self._done + rows,
            self._errors + errors,
            self._new + rows,
        )
        if time.monotonic() - self._shown >= _LINE_SECONDS:
            self.show()

    def show(self) -> None:
        self._shown = time.monotonic()
        rate = self._new / max(self._shown - self._began, 1e-9)
        left = f", {(self._total - self._done) / rate:.0f} s left" if rate else ""
        print(
            f"{self._done}/{self._total} rows, {self._errors} errors, {rate:.2f} rows/s{left}",
            file=self._console,
            flush=True,
        )


@contextmanager
def _bar(console: TextIO, total: int, done: int) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[errors]} errors"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    began, new, failed = time.monotonic(), 0, 0
    with Progress(*columns, console=Console(file=console)) as shown:
        task = shown.add_task("rows", total=total, completed=done, errors=0, rate="")

        def report(rows: int, errors: int) -> None:
            nonlocal new, failed
            new, failed = new + rows, failed + errors
            rate = new / max(time.monotonic() - began, 1e-9)
            shown.update(task, advance=rows, errors=failed, rate=f"{rate:.2f} rows/s")

        yield report
