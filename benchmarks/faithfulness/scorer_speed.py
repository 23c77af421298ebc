"""Seconds of a perturbation step: the engine's scorer against Hugging Face, same steps and values.

Invariant: every way evaluates the same sequences, ranked by ``flashtrace-k1``, on the same weights
with every core of this process. Ways take turns on each example, and medians over examples are
compared, so that what else the machine does meets all of them. CPU seconds are those of this
process and the engine's, summed over threads; they hardly depend on other load.

- ``hf``: one forward per step with logits of every row, as the authors' package does it;
- ``hf_batched``: several steps per forward, logits of the response alone;
- ``engine``: all steps of an example at once through `EngineScorer`, nothing known before;
- ``engine_early``: the same, but it stops where the rest is known: RISE and MAS take the running
  minimum of a curve that is clipped at 0, so nothing after its first 0 counts.

A case is ``tokens,unchanged,examples``: tokens of a sequence, those of a document at the beginning
that is never perturbed (a prefix that all steps share), and how many such sequences.

    python -m benchmarks.faithfulness.scorer_speed [--cases 300,0,10 2000,0,2] --json OUT
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.faithfulness.engine import EngineResource
from benchmarks.faithfulness.example import Example, Prepared, prepare
from benchmarks.faithfulness.hf import all_cores
from benchmarks.faithfulness.method import Values
from benchmarks.faithfulness.metrics import deletion, explained_share, group_sizes, ranking
from benchmarks.faithfulness.ours import OursFamily
from vllm_flashtrace.models import prepare_smollm2

CASES = ["300,0,10", "2000,0,2", "2000,1700,2"]
EARLY_BATCH = 4
"""Steps that ``engine_early`` evaluates before it looks whether to go on."""
_BATCH_TOKENS = 4096
_METHOD = "flashtrace-k1"


@dataclass(frozen=True)
class Case:
    """See the module; ``unchanged`` counts from the beginning of the sequence."""

    tokens: int
    unchanged: int
    examples: int

    @classmethod
    def parse(cls, text: str) -> Case:
        """Reads ``tokens,unchanged,examples``."""
        return cls(*(int(part) for part in text.split(",")))


@dataclass(frozen=True)
class Steps:
    """The sequences of one example: as it is, then with one group more removed each time."""

    sequences: list[list[int]]
    response: int
    share: Values


Way = Callable[[Steps], list[float]]


@dataclass(frozen=True)
class Outcome:
    """Seconds per example; log-probabilities per example and step, nan if not evaluated."""

    seconds: Values
    cpu_seconds: Values
    values: list[list[float]]


def town_example(number: int, tokens: int, tokenizer: Any) -> Prepared:
    """A question about one of many facts, with reasoning and answer, of about ``tokens`` tokens."""
    asked = number % 5
    bridges = [13 * (i + 1) + number for i in range(tokens)]

    def built(facts: int) -> Prepared:
        lines = [
            f"In the year {1200 + 7 * i} the town number {i} had {bridges[i]} bridges."
            for i in range(facts)
        ]
        question = f"How many bridges did the town number {asked} have?"
        return prepare(
            Example(
                id=f"towns-{number}",
                task="towns",
                length=tokens,
                prompt=" ".join([*lines, question]),
                reasoning=f"The question asks for the town number {asked}. The text says that in "
                f"the year {1200 + 7 * asked} it had {bridges[asked]} bridges. ",
                output=f"It had {bridges[asked]} bridges.",
            ),
            tokenizer,
        )

    few, more = (len(built(facts).token_ids) for facts in (asked + 1, asked + 3))
    each = (more - few) / 2
    return built(max(asked + 1, asked + 1 + int((tokens - few) / each)))


def perturbation_steps(prepared: Prepared, scores: Values, unchanged: int, pad: int) -> Steps:
    """Removes the tokens behind ``unchanged`` group by group, highest scores first."""
    fixed = np.arange(*prepared.user) < unchanged
    ranked = ranking(scores, fixed)
    sequences = [list(prepared.token_ids)]
    for end in np.cumsum(group_sizes(len(ranked))):
        tokens = list(prepared.token_ids)
        for offset in ranked[:end].tolist():
            tokens[prepared.user[0] + offset] = pad
        sequences.append(tokens)
    return Steps(sequences, prepared.response_length, explained_share(scores, ranked))


def rise(values: Sequence[float], steps: Steps) -> float:
    """RISE of these log-probabilities; steps that were not evaluated (nan) come last."""
    between = [value for value in values[1:-1] if not math.isnan(value)]
    return deletion(values[0], values[-1], between, steps.share).rise


@torch.no_grad()
def hf_steps(model: Any, steps: Steps) -> list[float]:
    """One forward per step over the whole sequence, every row through the output layer."""
    values = []
    for tokens in steps.sequences:
        ids = torch.tensor([tokens])
        logs = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.log_softmax(-1)
        values.append(_gathered(logs[:, -steps.response - 1 : -1], ids, steps.response)[0])
    return values


@torch.no_grad()
def hf_batched_steps(model: Any, steps: Steps) -> list[float]:
    """Several steps per forward, only the rows that predict the response to the output layer."""
    values = []
    size = max(1, _BATCH_TOKENS // len(steps.sequences[0]))
    for ids in torch.tensor(steps.sequences).split(size):
        logits = model(input_ids=ids, logits_to_keep=steps.response + 1).logits[:, :-1]
        values += _gathered(logits.log_softmax(-1), ids, steps.response)
    return values


def engine_steps(engine: EngineResource, steps: Steps) -> list[float]:
    """All steps in one call."""
    lengths = [steps.response] * len(steps.sequences)
    return engine.scorer.response_logprobs(steps.sequences, lengths)


def engine_early_steps(engine: EngineResource, steps: Steps) -> list[float]:
    """The first and the last step, then those between until the curve is 0; nan after it."""
    count = len(steps.sequences)
    values = [float("nan")] * count

    def evaluate(chosen: Sequence[int]) -> None:
        sequences = [steps.sequences[i] for i in chosen]
        found = engine.scorer.response_logprobs(sequences, [steps.response] * len(sequences))
        for i, value in zip(chosen, found, strict=True):
            values[i] = value

    evaluate([0, count - 1])
    for start in range(1, count - 1, EARLY_BATCH):
        if min(values[:start]) <= values[-1]:
            break
        evaluate(range(start, min(start + EARLY_BATCH, count - 1)))
    return values


def run_case(case: Case, model: Any, engine: EngineResource) -> dict[str, Any]:
    """Times every way on one case and compares the values with those of ``hf``."""
    tokenizer = engine.ft.llm.get_tokenizer()
    ours = OursFamily(SimpleNamespace(engine=engine))
    work, lengths, prefills, hops = [], [], [], []
    for number in range(case.examples):
        prepared = town_example(number, case.tokens, tokenizer)
        scores = ours.attribute(prepared, [_METHOD])[_METHOD]
        lengths.append(len(prepared.token_ids))
        prefills.append(scores.facts["prefill_seconds"])
        hops.append(scores.seconds - prefills[-1])
        work.append(
            perturbation_steps(prepared, scores.values, case.unchanged, engine.pad_token_id)
        )
    ways: dict[str, Way] = {
        "hf": lambda one: hf_steps(model, one),
        "hf_batched": lambda one: hf_batched_steps(model, one),
        "engine": lambda one: engine_steps(engine, one),
        "engine_early": lambda one: engine_early_steps(engine, one),
    }
    counts = np.array([len(one.sequences) for one in work])
    outcomes = _in_turn(ways, work, engine)
    base = outcomes["hf"]
    rows = []
    for name, outcome in outcomes.items():
        triples = zip(outcome.values, base.values, work, strict=True)
        rises = [(rise(a, one), rise(b, one)) for a, b, one in triples]
        ours_flat, base_flat = np.concatenate(outcome.values), np.concatenate(base.values)
        rows.append(
            {
                "way": name,
                "seconds_per_step": float(np.median(outcome.seconds / counts)),
                "speed_up": float(np.median(base.seconds / outcome.seconds)),
                "cpu_seconds_per_step": float(np.median(outcome.cpu_seconds / counts)),
                "cpu_speed_up": float(np.median(base.cpu_seconds / outcome.cpu_seconds)),
                "evaluated": int(np.isfinite(ours_flat).sum()),
                "largest_logprob_difference": float(np.nanmax(abs(ours_flat - base_flat))),
                "largest_rise_difference": max(abs(a - b) for a, b in rises),
                "largest_relative_rise_difference": max(
                    abs(a - b) / max(abs(b), 1e-9) for a, b in rises
                ),
            }
        )
    return {
        "tokens": float(np.mean(lengths)),
        "unchanged": case.unchanged,
        "examples": case.examples,
        "steps": int(counts.sum()),
        "mean_rise": float(
            np.mean([rise(v, one) for v, one in zip(base.values, work, strict=True)])
        ),
        "trace_prefill_seconds": float(np.median(prefills)),
        "trace_hops_seconds": float(np.median(hops)),
        "ways": rows,
    }


def _gathered(logs: torch.Tensor, ids: torch.Tensor, response: int) -> list[float]:
    picked = logs.gather(2, ids[:, -response:, None])
    values: list[float] = picked.double().sum(dim=(1, 2)).tolist()
    return values


def _in_turn(
    ways: Mapping[str, Way], work: Sequence[Steps], engine: EngineResource
) -> dict[str, Outcome]:
    """Every way on every example; each runs once on the first before the clock starts."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in ways}
    values: dict[str, list[list[float]]] = {name: [] for name in ways}
    with all_cores():
        for way in ways.values():
            first = work[0]
            way(Steps(first.sequences[:2], first.response, first.share))
        for one in work:
            for name, way in ways.items():
                engine.scorer.forget()
                began, cpu_began = time.perf_counter(), _cpu_seconds()
                values[name].append(way(one))
                seconds[name].append(time.perf_counter() - began)
                cpu_seconds[name].append(_cpu_seconds() - cpu_began)
    return {
        name: Outcome(np.array(seconds[name]), np.array(cpu_seconds[name]), values[name])
        for name in ways
    }


def _cpu_seconds() -> float:
    this = psutil.Process()
    times = [process.cpu_times() for process in (this, *this.children(recursive=True))]
    return sum(time.user + time.system for time in times)


def main() -> None:
    """Runs the cases and prints a table."""
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--dtype", default="float32", help="of the engine; Hugging Face: float32")
    parser.add_argument("--model-path", help="default: the bundled SmolLM2-135M-Instruct")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cases = [Case.parse(text) for text in options.cases]
    path = options.model_path or str(prepare_smollm2())
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    engine = EngineResource(path, options.dtype, max(case.tokens for case in cases) + 128)
    results: list[dict[str, Any]] = []
    try:
        for case in cases:
            results.append(run_case(case, model, engine))
            if options.json:
                document = {"dtype": options.dtype, "cases": results}
                options.json.write_text(json.dumps(document, indent=1) + "\n")
    finally:
        engine.close()
    table = Table(title=f"perturbation steps, engine in {options.dtype}")
    for name in ("tokens", "unchanged", *results[0]["ways"][0]):
        table.add_column(name.replace("_", " "))
    for result in results:
        for row in result["ways"]:
            cells = [result["tokens"], result["unchanged"], *row.values()]
            table.add_row(*(f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
