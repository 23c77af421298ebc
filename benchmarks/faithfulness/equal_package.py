"""Our scores through the engine against the paper authors' package on the same examples.

Invariant: both get the same tokens, spans and cores, one after the other, and each side's first
example of a length warms it up and is run again.

    python -m benchmarks.faithfulness.equal_package --json OUT [--examples 10]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.faithfulness.engine import use_all_cores
from benchmarks.faithfulness.example import Prepared, prepare
from benchmarks.faithfulness.method import Scores, Values
from benchmarks.faithfulness.metrics import recovery
from benchmarks.faithfulness.package import PackageResult, run_package
from benchmarks.faithfulness.resources import Resources
from benchmarks.faithfulness.tasks import TASKS, make_examples
from vllm_flashtrace.models import prepare_smollm2

LENGTHS = (300, 1000)
RESPONSE_ROOM = 1024
_OURS = "flashtrace-k1"


@dataclass(frozen=True)
class Pair:
    """Both sides' view of one example."""

    prepared: Prepared
    ours: Scores
    package: PackageResult

    def facts(self) -> dict[str, Any]:
        """What differs: scores, ranking and seconds.

        ``relative_l1`` compares with the paper's formula on the package's own hops;
        ``observation_relative_l1`` with its sum of unnormalised hops, both scaled to sum 1.
        """
        prepared, user = self.prepared, slice(*self.prepared.user)
        formula = self.package.by_formula(prepared.prompt_length, prepared.reasoning)[user].numpy()
        observation = self.package.observation.double()[user].numpy()
        ours = self.ours.values
        recoveries = [recovery(values, prepared.gold) for values in (ours, formula, observation)]
        return {
            "id": prepared.example.id,
            "tokens": len(prepared.token_ids),
            "relative_l1": relative_l1(ours, formula),
            "observation_relative_l1": relative_l1(
                ours / ours.sum(), observation / observation.sum()
            ),
            "recovery": recoveries[0],
            "formula_recovery": recoveries[1],
            "observation_recovery": recoveries[2],
            "seconds": self.ours.seconds,
            "prefill_seconds": self.ours.facts["prefill_seconds"],
            "package_seconds": self.package.seconds,
        }


def relative_l1(found: Values, wanted: Values) -> float:
    """``||found - wanted||_1 / ||wanted||_1``."""
    return float(np.abs(found - wanted).sum() / np.abs(wanted).sum())


def examples(length: int, count: int, seed: int, tokenizer: Any) -> list[Prepared]:
    """The first examples of all tasks in turn.

    Args:
        length: Tokens of the prompt.
        count: How many in all.
        seed: Of the tasks.
        tokenizer: Of the explained model.
    """
    each = -(-count // len(TASKS))
    tasks = [make_examples(task, length, each, seed=seed, tokenizer=tokenizer) for task in TASKS]
    mixed = [example for group in zip(*tasks, strict=True) for example in group]
    return [prepare(example, tokenizer) for example in mixed[:count]]


def compare(resources: Resources, by_length: dict[int, list[Prepared]]) -> dict[int, list[Pair]]:
    """Runs our side, lets go of the engine, and runs the package."""
    from benchmarks.faithfulness.ours import OursFamily

    family = OursFamily(resources)
    ours: dict[int, list[Scores]] = {}
    for length, prepared in by_length.items():
        for example in [prepared[0], *prepared]:
            ours.setdefault(length, []).append(family.attribute(example, [_OURS])[_OURS])
    family.close()
    resources.close()
    pairs: dict[int, list[Pair]] = {}
    for length, prepared in by_length.items():
        theirs = [run_package(resources.hf, p, 1) for p in [prepared[0], *prepared]][1:]
        triples = zip(prepared, ours[length][1:], theirs, strict=True)
        pairs[length] = [Pair(*triple) for triple in triples]
    resources.close()
    return pairs


def row(length: int, facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One line of the table; seconds are medians."""
    seconds = statistics.median(fact["seconds"] for fact in facts)
    package_seconds = statistics.median(fact["package_seconds"] for fact in facts)
    return {
        "length": length,
        "examples": len(facts),
        "tokens": statistics.median(fact["tokens"] for fact in facts),
        "max_relative_l1": max(fact["relative_l1"] for fact in facts),
        "max_observation_relative_l1": max(fact["observation_relative_l1"] for fact in facts),
        "same_recovery": sum(fact["recovery"] == fact["formula_recovery"] for fact in facts),
        "same_observation_recovery": sum(
            fact["recovery"] == fact["observation_recovery"] for fact in facts
        ),
        "recovery": statistics.mean(fact["recovery"] for fact in facts),
        "seconds": seconds,
        "prefill_seconds": statistics.median(fact["prefill_seconds"] for fact in facts),
        "package_seconds": package_seconds,
        "ratio": package_seconds / seconds,
    }


def main() -> None:
    """Runs the comparison and writes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--examples", type=int, default=10, help="per length, over all tasks")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--model", default=None, help="folder; the bundled SmolLM2 if left out")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    use_all_cores()
    resources = Resources(
        options.model or prepare_smollm2(),
        seed=options.seed,
        max_model_len=max(options.lengths) + RESPONSE_ROOM,
    )
    by_length = {
        length: examples(length, options.examples, options.seed, resources.tokenizer)
        for length in options.lengths
    }
    try:
        pairs = compare(resources, by_length)
    finally:
        resources.close()
    facts = {length: [pair.facts() for pair in of] for length, of in pairs.items()}
    result: dict[str, Any] = {
        "settings": {
            "dtype": resources.dtype,
            "package": f"flashtrace {metadata.version('flashtrace')}",
            "seed": options.seed,
            "lengths": "tokens of the prompt",
            "seconds": "ours: prefill and two hops; package: forward pass and two hops",
        },
        "rows": [row(length, of) for length, of in facts.items()],
        "examples": [fact for of in facts.values() for fact in of],
    }
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    _print(result["rows"])


def _print(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title="flashtrace-k1 through the engine against the authors' package")
    for name in rows[0]:
        table.add_column(name.replace("_", " "))
    for values in rows:
        cells = [
            f"{value:.1e}" if "relative_l1" in name else f"{value:.3g}"
            for name, value in values.items()
        ]
        table.add_row(*cells)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
