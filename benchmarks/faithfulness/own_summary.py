"""Numbers and tables of `benchmarks.faithfulness.own_answers`, from the rows of its work file."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.citations import Pooling, best
from benchmarks.faithfulness.example import Values
from benchmarks.faithfulness.metrics import bootstrap, holm, paired_test
from benchmarks.faithfulness.report import markdown, seconds_text, star
from benchmarks.faithfulness.summary import rounded
from vllm_flashtrace.core.head_weights import HeadExample, fit_head_weights, rank_correlation
from vllm_flashtrace.text.plan import skip_mask

POOLINGS: dict[str, Pooling] = {
    "mean": lambda scores: float(scores.mean()),
    "words": lambda scores: float(scores.mean()),
    "sum": lambda scores: float(scores.sum()),
    "best 1": best(1),
    "best 2": best(2),
    "best 4": best(4),
}
"""How the scores of a sentence's tokens become one; punctuation is left out of all but the mean of
all tokens, by which the product orders sentences, and the sum."""
_OF_ALL_TOKENS = ("mean", "sum")
SHOWN = "mean"
"""The pooling of the tables."""
DROPS = (1, 3, 5)
"""How many of the best sentences are taken out."""
REFERENCE = "loo-sentence"
"""The method that the others are tested against."""
DEFAULTS = "flashtrace-auto-predicting-skip"
"""The method that is the server's default."""
HEADS = "heads-learned"
"""Attention by weights of heads that have not seen the task, as ``vllm-flashtrace fit-heads``
learns them."""
_RIDGE = 3.0
_FEWEST = 6
"""Answers to learn from."""


def found(scores: Values, gold: frozenset[int]) -> float:
    """Share of the gold sentences among as many best ones; ties count against the method."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i in gold))
    return len(gold & set(order[: len(gold)])) / len(gold)


def spearman(first: Values, second: Values) -> float:
    """Rank correlation; 0 where one side is constant."""
    return rank_correlation(torch.from_numpy(first), torch.from_numpy(second))


def kept_of(row: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    """Which sentences each ablation keeps, ``[ablations, sentences]`` of 0 and 1."""
    return np.array([[float(c) for c in mask] for mask in row["kept"]])


def pooled(case: Any, values: Values) -> dict[str, Values]:
    """Of each pooling the scores of the sentences."""
    prepared = case.prepared
    offset = prepared.user[0]
    skipped = skip_mask(prepared.texts[slice(*prepared.user)], "punctuation")
    assert skipped is not None
    rest = ~skipped.numpy()
    by_pooling: dict[str, list[float]] = {name: [] for name in POOLINGS}
    for first, end in prepared.sentences:
        part = slice(first - offset, end - offset)
        own = values[part]
        words = own[rest[part]]
        for name, pool in POOLINGS.items():
            by_pooling[name].append(
                pool(own if name in _OF_ALL_TOKENS or not len(words) else words)
            )
    return {name: np.array(scores) for name, scores in by_pooling.items()}


def sentence_scores(cases: Sequence[Any], work: Any) -> dict[tuple[str, str], dict[str, Values]]:
    """Scores of the sentences, by method and pooling, and by example."""
    scores: dict[tuple[str, str], dict[str, Values]] = {}
    methods = dict.fromkeys(key[2] for key in work.rows if key[0] == "scores")
    for case in cases:
        for method in methods:
            row = work.get("scores", case.key, method)
            if row is None or "values" not in row:
                continue
            for pooling, own in pooled(case, np.array(row["values"])).items():
                scores.setdefault((method, pooling), {})[case.key] = own
    for name, own in _from_attention(cases, work).items():
        scores[name, "sum"] = own
    for name, own in _verified(cases, work, scores).items():
        scores[name, "mean"] = own
    return scores


def _from_attention(cases: Sequence[Any], work: Any) -> dict[str, dict[str, Values]]:
    """The mean over the heads of the rows that predict, and weights learned from other tasks."""
    sums: dict[str, Values] = {}
    examples: dict[str, dict[str, HeadExample]] = {}
    for case in cases:
        row = work.get("attention", case.key, "predicting")
        if row is None:
            continue
        sums[case.key] = np.array(row["sums"])
        ablated = work.get("training", case.key) or work.get("ablations", case.key)
        if ablated is not None:
            examples.setdefault(case.task, {})[case.key] = HeadExample(
                torch.from_numpy(sums[case.key])[:, None],  # As if of one layer.
                torch.from_numpy(kept_of(ablated)),
                torch.tensor(ablated["logprobs"], dtype=torch.float64),
            )
    learned: dict[str, Values] = {}
    for task in dict.fromkeys(case.task for case in cases):
        others = [e for name, own in examples.items() if name != task for e in own.values()]
        if len(others) >= _FEWEST:
            weights = fit_head_weights(others, _RIDGE).double().flatten().numpy()
            for case in cases:
                if case.task == task and case.key in sums:
                    learned[case.key] = sums[case.key] @ weights
    results = {"heads-mean": {key: own.sum(1) for key, own in sums.items()}, HEADS: learned}
    return {name: own for name, own in results.items() if own}


VERIFIED = (2, 4)
"""How many of the best sentences are taken out, as ``verify`` does."""
_VERIFIED = "-verified"
_REST = 1e-6
"""What the scores of sentences that were not verified add up to."""


def _verified(
    cases: Sequence[Any], work: Any, scores: Mapping[tuple[str, str], Mapping[str, Values]]
) -> dict[str, dict[str, Values]]:
    """What is lost without each of our best sentences (nats), and next to nothing for the others.

    The order is that of `order_of`: what was verified stays ahead of what was not.
    """
    results: dict[str, dict[str, Values]] = {}
    for method in ("flashtrace-k1", DEFAULTS):
        for count in VERIFIED:
            own: dict[str, Values] = {}
            for case in cases:
                ours = scores.get((method, SHOWN), {}).get(case.key)
                lost = scores.get(("loo-sentence", "mean"), {}).get(case.key)
                if ours is None or lost is None:
                    continue
                sizes = np.array([end - start for start, end in case.prepared.sentences])
                top = np.argsort(-ours, kind="stable")[:count]
                values = _REST * ours / ours.sum()
                nats = (lost * sizes)[top]
                values[top] = np.where(np.abs(nats) > _REST, nats, 2 * _REST)
                own[case.key] = values
            if own:
                results[f"{method}{_VERIFIED}{count}"] = own
    return results


def order_of(method: str, values: Values) -> Values:
    """Scores that put sentences in the order of a method.

    Sentences that were verified stay ahead of the others, also where the answer is likelier without
    them.
    """
    if _VERIFIED not in method:
        return values
    verified = np.abs(values) > _REST
    return np.where(verified, values - min(values.min(), 0.0) + 1.0, values)


def seconds_of(method: str, key: str, work: Any) -> float | None:
    """What a method cost on an example."""
    if method.startswith("heads-"):
        row = work.get("attention", key, "predicting")
        base = work.get("scores", key, "flashtrace-k0")
        if row is None or base is None:
            return None
        return float(row["seconds"] + base["facts"]["prefill_seconds"])
    if _VERIFIED in method:
        ours = seconds_of(method.rsplit("-", 1)[0], key, work)
        lost = work.get("scores", key, "loo-sentence")
        if ours is None or lost is None:
            return None
        share = (1 + int(method.rsplit(_VERIFIED, 1)[1])) / lost["facts"]["evaluations"]
        return float(ours + share * lost["seconds"])
    row = work.get("scores", key, method)
    return None if row is None or "values" not in row else float(row["seconds"])


def summarise(
    cases: Sequence[Any],
    everyone: Sequence[Any],
    options: argparse.Namespace,
    work: Any,
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    """What goes into the JSON file.

    Args:
        cases: The right answers that are explained by more than the cheapest methods.
        everyone: All right answers, which weights of heads are learned from.
        options: What was asked for.
        work: What has been done.
        environment: The model, the machine and the versions.
    """
    by_key = {case.key: case for case in cases}
    scores = {
        name: {key: values for key, values in own.items() if key in by_key}
        for name, own in sentence_scores(everyone, work).items()
    }
    rows = []
    for (method, pooling), own in scores.items():
        values: dict[str, list[float]] = {}
        tasks: dict[str, list[float]] = {}
        for key, sentence in own.items():
            case = by_key[key]
            value = found(order_of(method, sentence), case.gold)
            values.setdefault("found", []).append(value)
            tasks.setdefault(case.task, []).append(value)
            row = work.get("ablations", key)
            if row is not None:
                predicted = kept_of(row) @ sentence
                values.setdefault("lds", []).append(spearman(predicted, np.array(row["logprobs"])))
            lost = work.get("drops", key, method)
            if lost is not None and pooling == "mean":
                for k, value in zip(DROPS, lost["lost"], strict=True):
                    values.setdefault(f"drop{k}", []).append(value)
        seconds = [
            s
            for key in own
            if by_key[key].number < max(1, options.ablated)  # Which every method in vLLM has.
            if (s := seconds_of(method, key, work)) is not None
        ]
        rows.append(
            {
                "method": method,
                "pooling": pooling,
                "n": len(own),
                "tasks": {task: fmean(v) for task, v in tasks.items()},
                "seconds": median(seconds) if seconds else None,
                **{name: [*bootstrap(v, seed=0), len(v)] for name, v in values.items()},
            }
        )
    answers: dict[str, list[int]] = {}
    for key, row in work.rows.items():
        if key[0] == "answer" and (task := key[1].split("/")[0]) in options.tasks:
            counts = answers.setdefault(task, [0, 0])
            counts[0] += row["right"]
            counts[1] += 1
    lengths = [case.prepared.prompt_length for case in cases]
    config = {
        key: value for key, value in vars(options).items() if key not in ("json", "model", "figure")
    }
    return rounded(
        {
            "config": config,
            "environment": environment,
            "answers": answers,
            "cases": {t: sum(c.task == t for c in cases) for t in options.tasks},
            "prompt_tokens": fmean(lengths) if lengths else None,
            "wall_seconds": work.seconds,
            "rows": rows,
            "tests": _tests(scores, by_key),
        }
    )


def widely(cases: Sequence[Any], methods: Sequence[str], work: Any) -> dict[str, Any]:
    """What the cheapest methods find on all answers; ``test`` is the defaults less each of them."""
    own = {
        method: {
            case.key: (case.task, found(pooled(case, np.array(row["values"]))[SHOWN], case.gold))
            for case in cases
            if (row := work.get("scores", case.key, method)) is not None and "values" in row
        }
        for method in methods
    }
    if (learned := _from_attention(cases, work).get(HEADS)) is not None:
        own[HEADS] = {
            case.key: (case.task, found(learned[case.key], case.gold))
            for case in cases
            if case.key in learned
        }
    tests = {}
    for method, values in own.items():
        both = [key for key in values if key in own[DEFAULTS]]
        if method != DEFAULTS and len(both) >= 8:
            pairs = [(own[DEFAULTS][key][1], values[key][1]) for key in both]
            tests[method] = paired_test(*zip(*pairs, strict=True), seed=0)
    corrected = holm({name: p for name, (_, _, p) in tests.items()})
    rows = []
    for method, values in own.items():
        tasks: dict[str, list[float]] = {}
        for task, value in values.values():
            tasks.setdefault(task, []).append(value)
        rows.append(
            {
                "method": method,
                "n": len(values),
                "found": bootstrap([value for _, value in values.values()], seed=0),
                "tasks": {task: [fmean(each), len(each)] for task, each in tasks.items()},
                "test": [*tests[method], corrected[method]] if method in tests else None,
            }
        )
    lengths = [case.prepared.prompt_length for case in cases]
    return rounded({"prompt_tokens": fmean(lengths) if lengths else None, "rows": rows})


def _tests(
    scores: Mapping[tuple[str, str], Mapping[str, Values]], by_key: Mapping[str, Any]
) -> dict[str, Any]:
    """``found`` of each method less that of leave-one-out on the same examples; p after Holm."""
    reference = scores.get((REFERENCE, "mean"), {})
    results = {}
    for (method, pooling), own in scores.items():
        both = [key for key in own if key in reference]
        if method != REFERENCE and len(both) >= 8:
            pairs = [
                (
                    found(order_of(method, own[k]), by_key[k].gold),
                    found(reference[k], by_key[k].gold),
                )
                for k in both
            ]
            first, second = zip(*pairs, strict=True)
            results[f"{method} {pooling}"] = paired_test(first, second, seed=0)
    corrected = holm({name: p for name, (_, _, p) in results.items()})
    return {name: [*test, corrected[name]] for name, test in results.items()}


def _shown(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A row for each method, the best first."""
    of_heads = "heads-"
    rows = [
        row
        for row in result["rows"]
        if row["pooling"] == SHOWN or row["method"].startswith(of_heads)
    ]
    return sorted(rows, key=lambda row: -row["found"][0])


def _interval(value: Sequence[float] | None, *, count: bool = False) -> str:
    if value is None:
        return ""
    mean, low, high, n = value
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]" + (f" ({n})" if count else "")


def quality(result: Mapping[str, Any]) -> str:
    """Markdown: what each method finds, LDS, drops and cost.

    A star marks a share found that differs from that of leave-one-out on the same examples (paired
    test, Holm, 0.05).
    """
    header = ["method", "n", "found", "LDS (n)", *(f"drop@{k}" for k in DROPS), "seconds"]
    rows = []
    for row in _shown(result):
        test = result["tests"].get(f"{row['method']} {row['pooling']}")
        drops = [row.get(f"drop{k}") for k in DROPS]
        rows.append(
            [
                row["method"],
                str(row["n"]),
                _interval(row["found"]) + star(test),
                _interval(row.get("lds"), count=True),
                *("" if drop is None else f"{drop[0]:.1f} ({drop[3]})" for drop in drops),
                seconds_text(row["seconds"]),
            ]
        )
    return markdown(header, rows)


def by_task(result: Mapping[str, Any]) -> str:
    """Markdown: the share found on each task, and how often the model's answers are right."""
    tasks = list(result["cases"])
    header = ["method", *(f"{task} ({result['cases'][task]})" for task in tasks)]
    rows = [
        [row["method"], *(f"{row['tasks'][t]:.2f}" if t in row["tasks"] else "" for t in tasks)]
        for row in _shown(result)
    ]
    answers = [result["answers"][task] for task in tasks]
    right = [f"{right} of {asked}" for right, asked in answers]
    return markdown(header, [*rows, ["right answers", *right]])


def by_pooling(result: Mapping[str, Any]) -> str:
    """Markdown: the share found by our methods, by how a sentence's scores become one."""
    found_by: dict[str, dict[str, float]] = {}
    for row in result["rows"]:
        if row["method"].startswith("flashtrace-") and _VERIFIED not in row["method"]:
            found_by.setdefault(row["method"], {})[row["pooling"]] = row["found"][0]
    names = list(POOLINGS)
    rows = [
        [method, *(f"{own[name]:.2f}" for name in names)]
        for method, own in found_by.items()
        if len(own) == len(names)
    ]
    return markdown(["method", *names], rows)


def by_length(*results: Mapping[str, Any]) -> str:
    """Markdown: the share found by the cheapest methods, in contexts of each length.

    A star marks a share found that differs from that of the defaults on the same answers (paired
    test, Holm, 0.05).
    """
    columns = [{row["method"]: row for row in result["wide"]["rows"]} for result in results]
    header = ["method"]
    for result, column in zip(results, columns, strict=True):
        tokens = result["wide"]["prompt_tokens"]
        header.append(f"{tokens:,.0f} tokens (n = {column[DEFAULTS]['n']})")

    def cell(column: Mapping[str, Mapping[str, Any]], method: str) -> str:
        row = column.get(method)
        if row is None:
            return ""
        fewer = row["n"] < column[DEFAULTS]["n"]
        return _interval([*row["found"], row["n"]], count=fewer) + star(row["test"])

    rows = [
        [method, *(cell(column, method) for column in columns)]
        for method in sorted(columns[0], key=lambda name: -columns[0][name]["found"][0])
    ]
    return markdown(header, rows)


def widely_by_task(result: Mapping[str, Any]) -> str:
    """Markdown: the same by task, in the contexts of one length."""
    rows = sorted(result["wide"]["rows"], key=lambda row: -row["found"][0])
    counts = {task: n for row in rows for task, (_, n) in row["tasks"].items()}
    header = ["method", *(f"{task} ({n})" for task, n in counts.items())]
    return markdown(
        header,
        [
            [r["method"], *(f"{r['tasks'][t][0]:.2f}" if t in r["tasks"] else "" for t in counts)]
            for r in rows
        ],
    )


def tables(result: Mapping[str, Any]) -> str:
    """All of them, for the terminal."""
    shown = [by_length(result), widely_by_task(result)]
    if result["rows"]:
        shown += [quality(result), by_task(result), by_pooling(result)]
    return "\n\n".join(shown)


_NAMED = {
    "flashtrace-k1": "paper's formula",
    DEFAULTS: "defaults",
    f"{DEFAULTS}{_VERIFIED}2": "the same, two verified",
    f"{DEFAULTS}{_VERIFIED}4": "the same, four verified",
    "loo-sentence": "leave-one-out",
    "contextcite": "ContextCite, 32",
    "attn-lrp": "AttnLRP",
    "value-norm": "value norms",
    "attention-mean": "mean attention",
    HEADS: "learned heads",
    "ifr-per-token": "IFR per token",
}
_RIGHT_HALF = 20.0
"""Methods that take more seconds have their names on the left of their points."""
_FREE = 0.1
"""Methods that take fewer seconds look at no model; the best of them is a line."""


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Writes the figure of quality against seconds as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullLocator

    figure = pyplot.figure(figsize=(10, 4.5), layout="constrained")
    sides = figure.subplots(1, 2)
    for axes, metric, label in zip(sides, ("found", "lds"), ("share found", "LDS"), strict=True):
        rows = [row for row in _shown(result) if row.get(metric) and row["seconds"]]
        named = [row for row in rows if row["method"] in _NAMED and row["seconds"] >= _FREE]
        for number, row in enumerate(named):
            (value, low, high, _), name = row[metric], row["method"]
            color = "C0" if name.startswith("flashtrace-") else "C1"
            bars = [[value - low], [high - value]]
            axes.errorbar(row["seconds"], value, bars, fmt="o", ms=4, lw=0.8, color=color)
            left = row["seconds"] > _RIGHT_HALF
            axes.annotate(
                _NAMED[name],
                (row["seconds"], value),
                (-4 if left else 4, -9 if number % 2 else 3),  # Neighbours are apart.
                textcoords="offset points",
                fontsize=7,
                ha="right" if left else "left",
            )
        if free := [row[metric][0] for row in rows if row["seconds"] < _FREE]:
            axes.axhline(max(free), color="0.6", lw=0.8, ls="--", label="best without the model")
            axes.legend(fontsize=7, loc="lower right")
        axes.set(xscale="log", xlabel="seconds for one example (median)", ylabel=label)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
