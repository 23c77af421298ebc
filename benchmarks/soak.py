"""Resident memory of a server over hundreds of traces, some of whose clients leave half-way.

A server with the plugin answers traced completions of mixed lengths; every fifth client leaves at a
random moment. The memory of the API server, the engine core and the worker is sampled between
batches of requests and judged after a warm-up; at the end the worker is asked what it still holds.
``--untraced`` sends the same requests without asking for attributions: what vLLM and the libraries
below it take by themselves for batches of ever new sizes. ``--worker`` runs an engine without a
server instead: traces of five sizes repeated, then untraced prompts of new lengths, twice, since
the CPU libraries keep a kernel for every batch size they have seen.

    python -m benchmarks.soak [--traces 500] [--untraced] [--eager] [--plot PNG] [--json OUT]
    python -m benchmarks.soak --worker [--traces 500] [--lengths 200] [--json OUT]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from benchmarks.load import (
    DEV_MODE,
    MODEL,
    client,
    end_servers_on_signals,
    is_chosen,
    plugin_server,
    random_prompt,
    two_hops,
)
from benchmarks.mixed_load import MixedRequest, rest, send_all
from benchmarks.processes import memory_mb, rss_mb
from benchmarks.tables import emit, plain
from tests.server.live_server import Server
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.models import prepare_smollm2

ROLES = {"server": "API server", "engine": "engine core", "worker": "worker"}
SHARE_THAT_LEAVES = 0.2
PROMPT_LENGTHS, OUTPUT_LENGTHS = (32, 768), (8, 48)
LONGEST_STAY_SECONDS = 4.0
WORKER_SIZES = 5
_RESULT_TTL_SECONDS = 5.0
_LEAST_RANGE_MB = 100.0


def make_request(index: int, seed: int, traced: bool) -> MixedRequest:
    """A streamed completion whose lengths, and whether its client stays, depend on its index."""
    source = random.Random(f"{seed}-{index}")
    output = source.randint(*OUTPUT_LENGTHS)
    body = {
        "model": MODEL,
        "prompt": random_prompt((seed, index), source.randint(*PROMPT_LENGTHS)),
        "max_tokens": output,
        "ignore_eos": True,
        "n": 1,
        "stream": True,
        **({"flashtrace": two_hops(output)} if traced else {}),
    }
    stay = source.uniform(0, LONGEST_STAY_SECONDS) if is_chosen(index, SHARE_THAT_LEAVES) else None
    return MixedRequest("completions", body, int(traced), stay_seconds=stay)


async def serve_all(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """Sends all requests; rows of memory by number of requests, outcomes, and what is left."""
    rows, outcomes = [{"traces": 0, **memory_mb(server.pid)}], Counter[str]()
    async with client(server.url) as http:
        for first in track(range(0, options.traces, options.every), "batches of traces"):
            indices = range(first, min(first + options.every, options.traces))
            batch = [make_request(i, options.seed, not options.untraced) for i in indices]
            await send_all(http, batch, options.concurrency)
            if faults := [request.fault for request in batch if request.fault]:
                raise RuntimeError(f"not answered as asked: {faults}")
            outcomes.update("left" if r.status is None else "completed" for r in batch)
            rows.append({"traces": indices.stop, **memory_mb(server.pid)})
        return {"rows": rows, "outcomes": dict(outcomes), "left": await rest(http, server)}


def slope(rows: Sequence[dict[str, Any]], role: str, warm_up: int) -> dict[str, float]:
    """Least squares from ``warm_up`` traces on: MiB per 100 traces, standard error, intercept."""
    judged = [row for row in rows if row["traces"] >= warm_up]
    traces = np.array([row["traces"] / 100 for row in judged])
    memory = np.array([row[f"{role}_mb"] for row in judged])
    per_100, intercept = np.polyfit(traces, memory, 1)
    residuals = memory - intercept - per_100 * traces
    variance = (residuals**2).sum() / (len(judged) - 2) / ((traces - traces.mean()) ** 2).sum()
    return {"per_100": per_100, "stderr": variance**0.5, "intercept": intercept}


def draw(report: dict[str, Any], warm_up: int, path: Path) -> None:
    """Writes a PNG with one panel per process; all samples are shown, the warm-up shaded."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = report["rows"]
    traces = [row["traces"] for row in rows]
    figure, panels = pyplot.subplots(3, 1, sharex=True, figsize=(7, 6), layout="constrained")
    for panel, (role, name) in zip(panels, ROLES.items(), strict=True):
        memory, fitted = [row[f"{role}_mb"] for row in rows], report["slopes"][role]
        ends = [warm_up, traces[-1]]
        label = f"{fitted['per_100']:+.2f} ± {fitted['stderr']:.2f} MiB per 100 traces"
        line = [fitted["intercept"] + fitted["per_100"] * t / 100 for t in ends]
        panel.plot(traces, memory, ".-", markersize=4, linewidth=1, color="#3b6ea5")
        panel.plot(ends, line, color="#c0392b", label=label)
        panel.axvspan(0, warm_up, color="0.93", zorder=0)
        middle = (max(memory) + min(memory)) / 2
        half = max(_LEAST_RANGE_MB, 1.2 * (max(memory) - min(memory))) / 2
        panel.set(ylim=(middle - half, middle + half), ylabel="MiB resident")
        panel.set_title(name, loc="left", fontsize=10)
        panel.legend(loc="lower right", frameon=False, fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set(xlabel="traced completions (warm-up shaded)", xlim=(0, traces[-1]))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def worker_series(options: argparse.Namespace) -> dict[str, Any]:
    """Memory of the worker of an engine, every 100 requests; every fifth trace is aborted."""
    from tests.engine.conftest import text_tokens
    from tests.engine.harness import Engine, TraceJob

    engine = Engine(prepare_smollm2(), "a benchmark", enable_prefix_caching=True)
    rows: list[dict[str, Any]] = []

    def sample(series: str, done: int) -> None:
        if done % 100 == 0:
            rows.append({"series": series, "done": done, "mb": rss_mb(pid)})

    try:
        pid = engine.on_worker(lambda worker: os.getpid())
        texts = [text_tokens(engine, 150 + 30 * i, f"Text {i}. ") for i in range(WORKER_SIZES)]
        for done in range(options.traces + 1):
            sample("traces of five sizes", done)
            text = texts[done % WORKER_SIZES]
            job = TraceJob(text, TargetWeights.from_spans([(len(text) - 20, len(text))]))
            if done % WORKER_SIZES == WORKER_SIZES - 1:
                request_id, _ = engine.submit(job)
                engine.llm.llm_engine.abort_request([request_id])
                engine.run()
            else:
                engine.trace(job)
        for series in ("untraced, new lengths", "untraced, the same lengths again"):
            for done in range(options.lengths + 1):
                sample(series, done)
                engine.generate(text_tokens(engine, done + 2, f"{series} {done}. "), 1)
        status = engine.status()
    finally:
        engine.close()
    return {"rows": rows, "left": {key: status[key] for key in ("recording", "accumulator_bytes")}}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if something is left at the end."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=int, default=500)
    parser.add_argument("--warm-up", type=int, default=100, help="traces before memory is judged")
    parser.add_argument("--every", type=int, default=10, help="traces between two samples")
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--untraced", action="store_true", help="the same requests, for comparison")
    parser.add_argument("--worker", action="store_true", help="an engine's worker alone")
    parser.add_argument("--lengths", type=int, default=200, help="untraced prompts with --worker")
    parser.add_argument("--eager", action="store_true", help="an engine without compilation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.traces - options.warm_up < 3 * options.every:
        parser.error("--traces must leave at least three samples after --warm-up")
    settings = {k: v for k, v in vars(options).items() if k not in ("json", "plot")}
    if options.worker:
        report = worker_series(options)
        shown = report["rows"]
    else:
        end_servers_on_signals()
        engine = [
            "--enforce-eager" if options.eager else "--no-enforce-eager",
            # An abandoned request may hold its place a little longer than its client.
            f"--max-num-seqs={4 * options.concurrency}",
            "--kv-cache-memory-bytes=512M",
        ]
        config = {"result_ttl_seconds": _RESULT_TTL_SECONDS}
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "server.log"
            with plugin_server(prepare_smollm2(), log, engine, config, **DEV_MODE) as server:
                report = asyncio.run(serve_all(server, options))
        rows = report["rows"]
        report["slopes"] = {role: slope(rows, role, options.warm_up) for role in ROLES}
        shown = [
            {
                "process": role,
                "first": rows[0][f"{role}_mb"],
                "last": rows[-1][f"{role}_mb"],
                **found,
            }
            for role, found in report["slopes"].items()
        ]
        if options.plot:
            draw(report, options.warm_up, options.plot)
    emit({"settings": settings, **report}, plain(shown), options.json)
    print(f"left at the end: {report['left']}")
    return int(any(report["left"].values()))


if __name__ == "__main__":
    sys.exit(main())
