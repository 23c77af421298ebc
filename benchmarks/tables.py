"""Markdown tables of benchmark results, one function per table of the README.

Each takes the parsed JSON that a benchmark wrote and returns Markdown, or "" where it has nothing.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Result = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """A heading, and how a row's cell is written.

    A column for which no row has a value is left out.
    """

    title: str
    key: str
    text: Callable[[Any], str]


def count(value: float) -> str:
    """A whole number with separators."""
    return f"{round(value):,}"


def decimals(digits: int) -> Callable[[float], str]:
    """A number with fixed digits after the point."""
    return lambda value: f"{value:,.{digits}f}"


def error(value: float) -> str:
    """A relative error."""
    return f"{value:.1e}"


def times(value: float) -> str:
    """A ratio."""
    return f"{value:.0f}x" if value >= 100 else f"{value:.1f}x"


def percentiles(value: Row) -> str:
    """Milliseconds at p50, p95 and p99."""
    return " / ".join(count(value[p]) if p in value else "-" for p in ("p50", "p95", "p99"))


CASE = (
    Column("context", "context", count),
    Column("reasoning", "reasoning", count),
    Column("output", "output", count),
)


def markdown(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """A table with right-aligned columns; a missing value is an empty cell."""
    shown = [c for c in columns if any(row.get(c.key) is not None for row in rows)]
    lines = [_line(c.title for c in shown), _line("---:" for _ in shown)]
    for row in rows:
        values = [(c, row.get(c.key)) for c in shown]
        lines.append(_line("" if v is None else c.text(v) for c, v in values))
    return "\n".join(lines)


def trace_latency(*results: Result) -> str:
    """Seconds of an attribution beside its floor; several files are told apart by engine."""
    rows = [{"engine": result["engine"], **row} for result in results for row in result["rows"]]
    engine = [Column("engine", "engine", str)] if len(results) > 1 else []
    return markdown(
        [
            *engine,
            *CASE,
            Column("recomputed tokens", "recomputed_tokens", count),
            Column("seconds", "seconds", decimals(2)),
            Column("floor", "floor_seconds", decimals(2)),
            Column("ratio", "ratio_to_floor", decimals(2)),
            Column("prefill", "prefill_seconds", decimals(2)),
            Column("recording", "recording_seconds", decimals(2)),
            Column("proximity", "proximity_seconds", decimals(2)),
            Column("transport", "transport_seconds", decimals(2)),
            Column("extra MiB", "extra_mb", count),
        ],
        rows,
    )


def parity(result: Result) -> str:
    """Errors against a float64 evaluation."""
    return markdown(
        [
            Column("tokens", "tokens", count),
            Column("ours through vLLM", "engine", error),
            Column("authors' package, float32", "package_float32", error),
            Column("authors' package, float64", "package_float64", error),
        ],
        result["rows"],
    )


def vs_reference(result: Result) -> str:
    """Seconds, memory and agreement beside the authors' package."""
    if not result["rows"]:
        return ""
    notes = [
        f"{count(row['context'])} tokens: {row['reference_note']}."
        for row in result["rows"]
        if row.get("reference_note")
    ]
    table = markdown(
        [
            *CASE,
            Column("seconds", "seconds", decimals(2)),
            Column("package, seconds", "reference_seconds", decimals(1)),
            Column("speed-up", "speedup", times),
            Column("relative L1", "relative_l1", error),
            Column("same of top 10", "top10_overlap", count),
            Column("extra MiB", "extra_mb", count),
            Column("package, extra MiB", "reference_extra_mb", count),
            Column("package's attentions", "reference_mode", str),
        ],
        result["rows"],
    )
    settings = result["settings"]
    caption = (
        f"The same attribution by the paper authors' package ({settings['package']}), on the same "
        f"weights and tokens, with as many threads ({settings['threads']}); its time includes its "
        "forward pass (`python -m benchmarks.vs_reference`):"
    )
    return "\n\n".join([wrapped(caption), table, *notes])


def per_token(result: Result) -> str:
    """One attribution of an output beside the package's explanation of each of its tokens."""
    singly = result.get("per_token")
    if singly is None or "reference_seconds" not in singly:
        return ""
    sampled = singly["extrapolated_from"]
    package = "package, token by token"
    if sampled is not None:
        package += f" (extrapolated from {count(sampled)} tokens)"
    agreement = singly["against_sum_of_tokens"]["context"]
    worst = max(token["relative_l1"] for token in singly["single_tokens"])
    row = {
        **singly,
        "single": worst,
        "cosine": agreement["cosine"],
        "sum": agreement["relative_l1"],
    }
    caption = (
        "One attribution of a whole output against the package explaining each of its tokens by "
        "itself. These are different quantities, so the sum over tokens only resembles ours; "
        "a single token explained by both agrees (`--per-token`):"
    )
    table = markdown(
        [
            Column("prompt", "prompt", count),
            Column("output", "output", count),
            Column("ours, seconds", "seconds", decimals(2)),
            Column("package, whole output", "reference_span_seconds", decimals(1)),
            Column(package, "reference_seconds", decimals(1)),
            Column("speed-up", "speedup", times),
            Column("relative L1 of single tokens", "single", error),
            Column("cosine with the tokens' sum", "cosine", decimals(3)),
            Column("relative L1 to it", "sum", error),
        ],
        [row],
    )
    return f"{wrapped(caption)}\n\n{table}"


def scaling(result: Result) -> str:
    """Fitted exponents of each sweep."""
    labels = {
        "context": "tokens of context",
        "reasoning": "tokens of reasoning",
        "concurrency": "attributions at once",
    }
    rows = []
    for name, label in labels.items():
        sweep = result[name]
        first, last = (sweep["rows"][at][sweep["variable"]] for at in (0, -1))
        seconds = [sweep["rows"][at]["seconds"] for at in (0, -1)]
        rows.append(
            {
                **sweep["exponents"],
                "sweep": f"{label}, {count(first)} to {count(last)}",
                "range": f"{seconds[0]:.2f} to {seconds[1]:.2f}",
            }
        )
    caption = (
        "Growth of cost, as exponents fitted in log-log; 1 is linear "
        "(`python -m benchmarks.scaling`):"
    )
    table = markdown(
        [
            Column("sweep", "sweep", str),
            Column("seconds, first to last", "range", str),
            Column("exponent", "seconds", decimals(2)),
            Column("recording", "recording_seconds", decimals(2)),
            Column("proximity", "proximity_seconds", decimals(2)),
            Column("floor", "floor_seconds", decimals(2)),
            Column("prefill of the context", "uncached_prefill_seconds", decimals(2)),
        ],
        rows,
    )
    return f"{wrapped(caption)}\n\n{table}"


def serving(result: Result) -> str:
    """A server under load without the plugin, with it, and with traces."""
    return markdown(
        [
            Column("server", "variant", str),
            Column("requests/s", "throughput_rps", decimals(2)),
            Column("to stock", "ratio_to_stock", decimals(3)),
            Column("output tokens/s", "output_tokens_per_second", decimals(1)),
            Column("first token, ms (p50 / p95 / p99)", "ttft_ms", percentiles),
            Column("between tokens, ms", "itl_ms", percentiles),
            Column("the same, untraced requests", "untraced_itl_ms", percentiles),
            Column("whole request, ms", "e2e_ms", percentiles),
            Column("the same, traced requests", "traced_e2e_ms", percentiles),
        ],
        result["rows"],
    )


def cap(result: Result) -> str:
    """What untraced requests feel of attributions beside them, by the traces' token share."""
    caption = (
        "Untraced requests while long existing texts are attributed beside them, by "
        "`trace_token_share` (`python -m benchmarks.serving --shares 1.0 0.25`):"
    )
    table = markdown(
        [
            Column("server", "variant", str),
            Column("between tokens, ms (p50 / p95 / p99)", "untraced_itl_ms", percentiles),
            Column("p99 to stock", "untraced_itl_p99_ratio_to_stock", decimals(2)),
            Column("longest gap, ms", "untraced_longest_gap_ms", count),
            Column("attributions", "attributions", count),
            Column("attribution, ms", "attribution_ms", percentiles),
        ],
        result["cap"],
    )
    return f"{wrapped(caption)}\n\n{table}"


def wrapped(text: str) -> str:
    """Lines as long as the README's."""
    return textwrap.fill(text, 140, break_on_hyphens=False)


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"
