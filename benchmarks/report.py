"""Writes benchmark results into the README, between its marker comments.

A table stands between ``<!-- table:NAME -->`` and ``<!-- /table:NAME -->``; everything else is left
as it is. Results come from ``benchmarks/results`` unless another file is named; a kind of result
that does not exist leaves its tables alone.

    python -m benchmarks.report README.md [--trace-latency JSON ...] [--serving JSON] [--check]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import capacity_tables, gpu_tables, tables
from benchmarks.faithfulness import report as faithfulness

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Kind:
    """One benchmark: which committed files hold its results, and the tables made of them."""

    files: str
    tables: Mapping[str, Callable[..., str]]


KINDS = {
    "trace_latency": Kind("trace_latency*.json", {"trace_latency": tables.trace_latency}),
    "parity": Kind("parity.json", {"parity": tables.parity}),
    "vs_reference": Kind(
        "vs_reference.json",
        {"vs_reference": tables.vs_reference, "per_token": tables.per_token},
    ),
    "scaling": Kind("scaling.json", {"scaling": tables.scaling}),
    "serving": Kind("serving.json", {"serving": tables.serving}),
    "cap": Kind("cap.json", {"cap": tables.cap}),
    "capacity": Kind(
        "capacity.json",
        {
            "capacity": capacity_tables.capacity,
            "capacity_memory": capacity_tables.capacity_memory,
        },
    ),
    "capacity_check": Kind(
        "capacity_check.json", {"capacity_check": capacity_tables.capacity_check}
    ),
    "faithfulness": Kind(
        "faithfulness.json",
        {
            "faithfulness": faithfulness.quality,
            "faithfulness_tasks": faithfulness.by_task,
            "faithfulness_lengths": faithfulness.by_length,
            "faithfulness_perturbation": faithfulness.perturbation,
        },
    ),
    "gpu_kernels": Kind("gpu_kernels.json", {"gpu_kernels": gpu_tables.gpu_kernels}),
}


class MarkerError(ValueError):
    """A table has no pair of markers, or more than one."""


def replace_table(text: str, name: str, table: str) -> str:
    """Puts a table between its markers; an empty one leaves the markers adjacent.

    Raises:
        MarkerError: The markers do not stand exactly once each, in order.
    """
    begin, end = f"<!-- table:{name} -->", f"<!-- /table:{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise MarkerError(f"the README needs {begin} and {end} once each, in this order")
    pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end), re.DOTALL)
    between = f"\n{table}\n" if table else "\n"
    return pattern.sub(lambda _: f"{begin}{between}{end}", text)


def render(text: str, results: Mapping[str, Sequence[Path]]) -> str:
    """The README with the tables of all given results.

    Args:
        text: The README as it is.
        results: Files of each kind; a kind that is absent or has none leaves its tables alone.

    Raises:
        MarkerError: A table has nowhere to go.
    """
    for kind, paths in results.items():
        if not paths:
            continue
        parsed = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        for name, table in KINDS[kind].tables.items():
            text = replace_table(text, name, table(*parsed))
    return text


def committed_results(folder: Path = RESULTS) -> dict[str, list[Path]]:
    """The result files of every kind that are kept with the code."""
    return {name: sorted(folder.glob(kind.files)) for name, kind in KINDS.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrites the README, or says whether it is out of date."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("readme", type=Path)
    for name in KINDS:
        many = name == "trace_latency"  # one file per engine
        parser.add_argument(
            f"--{name.replace('_', '-')}", dest=name, type=Path, nargs="+" if many else 1
        )
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if stale")
    options = parser.parse_args(arguments)

    results = committed_results()
    results |= {name: paths for name in KINDS if (paths := getattr(options, name))}
    before = options.readme.read_text(encoding="utf-8")
    try:
        after = render(before, results)
    except MarkerError as problem:
        print(problem, file=sys.stderr)
        return 2
    if options.check:
        if after != before:
            print(
                f"{options.readme} does not show the results; "
                f"run: python -m benchmarks.report {options.readme}",
                file=sys.stderr,
            )
        return int(after != before)
    if after != before:
        options.readme.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
