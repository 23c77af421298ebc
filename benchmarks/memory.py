"""What the accumulators of a trace take, by the shape of the model and the length of the context.

Counted as the server's own budget does (`vllm_flashtrace.trace.budget`), in float32: column sums
per layer, head and token, and two residual vectors per layer. Nothing is run.

    python -m benchmarks.memory [--contexts 8192 32768 131072] [--json OUT]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.tables import Column, count, decimals, emit, markdown
from vllm_flashtrace.trace.budget import AccumulatorBudget, ModelShape

_MIB = 1 << 20
_BFLOAT16_BYTES = 2


@dataclass(frozen=True, slots=True)
class Shape:
    """Published sizes of a model, and how many tensor-parallel ranks it is split over."""

    model: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    ranks: int = 1


SHAPES = (
    Shape("Llama-3.1-8B", 32, 32, 8, 128, 4096),
    Shape("Qwen3-8B", 36, 32, 8, 128, 4096),
    Shape("Qwen3-32B", 64, 64, 8, 128, 5120),
    Shape("Qwen3-32B", 64, 64, 8, 128, 5120, ranks=2),
    Shape("Llama-3.1-70B", 80, 64, 8, 128, 8192, ranks=4),
    Shape("Llama-3.1-70B", 80, 64, 8, 128, 8192, ranks=8),
    Shape("Qwen2.5-72B", 80, 64, 8, 128, 8192, ranks=4),
)


def row(shape: Shape, contexts: Sequence[int]) -> dict[str, Any]:
    """Bytes on each rank: of a trace, and relative to the bfloat16 KV cache of its context."""
    per_rank = ModelShape(
        num_layers=shape.layers,
        num_heads=shape.heads // shape.ranks,
        num_kv_heads=max(1, shape.kv_heads // shape.ranks),
        hidden_size=shape.hidden,
    )
    budget = AccumulatorBudget.of_model(0, per_rank)
    longest = contexts[-1]
    cache = _BFLOAT16_BYTES * 2 * shape.layers * per_rank.num_kv_heads * shape.head_dim * longest
    return {
        "model": shape.model,
        "shape": f"{shape.layers} / {shape.heads} / {shape.kv_heads} / {shape.head_dim}"
        f" / {shape.hidden}",
        "ranks": shape.ranks,
        "trace_bytes": {str(context): budget.cost(context) for context in contexts},
        "to_kv": budget.cost(longest) / cache,
    }


_AT_ONCE = 8


def table(result: dict[str, Any]) -> str:
    """MiB of one trace by context, and of as many as run at once."""
    contexts, traces = result["contexts"], result["max_concurrent_traces"]
    rows = []
    for found in result["rows"]:
        mib = {key: value / _MIB for key, value in found["trace_bytes"].items()}
        rows.append({**found, **mib, "at_once": traces * mib[str(contexts[-1])]})
    columns = [
        Column("model", "model", str),
        Column("L / H / G / d / D", "shape", str),
        Column("ranks", "ranks", count),
        *(Column(f"{count(c)} tokens, MiB", str(c), decimals(0)) for c in contexts),
        Column(f"{traces} at once, {count(contexts[-1])}", "at_once", count),
        Column("to the KV cache of its context", "to_kv", lambda share: f"{100 * share:.1f} %"),
    ]
    return markdown(columns, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    result = {
        "contexts": options.contexts,
        "max_concurrent_traces": _AT_ONCE,
        "rows": [row(shape, options.contexts) for shape in SHAPES],
    }
    emit(result, table(result), options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
