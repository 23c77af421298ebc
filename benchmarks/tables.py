"""Markdown tables of benchmark results, for the terminal and for the pages of the documentation.

One function per table. Each takes the parsed JSON that a benchmark wrote and returns Markdown, or
"" where there is nothing to show.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
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
    rule: str = "---:"


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


def plain(rows: Sequence[Row]) -> str:
    """A table of every plain value of the rows, with their keys as headings."""

    def text(value: Any) -> str:
        return f"{value:,.3g}" if isinstance(value, float) else str(value)

    every = dict.fromkeys(name for row in rows for name in row)
    nested = {n for row in rows for n, value in row.items() if isinstance(value, dict | list)}
    names = [name for name in every if name not in nested]
    return markdown([Column(name.replace("_", " "), name, text) for name in names], rows)


def markdown(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """A table, its columns aligned as their rules say; a missing value is an empty cell."""
    shown = [c for c in columns if any(row.get(c.key) is not None for row in rows)]
    lines = [_line(c.title for c in shown), _line(c.rule for c in shown)]
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


def hops(result: Result) -> str:
    """What further hops cost, with prefills of their own and without."""
    return markdown(
        [
            *CASE,
            Column("hops", "hops", count),
            Column("prefills", "prefills", str),
            Column("recomputed tokens", "recomputed_tokens", count),
            Column("seconds", "seconds", decimals(2)),
            Column("to one hop", "ratio", decimals(2)),
        ],
        result["rows"],
    )


def targets(result: Result) -> str:
    """What several targets of one answer cost."""
    return markdown(
        [
            *CASE,
            Column("parts", "parts", count),
            Column("hops", "hops", count),
            Column("explained", "way", str),
            Column("recomputed tokens", "recomputed_tokens", count),
            Column("seconds", "seconds", decimals(2)),
            Column("to one target", "ratio", decimals(2)),
        ],
        result["rows"],
    )


def citations(result: Result) -> str:
    """How often a sentence of an answer gets the right citation."""
    pooled = [f"{name} first" for name in result["rows"][0]["first"]]
    rows = [
        row | {title: row["first"][title.removesuffix(" first")] for title in pooled}
        for row in result["rows"]
    ]
    return markdown(
        [
            Column("model", "model", str),
            Column("preset", "preset", str),
            Column("prompt tokens", "tokens", count),
            Column("sentences", "sentences", count),
            *(Column(title, title, decimals(2)) for title in pooled),
            Column("recall", "recall", decimals(2)),
            Column("precision", "precision", decimals(2)),
            Column("false", "false", decimals(2)),
        ],
        rows,
    )


def agent_guard(result: Result) -> str:
    """Flagged tool calls by rule."""
    kinds = result["rows"][0]["calls"]
    calls = ", ".join(f"{number:,} {kind}" for kind, number in kinds.items())
    caption = (
        f"{result['model']}, preset `{result['preset']}`, ratio {result['ratio']:g}, "
        f"calls: {calls} (`python -m benchmarks.agent_guard`):"
    )
    columns = [Column("rule", "rule", str)]
    columns += [Column(kind, kind, decimals(2)) for kind, number in kinds.items() if number]
    columns.append(Column("AUC", "auc", decimals(2)))
    return f"{wrapped(caption)}\n\n{markdown(columns, result['rows'])}"


def agent_sources(result: Result) -> str:
    """How often the instruction that caused a call is its best source, by method."""

    def share(value: Sequence[float]) -> str:
        return f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]"

    first = result["rows"][0]
    titles = {
        "all": "whole context",
        "tools": "tool results",
        "copied": "copied",
        "other": "other",
        "resisted": "resisted",
    }
    columns = [Column("method", "method", str)]
    columns += [
        Column(f"{title} ({first[key][3]})", key, share)
        for key, title in titles.items()
        if key in first
    ]
    return markdown(columns, result["rows"])


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


def gpu_kernels(result: Result) -> str:
    """Times of the kernels, and how many cases agreed with float64."""
    timings: list[Row] = result.get("timings") or []
    if not timings:
        return ""
    checked = ""
    if (found := result.get("correctness")) is not None:
        passed = found["cases"] - found["failed"] - len(found["not_run"])
        checked = f"{count(passed)} of {count(found['cases'])} cases agree with float64. "
    caption = (
        f"Kernels of one layer on {result['device']} (torch {result['torch']}, Triton "
        f"{result['triton']}; `python -m benchmarks.gpu_kernels`). {checked}Milliseconds "
        "of log-sum-exps and column sums of the last rows of a context, bfloat16, beside PyTorch's "
        "attention over contiguous keys and values. The floor takes all products and all memory at "
        "the device's best rates:"
    )
    place = ("layer", "context", "rows")
    ms = {(row["operation"], *(row[key] for key in place)): row["ms"] for row in timings}
    attention = [
        {
            **row,
            "lse_ms": ms.get(("paged_lse", *(row[key] for key in place))),
            "torch_ms": ms.get(("PyTorch attention", *(row[key] for key in place))),
        }
        for row in timings
        if row["operation"] == "paged_column_sums"
    ]
    layer = (Column("layer", "layer", str), Column("context", "context", count))
    parts = [
        wrapped(caption),
        markdown(
            [
                *layer,
                Column("rows", "rows", count),
                Column("log-sum-exps", "lse_ms", decimals(3)),
                Column("with column sums", "ms", decimals(3)),
                Column("PyTorch", "torch_ms", decimals(3)),
                Column("to PyTorch", "ratio_to_torch", decimals(2)),
                Column("TFLOP/s", "tflops", count),
                Column("to floor", "ratio_to_floor", times),
                Column("host", "host_ms", decimals(3)),
            ],
            attention,
        ),
    ]
    exact = [row for row in timings if row["operation"] == "proximity, exact fraction 1.0"]
    if exact:
        shares = sorted({f"{100 * row['far_share']:.0f}" for row in exact})
        layers = " to ".join(sorted({f"{row.get('layers', 1)}" for row in exact}))
        note = (
            f"Exact proximities of all tokens of {layers} layers in one call, where "
            f"{' to '.join(shares)} % of the pairs of a token and a head need more than eight "
            "coordinates:"
        )
        columns = [
            *layer,
            Column("milliseconds", "ms", decimals(3)),
            Column("floor", "floor_ms", decimals(3)),
            Column("host", "host_ms", decimals(3)),
        ]
        parts += [wrapped(note), markdown(columns, exact)]
    return "\n\n".join(parts)


def gpu_engine(*results: Result) -> str:
    """What attributions cost on a GPU, the newest measurement first, and what the plugin costs."""
    rows = [{"what": result["what"], **row} for result in results for row in result["latency"]]
    batches = [
        {"what": result["what"], **result["batch"]} for result in results if "batch" in result
    ]
    first = results[0]
    caption = (
        f"Seconds of a K = 1 attribution and of its floor, the same prefill without a trace, on "
        f"{first['device']} ({first['date']}, {first['attention_backend']}, Qwen3-8B's shape, "
        "`python -m benchmarks.gpu_engine`):"
    )
    parts = [
        wrapped(caption),
        markdown(
            [
                Column("recorded with", "what", str),
                *CASE,
                Column("seconds", "seconds", decimals(3)),
                Column("floor", "floor_seconds", decimals(3)),
                Column("ratio", "ratio_to_floor", decimals(2)),
                Column("recording", "recording_seconds", decimals(3)),
                Column("proximity", "proximity_seconds", decimals(3)),
            ],
            rows,
        ),
        "Requests per second of a batch whose completions are all attributed, and of one without:",
        markdown(
            [
                Column("recorded with", "what", str),
                Column("requests", "requests", count),
                Column("prompt", "prompt", count),
                Column("generated", "new_tokens", count),
                Column("attributed", "traced_rps", decimals(1)),
                Column("not", "untraced_rps", decimals(1)),
                Column("ratio", "ratio", decimals(2)),
            ],
            batches,
        ),
    ]
    if decoding := first.get("decoding"):
        parts += [
            "Generated tokens per second with the plugin, no trace anywhere, and of stock vLLM:",
            markdown(
                [
                    Column("requests", "requests", count),
                    Column("plugin", "plugin_tokens_per_second", count),
                    Column("stock", "stock_tokens_per_second", count),
                    Column("ratio", "ratio", decimals(3)),
                ],
                decoding,
            ),
        ]
    return "\n\n".join(parts)


def gpu_host(result: Result) -> str:
    """Host time of a step on a GPU that is not there, and what was there before."""
    parts = {
        "beginning": "beginning",
        "first_layer": "first layer",
        "other_layer": "other layers",
        "end": "end",
        "step": "step",
    }
    rows = []
    for row in result["rows"]:
        for tree in ("before", "now"):
            if tree in row:
                rows.append({"case": row["case"], "code": tree, **row[tree]})
        if "before" in row:
            ratios = {part: row["now"][part] / row["before"][part] for part in parts}
            rows.append({"case": row["case"], "code": "ratio", **ratios})

    def text(value: float) -> str:
        return decimals(2)(value) if value < _LEAST_MICROSECONDS else count(value)

    shape = result["shape"]
    caption = (
        f"Host time of a step with target rows in microseconds of CPU time, of {shape['layers']} "
        f"layers of {shape['heads']} heads over {shape['kv_heads']} ({result['date']}, "
        f"{result['cpu']}). There was no GPU: the worker's own code ran on a CPU machine, with "
        "launchers and operations that do nothing in the place of a GPU's, so ratios count and "
        "microseconds on a GPU machine are others (`python -m benchmarks.gpu_host --against "
        "FOLDER`):"
    )
    columns = [Column("traces and rows", "case", str, "---"), Column("code", "code", str, "---")]
    columns += [Column(title, part, text) for part, title in parts.items()]
    columns.append(Column("launches", "launches", count))
    return f"{wrapped(caption)}\n\n{markdown(columns, rows)}"


_LEAST_MICROSECONDS = 5


def gpu_code(result: Result) -> str:
    """Machine code of the kernels over attention, and what it was before."""
    rows: list[Any] = []
    order = {row["layer"]: None for row in result["rows"]}
    for layer in order:
        for row in sorted(result["rows"], key=lambda row: str(row["kernel"])):
            if row["layer"] == layer:
                whole, *_, masked = row["loops"]
                rows.append({**row, "whole": whole, "masked": masked})

    def per_weight(loop: Any) -> str:
        spilled = f" ({loop['from_stack']} of them on the stack)" if loop["from_stack"] else ""
        return decimals(1)(loop["instructions_per_weight"]) + spilled

    caption = (
        "Machine code of both passes over attention in bfloat16, compiled for compute capability "
        f"{result['capability'] / 10:.1f} by Triton {result['triton']} ({result['date']}); nothing "
        "ran. Programs at once share a multiprocessor; instructions are those of a thread per "
        "attention weight, in steps whose rows see all keys and in steps with masks "
        "(`python -m benchmarks.gpu_code --against FOLDER`):"
    )
    columns = [
        Column("layer", "layer", str, "---"),
        Column("pass", "kernel", str, "---"),
        Column("code", "code", str, "---"),
        Column("registers", "registers", count),
        Column("bytes of stack", "stack_bytes", count),
        Column("programs at once", "programs_at_once", count),
        Column("instructions per weight", "whole", per_weight),
        Column("with masks", "masked", per_weight),
    ]
    return f"{wrapped(caption)}\n\n{markdown(columns, rows)}"


def wrapped(text: str) -> str:
    """Lines as long as those of the documentation."""
    return textwrap.fill(text, 140, break_on_hyphens=False)


def emit(result: Any, text: str, path: Path | None = None) -> None:
    """Prints a table and writes the result as JSON, if a path is given."""
    print(text)
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"
