"""Fits the constants of `capacity_constants` to measured seconds.

Invariant: least squares of relative errors with coefficients that are never negative, so that long
measurements do not drown short ones; the largest relative error left is reported with the fit.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.capacity_constants import MEASURED, Constants
from benchmarks.capacity_lengths import Lengths
from benchmarks.capacity_model import Hop, hops_of, visible_pairs

_CPU_BLOCK = 128
_BUDGET = 2048


class Fit(NamedTuple):
    """Coefficients, and the largest relative error of a fitted value."""

    coefficients: list[float]
    worst: float


def nonnegative_fit(features: Sequence[Sequence[float]], values: Sequence[float]) -> Fit:
    """The best non-negative combination of features, by squares of relative errors.

    Tries every subset of the features, of which there are few here.

    Raises:
        ValueError: No value, or one that is not positive.
    """
    target = np.asarray(values, dtype=float)
    if target.size == 0 or not (target > 0).all():
        raise ValueError("a fit needs positive values")
    scaled = np.asarray(features, dtype=float) / target[:, None]
    best, least = np.zeros(scaled.shape[1]), np.inf
    for count in range(1, scaled.shape[1] + 1):
        for chosen in itertools.combinations(range(scaled.shape[1]), count):
            columns = scaled[:, list(chosen)]
            size = np.linalg.norm(columns, axis=0)
            size[size == 0] = 1.0
            solved = np.linalg.lstsq(columns / size, np.ones(target.size), rcond=None)[0] / size
            if (solved < 0).any():
                continue
            error = float(((columns @ solved - 1) ** 2).sum())
            if error < least * (1 - 1e-9):
                best, least = np.zeros(scaled.shape[1]), error
                best[list(chosen)] = solved
    return Fit([float(x) for x in best], float(np.abs(scaled @ best - 1).max()))


def prefill_features(pieces: Sequence[tuple[int, int]]) -> list[float]:
    """Steps, tokens and pairs of prefills ``[first, end)``."""
    return [
        float(sum(-(-(end - first) // _BUDGET) for first, end in pieces)),
        float(sum(end - first for first, end in pieces)),
        sum(visible_pairs(first, end) for first, end in pieces),
    ]


def recorded_pairs(hops: Sequence[Hop]) -> float:
    """Pairs of a target row and a key."""
    return sum(visible_pairs(hop.first_row, hop.end) for hop in hops)


def from_committed_results(folder: Path) -> tuple[Constants, dict[str, float]]:
    """Constants of SmolLM2-135M on one CPU core, from the tables in the README.

    Prefills and traces from ``trace_latency.json`` and ``scaling.json``, decoding from the median
    token gap of the stock server in ``serving.json``.

    Returns:
        The constants, and the largest relative error of each fit.
    """
    latency = json.loads((folder / "trace_latency.json").read_text("utf-8"))
    scaling = json.loads((folder / "scaling.json").read_text("utf-8"))
    serving = json.loads((folder / "serving.json").read_text("utf-8"))
    rows: list[dict[str, Any]] = [
        *latency["rows"],
        *scaling["context"]["rows"],
        *scaling["reasoning"]["rows"],
    ]
    traces = [(row, _hops(row)) for row in rows]
    wholes = [row for row in rows if "uncached_prefill_seconds" in row]
    prefill = nonnegative_fit(
        [prefill_features([(hop.cached, hop.end) for hop in hops]) for _, hops in traces]
        + [prefill_features([(0, row["context"])]) for row in wholes],
        [row["floor_seconds"] for row in rows]
        + [row["uncached_prefill_seconds"] for row in wholes],
    )
    recording = nonnegative_fit(
        [[recorded_pairs(hops)] for _, hops in traces], [row["recording_seconds"] for row in rows]
    )
    proximity = nonnegative_fit(
        [[len(hops), sum(hop.end for hop in hops)] for _, hops in traces],
        [row["proximity_seconds"] + row["transport_seconds"] for row in rows],
    )
    step, token, pair = prefill.coefficients
    sequences = serving["settings"]["concurrency"]
    gap = serving["rows"][0]["itl_ms"]["p50"] / 1000
    constants = Constants(
        name="SmolLM2-135M, one CPU core",
        basis=MEASURED,
        source="benchmarks/results/trace_latency.json, scaling.json and serving.json: float32, "
        f"compiled, one core of a 2-core AMD EPYC machine; decoding at {sequences} sequences",
        gpus=0,
        block_size=_CPU_BLOCK,
        kv_tokens=None,
        step_seconds=step,
        token_seconds=token,
        pair_seconds=pair,
        decode_step_seconds=0.0,  # Measured at one number of sequences, and split evenly on them.
        decode_token_seconds=gap / sequences,
        context_seconds=0.0,  # In the token gap, which was measured at 512 to 768 tokens.
        recording_pair_seconds=recording.coefficients[0],
        hop_seconds=proximity.coefficients[0],
        hop_context_seconds=proximity.coefficients[1],
    )
    worst = {"prefill": prefill.worst, "recording": recording.worst, "proximity": proximity.worst}
    return constants, worst


def _hops(row: dict[str, Any]) -> list[Hop]:
    prompt = row["context"] - row["reasoning"] - row["output"]
    hops = hops_of(Lengths(prompt, row["reasoning"], row["output"]), _CPU_BLOCK, 1)
    if (recomputed := sum(hop.recomputed for hop in hops)) != row["recomputed_tokens"]:
        raise ValueError(f"{recomputed} recomputed tokens do not fit {row}")
    return hops
