"""From the rows of a run to the numbers that are committed.

Everything comes from the rows of the cases given, with the number of examples behind
each figure beside it; nothing is left out but by being counted as failed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

import numpy as np

from benchmarks.faithfulness.example import by_sentence, stop_mask
from benchmarks.faithfulness.metrics import (
    FRACTIONS,
    bootstrap,
    holm,
    mass_on_gold,
    paired_test,
    recovery,
    recovery_ceiling,
)
from benchmarks.faithfulness.report import OURS, POOLED
from benchmarks.faithfulness.run import ALL_TOKENS, WITHOUT_STOP_TOKENS, Case, Row, WorkFile
from benchmarks.faithfulness.tasks import variant_of

_TESTED = ("recovery", "recovery_sentence", "mass_on_gold", "rise", "mas")
_FEWEST_TESTED = 8
"""With fewer pairs the smallest possible p, corrected, says nothing."""
_MASSES = ("reasoning_mass", "remaining_mass")
_PERCENT = tuple(round(100 * fraction) for fraction in FRACTIONS)

Values = dict[str, float]


def summarise(
    cases: Sequence[Case],
    wanted: Callable[[Case], Sequence[str]],
    work: WorkFile,
    *,
    seed: int,
) -> dict[str, Any]:
    """The groups, tests, chains and costs of a run.

    Args:
        cases: All examples.
        wanted: Methods that were to run on an example.
        work: What has been done.
        seed: Of the intervals and tests.
    """
    rows = {
        (case.key, method): _values(case, method, work) for case in cases for method in wanted(case)
    }
    groups = _groups(cases)
    perturbed = [row for key, row in work.rows.items() if key[0] == "perturbation"]
    return {
        "groups": [
            _group(task, length, members, wanted, rows, work, seed)
            for (task, length), members in groups.items()
        ],
        "tests": [
            {"task": task, "length": length, "against": OURS, **_tests(members, rows, seed)}
            for (task, length), members in groups.items()
        ],
        "chains": _chains(cases, rows),
        "perturbation_cost": {
            "evaluated": sum(row["evaluations"] for row in perturbed),
            "seconds": sum(row["seconds"] for row in perturbed),
        },
    }


def rounded(value: Any, digits: int = 3) -> Any:
    """The same with every number at so many significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    return value


def _groups(cases: Sequence[Case]) -> dict[tuple[str, int], list[Case]]:
    groups: dict[tuple[str, int], list[Case]] = {}
    for case in cases:
        groups.setdefault(case.group, []).append(case)
    made = [case for case in cases if case.group[1]]
    pooled: dict[tuple[str, int], list[Case]] = {}
    for length in sorted({case.group[1] for case in made}):
        members = [case for case in made if case.group[1] == length]
        if len({case.group for case in members}) > 1:
            pooled[POOLED, length] = members
    return {**pooled, **groups}


def _values(case: Case, method: str, work: WorkFile) -> Values | None:
    """Every metric of a method on an example; None where it failed."""
    row = work.get("scores", case.key, method)
    if row is None or "values" not in row:
        return None
    prepared, scores = case.prepared, np.array(row["values"])
    found = {
        "recovery": recovery(scores, prepared.gold),
        "recovery_skip": recovery(scores, prepared.gold, excluded=stop_mask(prepared)),
        "recovery_sentence": recovery(by_sentence(scores, prepared), prepared.gold),
        "mass_on_gold": mass_on_gold(scores, prepared.gold),
        **{name: row["facts"].get(name) for name in _MASSES},
        "seconds": row["seconds"],
        **_perturbed(work.get("perturbation", case.key, method, ALL_TOKENS), ""),
        **_perturbed(work.get("perturbation", case.key, method, WITHOUT_STOP_TOKENS), "_skip"),
    }
    return {key: float(value) for key, value in found.items() if value is not None}


def _perturbed(row: Row | None, suffix: str) -> Values:
    if row is None:
        return {}
    values = {"rise": row["rise"], "mas": row["mas"]}
    for name in ("comprehensiveness", "sufficiency"):
        values |= {f"{name}_{p}": v for p, v in zip(_PERCENT, row[name], strict=True)}
    return {f"{key}{suffix}": value for key, value in values.items()}


def _group(
    task: str,
    length: int,
    cases: Sequence[Case],
    wanted: Callable[[Case], Sequence[str]],
    rows: Mapping[tuple[str, str], Values | None],
    work: WorkFile,
    seed: int,
) -> dict[str, Any]:
    methods = list(dict.fromkeys(method for case in cases for method in wanted(case)))
    facts = [case.prepared for case in cases]
    ceilings = [recovery_ceiling(p.num_user_tokens, p.gold) for p in facts if p.gold]
    return {
        "task": task,
        "length": length,
        "examples": len(cases),
        "prompt_tokens": fmean(p.prompt_length for p in facts),
        "response_tokens": fmean(p.response_length for p in facts),
        "gold_tokens": fmean(len(p.gold) for p in facts),
        "recovery_ceiling": fmean(c for c in ceilings if c is not None) if ceilings else None,
        "methods": {m: _method(m, cases, rows, work, seed) for m in methods},
    }


def _method(
    method: str,
    cases: Sequence[Case],
    rows: Mapping[tuple[str, str], Values | None],
    work: WorkFile,
    seed: int,
) -> dict[str, Any]:
    """Numbers of a method: of each metric mean, ends of the interval, and examples if not ``n``."""
    asked = [case for case in cases if (case.key, method) in rows]
    known = [values for case in asked if (values := rows[case.key, method]) is not None]
    metrics: dict[str, list[float]] = {}
    for values in known:
        for key, value in values.items():
            metrics.setdefault(key, []).append(value)
    seconds = metrics.pop("seconds", [])
    failures: Counter[str] = Counter()
    degenerate: Counter[str] = Counter()
    for case in asked:
        row = work.get("scores", case.key, method) or {"reason": "not run"}
        if "values" not in row:
            failures[row["reason"]] += 1
        perturbed = work.get("perturbation", case.key, method, ALL_TOKENS)
        if perturbed is not None and perturbed["case"]:
            degenerate[perturbed["case"]] += 1
    result: dict[str, Any] = {"n": len(known), "failed": sum(failures.values())}
    if failures:
        result["reasons"] = dict(failures)
    if degenerate:
        result["degenerate"] = dict(degenerate)
    if seconds:
        result["seconds"] = median(seconds)
    for key, numbers in metrics.items():
        result[key] = bootstrap(numbers, seed=seed)
        if len(numbers) != len(known):
            result[key].append(len(numbers))
    return result


def _tests(
    cases: Sequence[Case], rows: Mapping[tuple[str, str], Values | None], seed: int
) -> dict[str, Any]:
    """For each metric and other method: pairs, mean of ours minus it, p, p after Holm."""
    methods = dict.fromkeys(method for _, method in rows if method != OURS)
    results: dict[str, Any] = {}
    for metric in _TESTED:
        found = {}
        for method in methods:
            pairs = [
                (ours[metric], other[metric])
                for case in cases
                if (ours := rows.get((case.key, OURS))) and (other := rows.get((case.key, method)))
                if metric in ours and metric in other
            ]
            if len(pairs) >= _FEWEST_TESTED:
                found[method] = paired_test(*zip(*pairs, strict=True), seed=seed)
        corrected = holm({method: p for method, (_, _, p) in found.items()})
        if found:
            results[metric] = {m: [*test, corrected[m]] for m, test in found.items()}
    return results


def _chains(
    cases: Sequence[Case], rows: Mapping[tuple[str, str], Values | None]
) -> list[dict[str, Any]]:
    """By variant of a task and length: tokens of reasoning, mass on it, mass left, recovery."""
    groups: dict[tuple[str, str, int], list[Case]] = {}
    for case in cases:
        variant = variant_of(case.prepared.example.id)
        if variant and case.group[1]:
            groups.setdefault((case.group[0], variant, case.group[1]), []).append(case)
    chains = []
    for (task, variant, length), members in groups.items():
        first_hop = [v["reasoning_mass"] for c in members if (v := rows.get((c.key, OURS)))]
        means: dict[str, dict[str, float]] = {"recovery": {}, "remaining_mass": {}}
        for hops in ("k0", "k1", "k2", "k3", "auto"):
            found = [v for c in members if (v := rows.get((c.key, f"flashtrace-{hops}")))]
            for metric, by_hops in means.items():
                numbers = [v[metric] for v in found if metric in v]
                if numbers:
                    by_hops[hops] = fmean(numbers)
        chains.append(
            {
                "task": task,
                "variant": variant,
                "length": length,
                "n": len(members),
                "reasoning_tokens": fmean(
                    c.prepared.reasoning[1] - c.prepared.reasoning[0] for c in members
                ),
                "reasoning_mass": fmean(first_hop) if first_hop else None,
                **means,
            }
        )
    return chains
