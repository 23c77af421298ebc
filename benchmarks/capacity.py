"""What attributions cost at scale: seconds and dollars, memory, and latencies under load.

On paper: seconds of a completion and of its attribution from constants that are measured on a CPU
(the tables in the README) or, for GPUs, follow from data sheets, which is said with each. In
simulation: replicas under Poisson arrivals with a share of requests traced. ``--check`` measures
instead how well the model predicts two replicas on this machine.

    python -m benchmarks.capacity [--lengths JSONL] [--constants JSON] [--json OUT]
    python -m benchmarks.capacity --check [--json OUT]
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from benchmarks import capacity_tables
from benchmarks.capacity_constants import GPUS, Constants, from_data_sheet
from benchmarks.capacity_fit import from_committed_results
from benchmarks.capacity_lengths import MAX_CONTEXT, PRESETS, Lengths, read_lengths
from benchmarks.capacity_model import SHARES, Cost, Setting, cost_rows
from benchmarks.capacity_shapes import SHAPES
from benchmarks.capacity_simulation import Cluster, simulate
from benchmarks.load_stats import percentile

RESULTS = Path(__file__).parent / "results"
REPLICAS = (("Llama-3.1-8B", 1), ("Llama-3.1-70B", 4))
CONTEXTS = (8_192, 32_768, 131_072)
MEMORY_SHAPES = (
    ("Llama-3.1-8B", 1),
    ("Qwen3-8B", 1),
    ("Qwen3-32B", 1),
    ("Qwen3-32B", 2),
    ("Llama-3.1-70B", 4),
    ("Llama-3.1-70B", 8),
    ("Qwen2.5-72B", 4),
)
_CPU_CONTEXT = 8_192
_SIMULATED = ("chat", "reasoning")


def memory_rows(concurrent: int) -> Iterator[dict[str, Any]]:
    """Accumulators of a trace on each rank, beside the KV cache of the same context."""
    for name, ranks in MEMORY_SHAPES:
        shape = SHAPES[name]
        budget = shape.accumulators(ranks=ranks)
        held = {str(context): budget.cost(context) for context in CONTEXTS}
        kv = shape.kv_bytes_per_token / ranks
        yield {
            "model": name,
            "layers": shape.layers,
            "heads": shape.heads,
            "kv_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "hidden": shape.hidden,
            "ranks": ranks,
            "bytes_per_token": budget.bytes_per_token,
            "fixed_bytes": budget.fixed_bytes,
            "trace_bytes": held,
            "concurrent_bytes": concurrent * held[str(CONTEXTS[-1])],
            "kv_bytes_at_longest": kv * CONTEXTS[-1],
            "to_kv": held[str(CONTEXTS[-1])] / (kv * CONTEXTS[-1]),
        }


def simulated_rows(
    constants: Constants,
    traffic: dict[str, list[Lengths]],
    setting: Setting,
    cluster: Cluster,
    load: float,
) -> Iterator[dict[str, Any]]:
    """Latencies and lag by traced share, at a share of what untraced traffic would saturate."""
    for kind, lengths in traffic.items():
        cost = Cost.of(constants, lengths, setting)
        rate = load * cluster.replicas / cost.completion
        source = random.Random(f"arrivals {kind}")
        arrivals = list(accumulate(source.expovariate(rate) for _ in lengths))
        ranks = [source.random() for _ in lengths]
        for share in SHARES:
            # A request that is traced at one share is traced at every greater one.
            requests = [(one, rank < share) for one, rank in zip(lengths, ranks, strict=True)]
            outcome = simulate(constants, cluster, requests, arrivals=arrivals)
            completions, lags = outcome.completion_latencies(), outcome.trace_lags()
            yield {
                "replica": constants.name,
                "basis": constants.basis,
                "traffic": kind,
                "share": share,
                "requests_per_second": rate,
                "utilisation": outcome.utilisation,
                "sequences": outcome.sequences,
                "completion_seconds": {p: percentile(completions, int(p[1:])) for p in _POINTS},
                "lag_seconds": {p: percentile(lags, int(p[1:])) for p in _POINTS} if lags else None,
            }


_POINTS = ("p50", "p95")


def plan(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that needs no engine."""
    setting = Setting(
        options.batch, options.max_num_batched_tokens, options.hops, options.dollars_per_gpu_hour
    )
    cluster = Cluster(
        replicas=options.replicas,
        max_num_seqs=options.batch,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_concurrent_traces=options.max_concurrent_traces,
        trace_token_share=options.trace_token_share,
        hops=options.hops,
    )
    if options.lengths is None:
        traffic = {kind: p.draw(options.samples, kind) for kind, p in PRESETS.items()}
        short = {kind: PRESETS[kind].draw(options.samples, kind, _CPU_CONTEXT) for kind in ["chat"]}
    else:
        traffic = short = {options.lengths.name: read_lengths(options.lengths)}
    simulated = {k: v for k, v in traffic.items() if options.lengths or k in _SIMULATED}
    gpu = GPUS[options.gpu]
    cpu, worst = from_committed_results(RESULTS)
    given = [Constants.read(path) for path in options.constants or ()]
    at_best = [from_data_sheet(SHAPES[n], gpu, r, compute=1, memory=1) for n, r in REPLICAS]
    compute, memory = options.compute_share, options.memory_share
    assumed = [
        from_data_sheet(SHAPES[n], gpu, r, compute=compute, memory=memory) for n, r in REPLICAS
    ]
    on_gpus = [c for pair in zip(at_best, assumed, strict=True) for c in pair]
    simulated_on = [c for c in given if c.gpus] or assumed[:1]
    return {
        "settings": {
            **asdict(setting),
            "replicas": cluster.replicas,
            "max_concurrent_traces": cluster.max_concurrent_traces,
            "trace_token_share": cluster.trace_token_share,
            "gpu": gpu.name,
            "compute_share": compute,
            "memory_share": memory,
            "load": options.load,
            "samples": options.samples,
            "shares": SHARES,
            "max_context": MAX_CONTEXT,
        },
        "constants": [c.to_dict() for c in (cpu, *given, *on_gpus)],
        "worst_relative_error_of_cpu_fit": worst,
        "traffic": {k: asdict(p) for k, p in PRESETS.items()} if options.lengths is None else None,
        "costs": [
            *cost_rows([cpu], short, replace(setting, batch=_measured_batch(), budget=2048)),
            *cost_rows([*given, *on_gpus], traffic, setting),
        ],
        "memory": list(memory_rows(cluster.max_concurrent_traces)),
        "simulation": [
            row
            for constants in simulated_on
            for row in simulated_rows(constants, simulated, setting, cluster, options.load)
        ],
    }


def _measured_batch() -> int:
    """Sequences at which the committed decoding rate was measured."""
    serving = json.loads((RESULTS / "serving.json").read_text("utf-8"))
    return int(serving["settings"]["concurrency"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="measure two replicas instead")
    parser.add_argument("--requests", type=int, default=32, help="of --check, a round")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--lengths", type=Path, help="JSONL of prompt, reasoning, output")
    parser.add_argument("--constants", type=Path, nargs="+", help="further replicas, as JSON")
    parser.add_argument("--gpu", choices=GPUS, default="H100")
    parser.add_argument(
        "--compute-share", type=float, default=0.4, help="of the data sheet's rate; an assumption"
    )
    parser.add_argument("--memory-share", type=float, default=0.7, help="likewise, of memory")
    parser.add_argument(
        "--dollars-per-gpu-hour", type=float, default=2.5, help="an assumption; default 2.50"
    )
    parser.add_argument("--batch", type=int, default=64, help="sequences decoding together")
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--hops", type=int, default=1)
    parser.add_argument("--replicas", type=int, default=4, help="of the simulation")
    parser.add_argument("--load", type=float, default=0.7, help="share of saturation, untraced")
    parser.add_argument("--max-concurrent-traces", type=int, default=8)
    parser.add_argument("--trace-token-share", type=float, default=0.25)
    parser.add_argument("--samples", type=int, default=2000, help="requests of each preset")
    options = parser.parse_args(arguments)
    if options.check:
        from benchmarks.capacity_check import check

        result = check(options.requests)
        text = capacity_tables.capacity_check(result)
    else:
        result = plan(options)
        text = f"{capacity_tables.capacity(result)}\n\n{capacity_tables.capacity_memory(result)}"
    Console(width=180).print(Markdown(text))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
