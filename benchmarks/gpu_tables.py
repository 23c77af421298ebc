"""The README's table of the kernel benchmark; see `benchmarks.tables`."""

from __future__ import annotations

from benchmarks.tables import Column, Result, Row, count, decimals, markdown, times, wrapped

_MS = decimals(3)


def gpu_kernels(result: Result) -> str:
    """Times of the kernels, and how many cases agreed with float64."""
    timings: list[Row] = result.get("timings") or []
    if not timings:
        return ""
    attention = _attention_rows(timings)
    proximity = [row for row in timings if row["operation"].startswith("proximity")]
    exact = [row for row in proximity if row["operation"].endswith(" 1.0")]
    caption = (
        f"Kernels of one layer on {result['device']} (torch {result['torch']}, Triton "
        f"{result['triton']}; `python -m benchmarks.gpu_kernels`). {_checked(result)}Milliseconds "
        "of log-sum-exps and column sums of the last rows of a context, bfloat16, beside PyTorch's "
        "attention over contiguous keys and values. The floor takes all products and all memory at "
        "the device's best rates:"
    )
    table = markdown(
        [
            Column("layer", "layer", str),
            Column("context", "context", count),
            Column("rows", "rows", count),
            Column("log-sum-exps", "lse_ms", _MS),
            Column("with column sums", "ms", _MS),
            Column("PyTorch", "torch_ms", _MS),
            Column("to PyTorch", "ratio_to_torch", decimals(2)),
            Column("TFLOP/s", "tflops", count),
            Column("to floor", "ratio_to_floor", times),
            Column("host", "host_ms", _MS),
        ],
        attention,
    )
    parts = [wrapped(caption), table]
    if exact:
        shares = sorted({f"{100 * row['far_share']:.0f}" for row in exact})
        note = (
            f"Exact proximities of all tokens, where {' to '.join(shares)} % of the pairs of a "
            "token and a head need more than eight coordinates:"
        )
        parts += [wrapped(note), _proximity_table(exact)]
    return "\n\n".join(parts)


def _proximity_table(rows: list[Row]) -> str:
    return markdown(
        [
            Column("layer", "layer", str),
            Column("context", "context", count),
            Column("milliseconds", "ms", _MS),
            Column("floor", "floor_ms", _MS),
            Column("host", "host_ms", _MS),
        ],
        rows,
    )


def _attention_rows(timings: list[Row]) -> list[Row]:
    """One row of each shape, with the numbers of several operations."""

    def found(operation: str, like: Row) -> float | None:
        keys = ("layer", "context", "rows")
        for row in timings:
            if row["operation"] == operation and all(row[key] == like[key] for key in keys):
                return float(row["ms"])
        return None

    return [
        {
            **row,
            "lse_ms": found("paged_lse", row),
            "torch_ms": found("PyTorch attention", row),
        }
        for row in timings
        if row["operation"] == "paged_column_sums"
    ]


def _checked(result: Result) -> str:
    checked = result.get("correctness")
    if checked is None:
        return ""
    passed = checked["cases"] - checked["failed"] - len(checked["not_run"])
    return f"{count(passed)} of {count(checked['cases'])} cases agree with float64. "
