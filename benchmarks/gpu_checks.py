"""Compares every kernel with float64, case by case, in several processes on one GPU.

A kernel passes only if its numbers are finite and within the case's tolerance, a second call gives
the same bits, and nothing is written where nothing belongs. Most of the time goes into compiling,
which is why processes share the work. One that dies or hangs takes nothing with it but time; what
it left is run again, one process each, so that every case ends as passed, failed or not run.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_cases import (
    LAYER,
    UNTOUCHED,
    Case,
    Inputs,
    lse_and_column_sums,
    make_inputs,
    pair_proximities,
)
from benchmarks.gpu_timing import Forms, forms_on, triton_on
from vllm_flashtrace.kernels import (
    Accumulators,
    KeptQueries,
    LayerKeys,
    PagedRows,
    ProximityLayer,
    ProximityTrace,
)

EXACT_FRACTIONS = (1.0, 0.9)
_TINY = 1e-30  # Nothing, where nothing is expected, is no error.
_LONGEST_WAIT = 90.0
"""Seconds without any result after which what is missing counts as lost."""
_MOST_RETRIES = 12

_Comparison = tuple[str, float, str]
"""Kernel, relative error, and what else is wrong or ""."""


@dataclass(slots=True)
class Outcome:
    """Of a case: the largest relative error of each kernel, and a line for everything wrong."""

    name: str
    errors: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    crashed: bool = False


def check_case(case: Case, device_name: str) -> Outcome:
    """Runs all comparisons of a case; an exception becomes a failure."""
    outcome, device = Outcome(case.name), torch.device(device_name)
    try:
        with triton_on(device):
            for kernel, error, problem in _comparisons(forms_on(device), make_inputs(case, device)):
                outcome.errors[kernel] = max(error, outcome.errors.get(kernel, 0.0))
                if not error <= case.tolerance:
                    outcome.failures.append(f"{kernel}: relative error {error:.1e}")
                if problem:
                    outcome.failures.append(f"{kernel}: {problem}")
    except Exception as error:
        outcome.crashed = True
        outcome.failures.append(f"{type(error).__name__}: {str(error).strip()[:300]}")
    return outcome


def _comparisons(forms: Forms, inputs: Inputs) -> Iterator[_Comparison]:
    device = inputs.query.device
    # Eight-bit floats cannot be indexed.
    query = inputs.query.float() if inputs.query.itemsize == 1 else inputs.query
    expected = []
    for t in inputs.traces:
        placed = (t.positions.to(device), t.weights.to(device))
        expected.append(lse_and_column_sums(query[t.rows.to(device)], t.keys, *placed, inputs.form))
    layer = inputs.attention(inputs.paged_rows(inputs.accumulators()))
    first, second = (forms.lse(layer) for _ in range(2))
    lse = torch.cat([lse for lse, _ in expected])
    if first.shape != lse.shape:
        raise AssertionError(f"lse has shape {tuple(first.shape)}, not {tuple(lse.shape)}")
    error = (first.double() - lse).abs() / lse.abs().clamp(min=1)
    yield "lse", _number(error.max()), _repeats(first, second)
    yield from _check_column_sums(forms, inputs, [sums for _, sums in expected])
    yield from _check_row_sums(forms, inputs)
    for fraction in EXACT_FRACTIONS:
        yield _check_proximity(forms, inputs, fraction)


def _check_column_sums(
    forms: Forms, inputs: Inputs, expected: list[Tensor]
) -> Iterator[_Comparison]:
    def add(rows: PagedRows) -> None:
        forms.column_sums(inputs.attention(rows), LAYER)

    def add_kept(rows: PagedRows) -> None:
        heads, dim = inputs.query.shape[1:]
        row = KeptQueries.row_bytes(LAYER + 1, heads, dim, inputs.query.dtype)
        memory = torch.empty((len(rows) + 16) * row, dtype=torch.uint8, device=rows.device)
        kept = KeptQueries.within(memory, rows, LAYER + 1, dim, inputs.query.dtype)
        if kept is None or not kept.keep(LAYER, inputs.query):
            raise AssertionError("queries were not kept")
        forms.kept_column_sums(kept, [LayerKeys(LAYER, inputs.key_cache, inputs.form)])

    whole, again, chunked, at_end = (inputs.accumulators() for _ in range(4))
    add_kept(inputs.paged_rows(at_end))
    add(inputs.paged_rows(whole))
    add(inputs.paged_rows(again))
    add(inputs.paged_rows(chunked, half=0))
    if any(part.rows > 1 for part in inputs.case.parts):
        add(inputs.paged_rows(chunked, half=1))
    for index, sums in enumerate(expected):
        columns = sums.shape[1]
        ours, repeated, parts, kept = (
            a[index].column_sums[LAYER, :, :columns] for a in (whole, again, chunked, at_end)
        )
        problem = _repeats(ours, repeated) or _untouched(whole[index], columns)
        yield "column_sums", relative_error(ours, sums), problem
        yield "column_sums_chunked", relative_error(parts, sums), ""
        yield "column_sums_kept", relative_error(kept, sums), _untouched(at_end[index], columns)


def _untouched(sums: Accumulators, columns: int) -> str:
    others = [part[1 - LAYER] for part in sums] + [sums.column_sums[LAYER, :, columns:]]
    if all(bool((other == UNTOUCHED).all()) for other in others):
        return ""
    return "wrote outside its columns or layer"


def _check_row_sums(forms: Forms, inputs: Inputs) -> Iterator[_Comparison]:
    first, second = inputs.accumulators(), inputs.accumulators()
    for sums in (first, second):
        rows = inputs.paged_rows(sums)
        forms.row_sums(rows, LAYER, residual=inputs.residual, stream=inputs.residual)
    device = inputs.residual.device
    for trace, ours, again in zip(inputs.traces, first, second, strict=True):
        residual = inputs.residual[trace.rows.to(device)].double()
        expected = trace.weights.to(device).double() @ residual
        for name in ("residual", "stream"):
            sums, repeated = getattr(ours, name)[LAYER], getattr(again, name)[LAYER]
            problem = _repeats(sums, repeated) or _untouched(ours, len(trace.keys))
            yield "row_sums", relative_error(sums, expected), problem


def _check_proximity(forms: Forms, inputs: Inputs, fraction: float) -> _Comparison:
    """The first trace; sums fall off steeply over tokens, and one in five is zero."""
    case, trace, device = inputs.case, inputs.traces[0], inputs.query.device
    generator = torch.Generator(device).manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    context, width = case.parts[0].context, case.heads * case.head_dim
    column_sums = draw(case.heads, context + 5)[:, :context]
    column_sums.pow_(6).mul_(0.002).masked_fill_(draw(case.heads, context) < -0.84, 0)
    weight = (draw(case.hidden, width) * width**-0.5).to(inputs.residual.dtype)
    stream = draw(case.hidden).masked_fill_(draw(case.hidden) < -2, 0)
    layer = ProximityLayer(LAYER, inputs.value_cache, weight, case.value_scale)

    def proximities() -> tuple[Tensor, str]:
        sums = inputs.accumulators()[0]
        sums.stream[LAYER] = stream
        sums.column_sums[LAYER, :, :context] = column_sums
        own = sums._replace(column_sums=sums.column_sums[..., :context])
        results = stream.new_empty(2, len(sums.stream), dtype=torch.float64)
        forms.proximities([layer], [ProximityTrace(own, trace.block_table, *results, fraction)])
        return own.column_sums[LAYER, 0], _untouched(sums, context)

    (first, outside), (second, _) = proximities(), proximities()
    exact, bounds = pair_proximities(column_sums, trace.values, weight, stream, case.value_scale)
    name = "proximity" if fraction == 1 else f"proximity_{fraction}"
    return name, proximity_error(first, exact, bounds, fraction), _repeats(first, second) or outside


def proximity_error(ours: Tensor, exact: Tensor, bounds: Tensor, fraction: float) -> float:
    """How far tokens ``[N]`` lie outside what they may be, relative to the proximities.

    Pairs with the largest ``bounds``, which together hold ``fraction`` of the total, must be
    ``exact``; others may lie between proximity and bound (both ``[H, N]``).
    """
    highest = exact
    if fraction < 1:
        ranked = bounds.flatten().sort(descending=True).values
        mass = ranked.cumsum(0)
        last = int(torch.searchsorted(mass, fraction * mass[-1:]))
        least = ranked[min(last, len(ranked) - 1)]
        # A pair at the threshold may round to either side of it.
        highest = torch.where(bounds < least * 1.001, bounds, exact)
    low, high = exact.sum(dim=0), highest.sum(dim=0)
    return relative_error(torch.minimum(torch.maximum(low, ours.double()), high), ours.double())


def relative_error(ours: Tensor, expected: Tensor) -> float:
    """The larger of the L1 and the largest difference, each relative to its own norm; worst row."""
    ours, expected = ours.double(), expected.double()
    difference, size = (ours - expected).abs(), expected.abs()
    of_sum = difference.sum(dim=-1) / size.sum(dim=-1).clamp(min=_TINY)
    of_largest = difference.amax(dim=-1) / size.amax(dim=-1).clamp(min=_TINY)
    return _number(torch.maximum(of_sum, of_largest).max())


def _number(error: Tensor) -> float:
    """What is not a number is infinitely wrong."""
    return float(error.nan_to_num(nan=float("inf")))


def _repeats(first: Tensor, second: Tensor) -> str:
    return "" if torch.equal(first, second) else "a second call gives other bits"


def run_checks(
    cases: Sequence[Case],
    device: str,
    jobs: int,
    limit_seconds: float,
    on_done: Callable[[], None],
) -> dict[str, Any]:
    """Checks all cases in ``jobs`` processes, or in this one.

    Returns:
        ``cases``, ``failed``, ``not_run`` (names that the time did not suffice for), ``seconds``,
        ``errors`` (worst of each kernel by type) and ``failures`` (name, lines and errors).
    """
    began = time.perf_counter()
    deadline = began + limit_seconds
    outcomes: dict[str, Outcome] = {}
    if jobs == 1:
        for case in cases:
            if time.perf_counter() > deadline:
                break
            outcomes[case.name] = check_case(case, device)
            on_done()
    else:
        outcomes = _run_pool(cases, device, jobs, deadline, on_done)
        again = [c for c in cases if c.name not in outcomes or outcomes[c.name].crashed]
        for case in again[:_MOST_RETRIES]:
            outcomes |= _run_pool([case], device, 1, deadline, on_done)
    worst: dict[str, dict[str, float]] = {}
    for case in cases:
        kind = worst.setdefault("float32" if case.tolerance < 1e-4 else "narrower", {})
        if case.name in outcomes:
            for kernel, error in outcomes[case.name].errors.items():
                kind[kernel] = max(error, kind.get(kernel, 0.0))
    failed = [outcome for outcome in outcomes.values() if outcome.failures]
    return {
        "cases": len(cases),
        "failed": len(failed),
        "not_run": [case.name for case in cases if case.name not in outcomes],
        "seconds": time.perf_counter() - began,
        "errors": worst,
        "failures": [{"name": o.name, "failures": o.failures, "errors": o.errors} for o in failed],
    }


def _run_pool(
    cases: Sequence[Case], device: str, jobs: int, deadline: float, on_done: Callable[[], None]
) -> dict[str, Outcome]:
    """What finished, by name. Ends its processes in any case."""
    outcomes: dict[str, Outcome] = {}
    if time.perf_counter() > deadline:
        return outcomes
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:  # Terminates on leaving.
        results = pool.imap_unordered(_check, [(case, device) for case in cases])
        for _ in cases:
            remaining = min(_LONGEST_WAIT, deadline - time.perf_counter())
            try:
                outcome = results.next(timeout=max(0.0, remaining))
            except multiprocessing.TimeoutError:
                break
            outcomes[outcome.name] = outcome
            on_done()
    return outcomes


def _check(arguments: tuple[Case, str]) -> Outcome:
    return check_case(*arguments)
