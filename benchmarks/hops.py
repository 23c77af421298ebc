"""What further hops cost: each with a prefill of its own, or all of them from one.

Attributions of 0, 1 and 4 hops through the reasoning, as prefills and at once, alternate in one
run on one engine; medians, and ratios to one hop at once.

    python -m benchmarks.hops [--cases 2000,1000,40 8000,1000,256] [--repeats 3] [--json OUT]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import track

from benchmarks.tables import emit
from benchmarks.tables import hops as table
from benchmarks.trace_latency import Bench, Case, start_engine

CASES = ["600,200,20", "2000,1000,40", "8000,1000,256"]
HOPS = (0, 1, 4)


def measure(bench: Bench, repeats: int) -> list[dict[str, Any]]:
    """A row per number of hops and way."""
    ways = [(hops, keeps) for hops in HOPS for keeps in (False, True) if hops or not keeps]
    seconds: dict[tuple[int, bool], list[float]] = {way: [] for way in ways}
    tokens: dict[tuple[int, bool], int] = {}
    for repeat in range(-1, repeats):  # The first round fills the prefix cache.
        for way in ways:
            bench.hops, bench.keeps = way
            taken, _, reports = bench.trace()
            if repeat >= 0:
                seconds[way].append(taken)
            tokens[way] = sum(report.recomputed_tokens for report in reports)
    base = statistics.median(seconds[1, True])
    return [
        {
            "context": bench.case.context,
            "reasoning": bench.case.reasoning,
            "output": bench.case.output,
            "hops": hops,
            "prefills": "one" if keeps or not hops else "one per hop",
            "recomputed_tokens": tokens[hops, keeps],
            "seconds": statistics.median(seconds[hops, keeps]),
            "ratio": statistics.median(seconds[hops, keeps]) / base,
        }
        for hops, keeps in ways
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    cases = [Case.parse(text) for text in options.cases]
    engine = start_engine(max(case.context for case in cases), eager=True)
    try:
        benches = [Bench(engine, case) for case in cases]
        rows = [row for bench in track(benches) for row in measure(bench, options.repeats)]
    finally:
        engine.close()
    result = {"rows": rows}
    emit(result, table(result), options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
