"""Examples from a JSON Lines file of ``{"prompt", "reasoning", "output", "gold"}``.

Invariant: every line is an example or an error that names the line; nothing is skipped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.faithfulness.example import Example, Span

_REQUIRED = ("prompt", "output")


def read_examples(path: str | Path, limit: int | None = None) -> list[Example]:
    """The examples of a file; its name without suffix is their task.

    ``reasoning`` may be left out, and so may ``gold``: a list of ``[start, end)`` in characters of
    the prompt. Other keys are ignored.

    Args:
        path: The file.
        limit: How many lines to read; None for all.

    Raises:
        ValueError: A line is no such object, or a span lies outside the prompt.
    """
    path = Path(path)
    examples: list[Example] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        if limit is not None and len(examples) >= limit:
            break
        if line.strip():
            examples.append(_example(line, path.stem, number, f"{path.name}:{number + 1}"))
    return examples


def _example(line: str, task: str, number: int, where: str) -> Example:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in _REQUIRED):
        raise ValueError(f"{where}: needs an object with the strings 'prompt' and 'output'")
    reasoning = row.get("reasoning") or ""
    if not isinstance(reasoning, str):
        raise ValueError(f"{where}: 'reasoning' must be a string")
    return Example(
        id=f"file:{task}/{number}",
        task=task,
        length=0,
        prompt=row["prompt"],
        reasoning=reasoning,
        output=row["output"],
        gold=tuple(_span(span, row["prompt"], where) for span in row.get("gold") or ()),
    )


def _span(span: Any, prompt: str, where: str) -> Span:
    numbers = isinstance(span, list) and [type(value) for value in span] == [int, int]
    if not numbers or not 0 <= span[0] < span[1] <= len(prompt):
        raise ValueError(f"{where}: gold span {span!r} is not inside the prompt")
    return span[0], span[1]
