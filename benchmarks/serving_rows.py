"""Rows and tables of the serving benchmark.

Invariant: a ratio compares blocks of the same round, which ran within minutes of each other; the
reported one is the median over rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table

from benchmarks.load_stats import Block, latencies, percentiles_ms, token_gaps
from benchmarks.serving_rounds import Variant


def row(name: str, blocks: Mapping[str, Sequence[Block]]) -> dict[str, Any]:
    """Everything about one variant.

    Args:
        name: The variant's.
        blocks: Of all variants, one per round; ``stock`` among them.
    """
    timings = [timing for block in blocks[name] for timing in block.timings]
    seconds = sum(block.seconds for block in blocks[name])
    ratios = pair_ratios(name, blocks, lambda block: block.tokens_per_second)
    return {
        "variant": name,
        "throughput_rps": len(timings) / seconds,
        "output_tokens_per_second": sum(t.output_tokens for t in timings) / seconds,
        **latencies(timings),
        "ratio_to_stock": statistics.median(ratios),
        "itl_p50_ratio_to_stock": statistics.median(pair_ratios(name, blocks, _itl("p50"))),
        "itl_p99_ratio_to_stock": statistics.median(pair_ratios(name, blocks, _itl("p99"))),
        "pair_ratios": ratios,
        "requests": len(timings),
        "traced_requests": sum(t.traced for t in timings),
    }


def cap_row(variant: Variant, blocks: Mapping[str, Sequence[Block]]) -> dict[str, Any]:
    """What streamed, untraced requests felt beside attributions of existing texts."""
    full = row(variant.name, blocks)
    beside = [seconds for block in blocks[variant.name] for seconds in block.beside]
    return {
        "variant": variant.name,
        "trace_token_share": None if variant.server == "stock" else float(variant.server),
        "untraced_itl_ms": full["itl_ms"],
        "untraced_ttft_ms": full["ttft_ms"],
        "untraced_e2e_ms": full["e2e_ms"],
        "untraced_longest_gap_ms": 1000
        * max(max(token_gaps(block.timings)) for block in blocks[variant.name]),
        "untraced_itl_p99_ratio_to_stock": full["itl_p99_ratio_to_stock"],
        "attribution_ms": percentiles_ms(beside),
        "attributions": len(beside),
        "output_tokens_per_second": full["output_tokens_per_second"],
        "ratio_to_stock": full["ratio_to_stock"],
        "pair_ratios": full["pair_ratios"],
        "requests": full["requests"],
    }


def pair_ratios(
    name: str, blocks: Mapping[str, Sequence[Block]], figure: Callable[[Block], float]
) -> list[float]:
    """A figure of the variant over that of stock vLLM, in each round."""
    pairs = zip(blocks[name], blocks["stock"], strict=True)
    return [figure(ours) / figure(stock) for ours, stock in pairs]


def _itl(key: str) -> Callable[[Block], float]:
    def figure(block: Block) -> float:
        gaps = percentiles_ms(token_gaps(block.timings))
        assert gaps is not None
        return gaps[key]

    return figure


def rows_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows for a terminal."""
    table = Table(title="Serving under load; percentiles are p50 / p95 / p99 in milliseconds")
    columns = ["ttft_ms", "itl_ms", "e2e_ms", "untraced_itl_ms", "traced_e2e_ms", "attribution_ms"]
    for name in ("variant", "tokens/s", "of stock", "ITL p99 of stock", *map(_title, columns)):
        table.add_column(name, justify="left" if name == "variant" else "right")
    for row in rows:
        table.add_row(
            row["variant"],
            f"{row['output_tokens_per_second']:.1f}",
            f"{row['ratio_to_stock']:.3f}",
            f"{row['itl_p99_ratio_to_stock']:.2f}",
            *(_cell(row[name]) for name in columns),
        )
    return table


def cap_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows of the cap for a terminal."""
    table = Table(title="Untraced requests beside attributions; p50 / p95 / p99 in milliseconds")
    columns = ["untraced_itl_ms", "untraced_ttft_ms", "untraced_e2e_ms", "attribution_ms"]
    for name in (
        "variant",
        "tokens/s of stock",
        "ITL p99 of stock",
        "longest gap",
        *map(_title, columns),
    ):
        table.add_column(name, justify="left" if name == "variant" else "right")
    for row in rows:
        table.add_row(
            row["variant"],
            f"{row['ratio_to_stock']:.3f}",
            f"{row['untraced_itl_p99_ratio_to_stock']:.2f}",
            f"{row['untraced_longest_gap_ms']:.0f}",
            *(_cell(row[name]) for name in columns),
        )
    return table


def _title(name: str) -> str:
    return name.removesuffix("_ms").replace("_", " ").replace("itl", "ITL").replace("ttft", "TTFT")


def _cell(percentiles: Mapping[str, float] | None) -> str:
    return "-" if percentiles is None else " / ".join(f"{v:.0f}" for v in percentiles.values())
