"""Writes committed benchmark results into the documentation, between its marker comments.

A table stands between ``<!-- table:NAME -->`` and ``<!-- /table:NAME -->``, in exactly one page;
everything else is left as it is. A kind of result without a committed file leaves its tables alone.

    python -m benchmarks.report [--check] [--results FOLDER] [PAGE ...]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks import support, tables
from benchmarks.faithfulness import own_summary
from benchmarks.faithfulness import report as faithfulness

_HERE = Path(__file__).parent
RESULTS = _HERE / "results"
_DOCS = _HERE.parent / "docs"
PAGES = tuple(
    _DOCS / f"{name}.md" for name in ("performance", "faithfulness", "agents", "rag", "support")
)

TABLES: Mapping[str, tuple[str, Callable[..., str]]] = {
    "trace_latency": ("trace_latency*.json", tables.trace_latency),
    "hops": ("hops.json", tables.hops),
    "targets": ("targets.json", tables.targets),
    "citations": ("citations.json", tables.citations),
    "parity": ("parity.json", tables.parity),
    "vs_reference": ("vs_reference.json", tables.vs_reference),
    "per_token": ("vs_reference.json", tables.per_token),
    "scaling": ("scaling.json", tables.scaling),
    "serving": ("serving.json", tables.serving),
    "cap": ("cap.json", tables.cap),
    "agent_guard": ("agent_guard.json", tables.agent_guard),
    "agent_sources": ("agent_sources.json", tables.agent_sources),
    "faithfulness": ("faithfulness.json", faithfulness.quality),
    "faithfulness_tasks": ("faithfulness.json", faithfulness.by_task),
    "faithfulness_lengths": ("faithfulness.json", faithfulness.by_length),
    "faithfulness_perturbation": ("faithfulness.json", faithfulness.perturbation),
    "own_answers": ("own_answers.json", own_summary.quality),
    "own_answers_wide": ("own_answers*.json", own_summary.by_length),
    "own_answers_wide_tasks": ("own_answers.json", own_summary.widely_by_task),
    "own_answers_tasks": ("own_answers.json", own_summary.by_task),
    "own_answers_pooling": ("own_answers.json", own_summary.by_pooling),
    "gpu_kernels": ("gpu_kernels.json", tables.gpu_kernels),
    "gpu_engine": ("gpu_engine*.json", tables.gpu_engine),
    "gpu_host": ("gpu_host.json", tables.gpu_host),
    "gpu_code": ("gpu_code.json", tables.gpu_code),
    **support.MAKERS,
}
"""Of each table, which committed files hold its results, and what makes it of their JSON."""


class MarkerError(ValueError):
    """A table has no pair of markers in the pages, or more than one."""


def replace_table(pages: Mapping[Path, str], name: str, table: str) -> dict[Path, str]:
    """The pages with a table between its markers; an empty table leaves them on adjacent lines.

    Raises:
        MarkerError: The markers do not stand exactly once over all pages, in order.
    """
    begin, end = f"<!-- table:{name} -->", f"<!-- /table:{name} -->"
    pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end), re.DOTALL)
    whole = "".join(pages.values())
    places = [path for path, text in pages.items() if pattern.search(text)]
    if len(places) != 1 or whole.count(begin) != 1 or whole.count(end) != 1:
        raise MarkerError(f"the pages need {begin} and {end} exactly once, in this order")
    new = f"{begin}\n{table}\n{end}" if table else f"{begin}\n{end}"
    return {**pages, places[0]: pattern.sub(lambda _: new, pages[places[0]])}


def render(pages: Mapping[Path, str], results: Path = RESULTS) -> dict[Path, str]:
    """The pages with the tables of all results in a folder.

    Raises:
        MarkerError: A table has no place, or several; also one without results.
    """
    rendered = dict(pages)
    for name, (files, table) in TABLES.items():
        found = [json.loads(path.read_text("utf-8")) for path in sorted(results.glob(files))]
        new = replace_table(rendered, name, table(*found) if found else "")
        rendered = new if found else rendered
    return rendered


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrites the pages; with ``--check`` returns 1 if one is out of date."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", type=Path, nargs="*", metavar="PAGE", default=PAGES)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if stale")
    options = parser.parse_args(arguments)
    before = {path: path.read_text("utf-8") for path in options.pages}
    try:
        after = render(before, options.results)
    except MarkerError as problem:
        print(problem, file=sys.stderr)
        return 2
    stale = [path for path in before if after[path] != before[path]]
    for path in stale:
        if options.check:
            print(f"{path} is stale; run: python -m benchmarks.report", file=sys.stderr)
        else:
            path.write_text(after[path], "utf-8")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
