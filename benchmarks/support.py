"""Tables of the support page: what the tests measured of models, features and deliberate breaks.

Each test notes its own cells with the fixture ``measured`` (``tests/measured.py``), which compares
them with the committed ones, or records them:

    pytest [-m long] --record-support benchmarks/results/support.json PATH
    python -m benchmarks.report

``results/support.json`` holds ``{table: {row: {column: [value, test]}}}``: a number of two digits
or a word, and the id of the test that measured it, ``tests/FILE.py::NAME[PARAMETERS]``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.tables import Column, markdown

RESULTS = Path(__file__).parent / "results" / "support.json"
GROSS = 10.0
"""Measured numbers of a table may be this many times as large as the committed, or as small."""

Value = float | str
Cell = tuple[Value, str]
Tables = dict[str, dict[str, dict[str, Cell]]]


@dataclass(frozen=True)
class Layout:
    """The headings of a table.

    Attributes:
        row: Of the first column, which names the rows.
        columns: Of the others, by their keys.
        sort: Rows stand in alphabetical order, and not in that in which they were recorded.
        rounding: Of numbers below it nothing is said but that they are rounding.
    """

    row: str
    columns: Mapping[str, str]
    sort: bool = False
    rounding: float = 1e-5


_SEEN = {"measure": "error of", "error": "relative error"}
_SCORES = {"scores": "relative L1 of the scores"}
# Of rounded activations one on another side makes such a difference.
_ONE_ROUNDED = 3e-3
_ONE_LAYER = "left out or wrong in one layer"
LAYOUTS: Mapping[str, Layout] = {
    "families": Layout(
        "family",
        {
            "attention": "attention",
            "block": "block",
            "float32": "float32",
            "bfloat16": "bfloat16",
            "compiled": "compiled",
            "ranks": "two ranks",
            "transformers": "Transformers' code",
            "gpu": "GPU",
        },
        sort=True,
    ),
    "ways": Layout("way to run", {"against": "against", **_SCORES}, sort=True),
    "gpu_backends": Layout(
        "backend",
        {
            "llama": "Llama",
            "gpt_oss": "gpt-oss",
            "glm4": "GLM-4",
            "olmo2": "OLMo 2",
            "llama4": "Llama 4",
            "deepseek": "DeepSeek V3",
        },
        sort=True,
    ),
    "breaks": Layout("left out or wrong", _SEEN),
    "breaks_normed": Layout(
        "left out or wrong",
        {"gemma2": "Gemma 2", "olmo2": "OLMo 2"},
    ),
    "breaks_gpt_oss": Layout(_ONE_LAYER, {**_SEEN, **_SCORES}),
    "breaks_chunks": Layout(_ONE_LAYER, {"error": "relative error", **_SCORES}),
    "breaks_latents": Layout(_ONE_LAYER, {"error": "relative error", **_SCORES}),
    "breaks_quantized_latents": Layout(
        "wrong in one layer", {"error": "relative error", **_SCORES}
    ),
    "breaks_gates": Layout(
        _ONE_LAYER,
        {
            "afmoe": "AfMoE",
            "afmoe_scores": "its scores",
            "laguna": "Laguna",
            "laguna_scores": "its scores",
        },
    ),
    "breaks_int8": Layout("wrong in one layer", _SEEN),
    "quantized": Layout(
        "scheme",
        {
            "matrix": "error of the matrix",
            "proof": "largest error of the proof",
            "scores": "relative L1",
        },
        sort=True,
        rounding=_ONE_ROUNDED,
    ),
    "quantized_latents": Layout(
        "scheme of all projections",
        {
            "attention": "error of attention",
            "proof": "largest error of the proof",
            "scores": "relative L1",
        },
        sort=True,
        rounding=_ONE_ROUNDED,
    ),
    "images": Layout("", {"qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL (deepstack)"}),
}


def two_digits(value: Value) -> Value:
    """A number as it is committed; words as they are."""
    return value if isinstance(value, str) else float(f"{value:.1e}")


def text(value: Value) -> str:
    """A cell's text: 0.51, 4.1e-5, or a word."""
    if isinstance(value, str):
        return value
    if value == 0 or 0.01 <= value < 1000:
        return f"{value:.2g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def table(name: str, result: Tables) -> str:
    """One table of the committed values as Markdown; "" without any."""
    layout, found = LAYOUTS[name], result.get(name, {})
    names = sorted(found, key=str.casefold) if layout.sort else list(found)
    rows = [{"row": row, **{key: cell[0] for key, cell in found[row].items()}} for row in names]
    columns = [Column(title, key, text, "---") for key, title in layout.columns.items()]
    return markdown([Column(layout.row, "row", str, "---"), *columns], rows) if rows else ""


MAKERS = {f"support_{name}": ("support.json", partial(table, name)) for name in LAYOUTS}
"""What :mod:`benchmarks.report` makes of the committed file."""


def read(path: Path = RESULTS) -> Tables:
    """The values of a file; none if there is none."""
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def merge(path: Path, cells: Iterable[tuple[str, str, str, Value, str]]) -> None:
    """Puts (table, row, column, value, test) into a file, and keeps what else it holds.

    A line holds one cell, so that cells from several branches merge.
    """
    tables = read(path)
    for name, row, column, value, test in cells:
        tables.setdefault(name, {}).setdefault(row, {})[column] = (value, test)
    lines = [
        f" {json.dumps(name)}: {{\n"
        + ",\n".join(
            f"  {json.dumps(row)}: {{\n"
            + ",\n".join(
                f"   {json.dumps(key)}: {json.dumps(found[row][key])}"
                for key in layout.columns
                if key in found[row]
            )
            + "\n  }"
            for row in found
        )
        + "\n }"
        for name, layout in LAYOUTS.items()
        if (found := tables.get(name))
    ]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


def difference(committed: Tables, name: str, row: str, column: str, value: Value) -> str | None:
    """What is wrong with a committed cell, given what was measured; None if nothing is.

    Words must be equal, and numbers alike within ``GROSS``, where all that the table calls rounding
    are alike.
    """
    cell = committed.get(name, {}).get(row, {}).get(column)
    place = f"{row!r}, {column!r} of the table {name!r}"
    if cell is None:
        return f"{place} was measured ({value}) and never recorded"
    was = cell[0]
    if isinstance(value, str) or isinstance(was, str):
        same = value == was
    else:
        low, high = sorted(max(number, LAYOUTS[name].rounding) for number in (value, was))
        same = high <= GROSS * low
    return None if same else f"{place} is {value} and was recorded as {was}"
