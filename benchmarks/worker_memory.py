"""Whether the worker's memory grows with traces, or with batch sizes it has not seen before.

The CPU libraries below vLLM keep a kernel for every batch size, with or without this plugin. So
traces of five sizes are repeated here, every fifth one aborted, and beside them untraced prompts of
ever new lengths are sent, twice.

    python -m benchmarks.worker_memory [--traces 500] [--lengths 200] [--json OUT]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.models import prepare_smollm2

SIZES = 5


def main() -> None:
    """Runs both series and prints a table."""
    from benchmarks.processes import rss_mb
    from tests.engine.conftest import text_tokens
    from tests.engine.harness import Engine, TraceJob

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=int, default=500)
    parser.add_argument("--lengths", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    engine = Engine(prepare_smollm2(), enable_prefix_caching=True)
    rows: list[dict[str, Any]] = []
    try:
        pid = engine.on_worker(_pid)
        texts = [text_tokens(engine, 150 + 30 * i, f"Text {i}. ") for i in range(SIZES)]
        for done in range(options.traces + 1):
            if done % 100 == 0:
                rows.append({"series": "traces of five sizes", "done": done, "mb": rss_mb(pid)})
            text = texts[done % SIZES]
            target = TargetWeights.from_spans([(len(text) - 20, len(text))])
            if done % SIZES == SIZES - 1:
                request_id, _ = engine.submit(TraceJob(text, target))
                engine.llm.llm_engine.abort_request([request_id])
                engine.run()
            else:
                engine.trace(TraceJob(text, target))
        for series in ("untraced, new lengths", "untraced, the same lengths again"):
            for done in range(options.lengths + 1):
                if done % 100 == 0:
                    rows.append({"series": series, "done": done, "mb": rss_mb(pid)})
                fresh = text_tokens(engine, done + 2, f"{series} {done}. ")
                engine.generate(fresh, 1)
        status = engine.status()
    finally:
        engine.close()
    table = Table("series", "requests", "worker, MiB")
    for row in rows:
        table.add_row(row["series"], str(row["done"]), f"{row['mb']:.0f}")
    Console().print(table)
    held = {key: status[key] for key in ("recording", "accumulator_bytes")}
    Console().print(f"held at the end: {held}")
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "held": held}, indent=1) + "\n")


def _pid(_: Any) -> int:
    """Runs in the worker."""
    import os

    return os.getpid()


if __name__ == "__main__":
    main()
