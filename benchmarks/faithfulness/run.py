"""One run of the benchmark: its options, what it works with, its rows on disk, and the work itself.

Every pair of example and method that the options ask for ends as scores or as a failure with a
reason. Rows are appended to a work file one at a time; a run that was killed goes on when it is
started again with the same arguments, and does nothing again that stands in the file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from benchmarks.faithfulness import metrics
from benchmarks.faithfulness.attention import AttentionFamily, PackageFamily
from benchmarks.faithfulness.baselines import (
    AblationFamily,
    ClpFamily,
    ReagentFamily,
    SimpleFamily,
)
from benchmarks.faithfulness.engine import EngineResource
from benchmarks.faithfulness.example import MethodFailed, Prepared, Scores, prepare, stop_mask
from benchmarks.faithfulness.gradients import GradientFamily
from benchmarks.faithfulness.hf import HFModel
from benchmarks.faithfulness.ours import OursFamily
from benchmarks.faithfulness.tasks import TASKS, make_examples, read_examples

Row = dict[str, Any]

FAMILIES = (
    OursFamily,
    AttentionFamily,
    PackageFamily,
    GradientFamily,
    ClpFamily,
    ReagentFamily,
    AblationFamily,
    SimpleFamily,
)
"""Each is constructed with `Resources` and offers the methods of its ``labels``."""
LABELS = {name: label for family in FAMILIES for name, label in family.labels.items()}
"""Description of every method."""
ALL_TOKENS, WITHOUT_STOP_TOKENS = "all", "skip"

LONG = 1024
"""From this length on only methods of `LONG_METHODS` run."""
VERY_LONG = 4096
"""From this length on they run on few examples."""
LONG_METHODS = (
    *("flashtrace-k0", "flashtrace-k1", "flashtrace-k2", "flashtrace-auto"),
    *("flashtrace-k1-skip", "flashtrace-auto-skip", "random", "recency", "overlap"),
)
EXPENSIVE = {
    "loo-token": 1,
    "loo-sentence": 10,
    "contextcite": 1,
    "contextcite-128": 1,
    "clp-sentence": 1,
    "reagent": 1,
    "integrated-gradients": 1,
    "attention-times-ig": 1,
    "attention-ig": 1,
}
"""Six seconds and more for one short example: they run on the first examples of each task, the
cheaper ones on so many times more. ``loo-token`` takes over a minute and runs where asked for."""
_ALL_TASKS = ",".join(TASKS)
PRESETS: dict[str, dict[str, Any]] = {
    "full": {
        "tasks": _ALL_TASKS,
        "methods": ",".join(name for name in LABELS if name != "loo-token"),
        "examples": 50,
        "lengths": "256,1024,4096,8000",
        "perturbation_methods": "flashtrace-k0,flashtrace-k1,flashtrace-auto-skip,attn-lrp,"
        "overlap,random",
        "perturbation_examples": 4,
        "expensive_examples": 2,
        "long_examples": 3,
    },
    "quick": {
        "tasks": _ALL_TASKS,
        "methods": "flashtrace-k0,flashtrace-k1,flashtrace-auto-skip,flashtrace-package,"
        "ifr-per-token,attn-lrp,attention-mean,loo-sentence,random,recency,overlap",
        "examples": 6,
        "lengths": "256",
        "perturbation_methods": "flashtrace-k1,random",
        "perturbation_examples": 2,
        "expensive_examples": 1,
        "long_examples": 1,
    },
}


@dataclass(frozen=True)
class Options:
    """A run.

    Attributes:
        tasks: Names of `TASKS`, or ``file:PATH``.
        methods: Names of `LABELS`.
        examples: Of each task and length under `VERY_LONG`.
        lengths: Context lengths in tokens, ascending.
        perturbation_methods: Tested by RISE, MAS, sufficiency and comprehensiveness.
        perturbation_examples: First examples of each task, at the shortest length, for that.
        expensive_examples: First examples of each task for the methods of `EXPENSIVE`.
        long_examples: Of each task and length from `VERY_LONG` on.
        both_protocols: Whether perturbations also run without the stop tokens.
        seed: Of everything random.
        dtype: Of weights and activations.
        output: The JSON file.
        figures: Folder of figures; None for none.
        preset: What filled in the rest.
    """

    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    examples: int
    lengths: tuple[int, ...]
    perturbation_methods: tuple[str, ...]
    perturbation_examples: int
    expensive_examples: int
    long_examples: int
    both_protocols: bool
    seed: int
    dtype: str
    output: Path
    figures: Path | None
    preset: str

    def limit(self, method: str, length: int) -> int:
        """On how many examples of a task a method runs: at least on those that test it."""
        if length >= LONG and method not in LONG_METHODS:
            return 0
        if length >= VERY_LONG:
            return min(self.long_examples, self.examples)
        if method not in EXPENSIVE:
            return self.examples
        tested = self.perturbation_examples if method in self.perturbation_methods else 0
        return min(self.examples, max(EXPENSIVE[method] * self.expensive_examples, tested))

    def wanted(self, case: Case) -> list[str]:
        """Methods that are to run on an example."""
        length = case.prepared.example.length
        return [name for name in self.methods if case.number < self.limit(name, length)]

    def config(self) -> Row:
        """The options as they go into the results; files by their name alone."""
        chosen = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}
        del chosen["output"], chosen["figures"]
        names = [f"file:{Path(task).name}" if ":" in task else task for task in self.tasks]
        return {**chosen, "tasks": names}


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Options from the command line; presets fill in what was left out."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faithfulness", description=__doc__, allow_abbrev=False
    )
    add = parser.add_argument
    add("--preset", choices=sorted(PRESETS), default="full")
    add("--tasks", help=f"of {_ALL_TASKS}, file:PATH")
    add("--methods", help="all, or names")
    add("--examples", type=int, help="of each task and length")
    add("--lengths", help="context lengths in tokens")
    add("--perturbation-methods", help="names, or none")
    add("--perturbation-examples", type=int)
    add("--expensive-examples", type=int, help=f"for {', '.join(EXPENSIVE)}")
    add("--long-examples", type=int, help=f"at lengths from {VERY_LONG} on")
    add("--both-protocols", action="store_true", help="perturb without stop tokens, too")
    add("--seed", type=int, default=0)
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    add("--json", type=Path, required=True, metavar="OUT", dest="output")
    add("--figures", type=Path, metavar="DIR")
    given = vars(parser.parse_args(arguments))
    preset = PRESETS[given["preset"]]
    chosen = {key: preset.get(key) if value is None else value for key, value in given.items()}
    for key, known in (("tasks", TASKS), ("methods", LABELS), ("perturbation_methods", LABELS)):
        text = {"all": ",".join(known), "none": ""}.get(chosen[key], chosen[key])
        chosen[key] = tuple(part.strip() for part in text.split(",") if part.strip())
        unknown = [n for n in chosen[key] if n not in known and not n.startswith("file:")]
        if unknown:
            parser.error(f"unknown {key} {unknown}; known are {', '.join(known)}")
    chosen["perturbation_methods"] = tuple(
        name for name in chosen["perturbation_methods"] if name in chosen["methods"]
    )
    try:
        chosen["lengths"] = tuple(sorted({int(length) for length in chosen["lengths"].split(",")}))
    except ValueError as error:
        parser.error(f"--lengths: {error}")
    if min(chosen["examples"], chosen["lengths"][0]) < 1 or not chosen["methods"]:
        parser.error("--examples, --lengths and --methods must not be empty")
    return Options(**chosen)


@dataclass
class Resources:
    """What families and metrics share; each part is made when it is first asked for."""

    model_path: Path
    dtype: str = "float32"
    seed: int = 0
    max_model_len: int = 8192

    @cached_property
    def engine(self) -> EngineResource:
        """The vLLM engine."""
        return EngineResource(self.model_path, self.dtype, self.max_model_len)

    @cached_property
    def hf(self) -> HFModel:
        """The model in Hugging Face transformers."""
        return HFModel(self.model_path, dtype=getattr(torch, self.dtype))

    @cached_property
    def tokenizer(self) -> Any:
        """The model's fast tokenizer, without its weights."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model_path)

    @property
    def scorer(self) -> Any:
        """Log-probabilities of responses after changed prompts."""
        return self.engine.scorer

    def close(self, *names: str) -> None:
        """Lets go of these parts, of all by default."""
        for name in names or ("hf", "engine"):
            if name in vars(self):
                vars(self).pop(name).close()


@dataclass(frozen=True)
class Case:
    """An example in tokens, its name in the work file, and its place in its task and length."""

    key: str
    prepared: Prepared
    number: int

    @property
    def group(self) -> tuple[str, int]:
        """Task and length."""
        return self.prepared.example.task, self.prepared.example.length


def make_cases(options: Options, tokenizer: Any) -> list[Case]:
    """Every example that the options ask for, those of files included."""
    cases = []
    for task in options.tasks:
        if task.startswith("file:"):
            path = Path(task.removeprefix("file:"))
            made = [read_examples(path, options.examples)]
        else:
            limits = {
                length: max(options.limit(name, length) for name in options.methods)
                for length in options.lengths
            }
            made = [
                make_examples(task, length, count, seed=options.seed, tokenizer=tokenizer)
                for length, count in limits.items()
            ]
        for examples in made:
            for number, example in enumerate(examples):
                prepared = prepare(example, tokenizer)
                # Rows of a text that has changed no longer count.
                parts = (prepared.token_ids, prepared.user, prepared.target, sorted(prepared.gold))
                digest = hashlib.blake2b(repr(parts).encode(), digest_size=5).hexdigest()
                cases.append(Case(f"{example.id}#{digest}", prepared, number))
    return cases


@dataclass
class WorkFile:
    """What has been done, by kind, example, method and protocol; a row cut short is dropped.

    Opening the file of a run with another fingerprint (model, dtype, seed) raises ValueError.
    """

    path: Path
    fingerprint: Row
    rows: dict[tuple[str, ...], Row] = field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            self.path.write_bytes(whole)
        for line in whole.decode().splitlines():
            self._take(json.loads(line))
        for key in [key for key, row in self.rows.items() if row.get("final") is False]:
            del self.rows[key]  # to be tried again
        self._at = time.perf_counter()
        self._file = self.path.open("a", encoding="utf-8")
        self.add({"kind": "session", "fingerprint": self.fingerprint})

    def add(self, row: Row) -> None:
        """Appends a row at once."""
        now = time.perf_counter()
        row, self._at = {**row, "spent": round(now - self._at, 3)}, now
        self._file.write(json.dumps(row, separators=(",", ":")) + "\n")
        self._file.flush()
        self._take(row)

    def get(self, kind: str, *key: str) -> Row | None:
        """The row of these ``scores`` (with ``values`` or a ``reason``) or ``perturbation``."""
        return self.rows.get((kind, *key))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _take(self, row: Row) -> None:
        self.seconds += row["spent"]
        if row["kind"] == "session":
            if row["fingerprint"] != self.fingerprint:
                raise ValueError(
                    f"{self.path} is of a run with {row['fingerprint']}, this one has "
                    f"{self.fingerprint}; remove it or write to another file"
                )
        else:
            names = ("kind", "example", "method", "protocol")
            self.rows[tuple(row[name] for name in names if name in row)] = row


def attribute(
    cases: Sequence[Any],
    wanted: Callable[[Any], Sequence[str]],
    resources: Any,
    work: WorkFile,
    console: Console,
    families: Sequence[Any] = FAMILIES,
) -> None:
    """Scores of every method on every example it is to run on, family by family.

    Args:
        cases: Each with ``key``, ``prepared`` and ``number``.
        wanted: Methods that are to run on a case.
        resources: What families are constructed with.
        work: Gets the rows, and says which are there.
        console: Where progress and faults go.
        families: Those that offer the methods.
    """
    for kind in families:
        pending = []
        for case in sorted(cases, key=lambda case: case.number):  # all tasks alike
            names = [name for name in wanted(case) if name in kind.labels]
            if names := [name for name in names if work.get("scores", case.key, name) is None]:
                pending.append((case, names))
        if not pending:
            continue
        family = kind(resources)
        try:
            for case, names in track(pending, kind.__name__, console=console):
                for row in _explain(family, case, names, console):
                    work.add(row)
        finally:
            family.close()


def _explain(family: Any, case: Any, names: Collection[str], console: Console) -> Iterator[Row]:
    """A row for each method: its scores, or why there are none."""
    found: dict[str, Scores] = {}
    reason, final = "the family gave no scores", True
    try:
        found = family.attribute(case.prepared, names)
    except MethodFailed as error:
        reason = str(error)
    except Exception as error:  # one method's bug must not cost the others their run
        reason, final = f"{type(error).__name__}: {error}", False
        console.print(f"{case.prepared.example.id}: {', '.join(names)}: {reason}", markup=False)
    for name in names:
        row = {"kind": "scores", "example": case.key, "method": name}
        scores = found.get(name)
        if scores is None:
            yield {**row, "reason": reason, "final": final}
        elif scores.values.shape != (case.prepared.num_user_tokens,):
            yield {**row, "reason": f"scores have shape {scores.values.shape}"}
        elif not np.isfinite(scores.values).all():
            yield {**row, "reason": "scores are not finite"}
        else:
            values, facts = scores.values.tolist(), dict(scores.facts)
            yield {**row, "seconds": scores.seconds, "facts": facts, "values": values}


def perturb(
    cases: Sequence[Case], options: Options, resources: Any, work: WorkFile, console: Console
) -> None:
    """RISE, MAS, sufficiency and comprehensiveness of the methods that have scores."""
    protocols = (ALL_TOKENS, WITHOUT_STOP_TOKENS)[: 1 + options.both_protocols]
    pending = []
    for case in sorted(cases, key=lambda case: case.number):  # all tasks, little by little
        length = case.prepared.example.length
        if case.number >= options.perturbation_examples or length > options.lengths[0]:
            continue
        wanted = [(name, p) for name in options.perturbation_methods for p in protocols]
        rows = [(n, p, work.get("scores", case.key, n)) for n, p in wanted]
        rows = [(n, p, row) for n, p, row in rows if row is not None and "values" in row]
        rows = [r for r in rows if work.get("perturbation", case.key, *r[:2]) is None]
        if rows:
            pending.append((case, rows))
    tokenizer = resources.tokenizer
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    for case, rows in track(pending, "perturbation", console=console) if pending else ():
        stop = {ALL_TOKENS: None, WITHOUT_STOP_TOKENS: stop_mask(case.prepared)}
        for name, protocol, row in rows:
            values, began = np.array(row["values"]), time.perf_counter()
            scorer = resources.scorer
            found = metrics.perturb(case.prepared, values, stop[protocol], scorer, int(pad))
            key = {"example": case.key, "method": name, "protocol": protocol}
            seconds = time.perf_counter() - began
            work.add({"kind": "perturbation", **key, **found, "seconds": seconds})
