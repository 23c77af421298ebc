"""Progress bars with rate and time left."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class _Rate(ProgressColumn):
    """Units a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if not speed else f"{speed:.2f}/s", style="progress.data.speed")


class BarProgress:
    """Progress bars with rate and time left; implements `runner.Progress`."""

    def __init__(self, console: Console) -> None:
        """Draws on ``console``."""
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=600,
        )
        self._current: TaskID | None = None

    def start(self, name: str, total: int) -> None:
        """Another bar."""
        self._current = self.bars.add_task(name, total=total)

    def advance(self, units: int = 1) -> None:
        """On the bar last started."""
        if self._current is not None:
            self.bars.advance(self._current, units)

    def note(self, message: str) -> None:
        """A line above the bars."""
        self.bars.console.print(message, style="red", markup=False)
