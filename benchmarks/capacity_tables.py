"""The README's tables of cost at scale; see `benchmarks.tables`."""

from __future__ import annotations

from benchmarks.tables import Column, Result, Row, count, decimals, markdown, wrapped

_MIB = 1 << 20


def capacity(result: Result) -> str:
    """Seconds and dollars by replica and traffic, then latencies by traced share."""
    settings = result["settings"]
    [cpu] = [c for c in result["constants"] if not c["gpus"]][:1]
    fits = result["worst_relative_error_of_cpu_fit"]
    worst = ", ".join(f"{name} {_percent(value)}" for name, value in fits.items())
    caption = (
        "Cost of a completion and of its attribution, in seconds of a replica. **No GPU was "
        f"measured.** *Measured*: constants fitted to {cpu['source']} (largest relative errors of "
        f"fitted values: {worst}). *Data sheet*: operations and bytes counted, at the "
        f"{settings['gpu']}'s data-sheet rates: a lower bound. *Assumed*: at "
        f"{_percent(settings['compute_share'])} of its matrix rate and "
        f"{_percent(settings['memory_share'])} of its memory's. Assumptions, too, are "
        f"${settings['dollars_per_gpu_hour']:.2f} per GPU hour, {settings['batch']} sequences in a "
        "step where the KV cache has room, the lengths, and a prefix that is still cached; all but "
        "the last are options (`python -m benchmarks.capacity`):"
    )
    shown = [s for s in settings["shares"] if s]
    costs = markdown(
        [
            Column("traffic", "traffic", str),
            Column("replica", "replica", str),
            Column("basis", "basis", str),
            Column("completion, s", "completion_seconds", decimals(3)),
            Column("attribution, s", "trace_seconds", decimals(3)),
            *(Column(f"{_percent(s)} traced", f"slower {s}", _more) for s in shown),
            Column("$ per million completions", "completions", count),
            Column("$ per million attributions", "explanations", count),
            Column("$ per million explained completions", "explained", count),
        ],
        [_cost(row) for row in result["costs"]],
    )
    if not (rows := result["simulation"]):
        return f"{wrapped(caption)}\n\n{costs}"
    load = (
        f"In simulation, {settings['replicas']} replicas ({rows[0]['replica']}, "
        f"{rows[0]['basis']}) under Poisson arrivals at {_percent(settings['load'])} of what "
        f"saturates them untraced, `trace_token_share` {settings['trace_token_share']}, "
        f"`max_concurrent_traces` {settings['max_concurrent_traces']}:"
    )
    simulated = markdown(
        [
            Column("traffic", "traffic", str),
            Column("requests/s", "requests_per_second", decimals(1)),
            Column("traced", "share", _percent),
            Column("time in steps", "utilisation", _percent),
            Column("sequences at once", "sequences", decimals(1)),
            Column("completion, s (p50 / p95)", "completion_seconds", _middle),
            Column("attribution after it, s", "lag_seconds", _middle),
        ],
        rows,
    )
    return f"{wrapped(caption)}\n\n{costs}\n\n{wrapped(load)}\n\n{simulated}"


def capacity_memory(result: Result) -> str:
    """Accumulators of a trace by model and context."""
    concurrent = result["settings"]["max_concurrent_traces"]
    contexts = list(result["memory"][0]["trace_bytes"])
    caption = (
        "Accumulators of one trace in MiB on each tensor-parallel rank, as the server's own budget "
        "counts them: `layers * heads / ranks * context` floats and two residual vectors a layer. "
        "Shapes as published (L layers, H query and G key/value heads of size d, hidden size D):"
    )
    table = markdown(
        [
            Column("model", "model", str),
            Column("L / H / G / d / D", "shape", str),
            Column("ranks", "ranks", count),
            *(Column(f"{count(int(c))} tokens", c, decimals(0)) for c in contexts),
            Column(f"{concurrent} at once, {count(int(contexts[-1]))}", "concurrent", count),
            Column("to the KV cache of its context", "to_kv", _percent_1),
        ],
        [
            {
                **row,
                **{c: row["trace_bytes"][c] / _MIB for c in contexts},
                "shape": " / ".join(
                    str(row[k]) for k in ("layers", "heads", "kv_heads", "head_dim", "hidden")
                ),
                "concurrent": row["concurrent_bytes"] / _MIB,
            }
            for row in result["memory"]
        ],
    )
    return f"{wrapped(caption)}\n\n{table}"


def capacity_check(result: Result) -> str:
    """Two measured replicas beside their prediction."""
    settings, held = result["settings"], result["accumulators"]
    caption = (
        f"The model against {settings['replicas']} real replicas ({settings['model']}, one core "
        f"and {settings['clients_per_replica']} clients each, "
        f"{settings['rounds'] * settings['requests']} requests a row): "
        "constants measured on one replica while the other is idle, throughput and latencies "
        "predicted by simulating the same requests. *Scaled* corrects every row by what the "
        "untraced row shows two busy replicas to take from each other. The worker counts "
        f"{count(held['worker_bytes_per_token'])} bytes of accumulators a token, the shape "
        f"{count(held['computed_bytes_per_token'])} "
        "(`python -m benchmarks.capacity --check`):"
    )
    table = markdown(
        [
            Column("traced", "share", _percent),
            Column("requests/s", "requests_per_second", decimals(3)),
            Column("by round", "rounds", _rates),
            Column("cores taken by other processes", "other_cores", decimals(2)),
            Column("predicted", "predicted_requests_per_second", decimals(3)),
            Column("error", "error", _more_1),
            Column("error, scaled", "scaled_error", _more_1),
            Column("completion, s (p50 / p95)", "completion_seconds", _middle),
            Column("predicted completion, s", "predicted_completion_seconds", _middle),
            Column("attribution after it, s", "lag_seconds", _middle),
            Column("predicted attribution, s", "predicted_lag_seconds", _middle),
        ],
        result["rows"],
    )
    return f"{wrapped(caption)}\n\n{table}"


def _cost(row: Row) -> Row:
    return {
        **row,
        **{f"slower {share}": slower for share, slower in row["slower_by_share"].items()},
        **row.get("dollars", {}),
    }


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _percent_1(share: float) -> str:
    return f"{100 * share:.1f} %"


def _more(share: float) -> str:
    return f"{100 * share:+.2g} %"


def _more_1(share: float) -> str:
    return f"{100 * share:+.1f} %"


def _rates(values: list[float]) -> str:
    return " / ".join(f"{value:.2f}" for value in values)


def _middle(value: Row) -> str:
    return " / ".join(_seconds(value[p]) for p in ("p50", "p95"))


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:,.1f}"
