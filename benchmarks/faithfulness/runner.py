"""Runs methods and metrics over the examples of all tasks, and goes on after a kill.

Invariant: every pair of example and method that the options ask for ends as scores or as a failure
with a reason; nothing that stands in the work file is done again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from benchmarks.faithfulness.cases import Case, as_cases, examples_of, stop_mask
from benchmarks.faithfulness.example import Example, Prepared
from benchmarks.faithfulness.generated import Generate, split_response
from benchmarks.faithfulness.method import Family, MethodFailed, Scores
from benchmarks.faithfulness.options import HEADLINE, Options
from benchmarks.faithfulness.perturbation_metrics import (
    Explanation,
    PerturbationMetrics,
    Perturbed,
)
from benchmarks.faithfulness.registry import FamilyEntry, entries_of, load
from benchmarks.faithfulness.work import Row, WorkFile, unpack

ALL_TOKENS, WITHOUT_STOP_TOKENS = "all", "skip"
_EXAMPLES_AT_ONCE = 2
"""Whose perturbations are one unit of work: what a kill loses, and what a batch can hold."""


class Progress(Protocol):
    """Told what is being done."""

    def start(self, name: str, total: int) -> None:
        """A phase of so many units begins."""
        ...

    def advance(self, units: int = 1) -> None:
        """So many units are done."""
        ...

    def note(self, message: str) -> None:
        """Something the user should know."""
        ...


class Runner:
    """One run of the benchmark."""

    def __init__(
        self, options: Options, resources: Any, work: WorkFile, progress: Progress
    ) -> None:
        """Does nothing yet.

        Args:
            options: What to do.
            resources: See `benchmarks.faithfulness.resources.Resources`.
            work: What has been done.
            progress: Told about it.
        """
        self._options = options
        self._resources = resources
        self._work = work
        self._progress = progress
        work.forget_passing_failures()

    def cases(self, generate: Generate | None = None) -> list[Case]:
        """All examples of the options, with the model's own responses if ``generate`` is given."""
        tokenizer = self._resources.tokenizer
        examples = list(examples_of(self._options, tokenizer))
        if generate is not None:
            examples += self._own_responses(examples, generate)
        return as_cases(examples, tokenizer)

    def attribute(self, cases: Sequence[Case]) -> None:
        """Scores of every method on every example it is to run on, family by family."""
        for entry in entries_of(self._options.methods):
            pending = [
                (case, names)
                for case in sorted(cases, key=lambda case: case.number)  # all tasks alike
                if (names := self._names(entry, case)) and (names := self._missing(case, names))
            ]
            if not pending:
                continue
            self._progress.start(entry.target.partition(":")[2], sum(len(n) for _, n in pending))
            family = load(entry, self._resources)
            try:
                for case, names in pending:
                    self._explain(family, case, names)
                    self._progress.advance(len(names))
            finally:
                family.close()

    def perturb(self, cases: Sequence[Case]) -> None:
        """RISE, MAS, sufficiency and comprehensiveness of the methods that have scores."""
        protocols = [ALL_TOKENS]
        if self._options.both_protocols:
            protocols.append(WITHOUT_STOP_TOKENS)
        pending = {
            case.key: (case, wanted)
            for case in sorted(cases, key=lambda case: case.number)  # all tasks, little by little
            if (wanted := list(self._unperturbed(case, protocols)))
        }
        if not pending:
            return
        self._progress.start("perturbation", sum(len(wanted) for _, wanted in pending.values()))
        metrics = PerturbationMetrics(self._resources.scorer, self._pad_token_id())
        keys = list(pending)
        for first in range(0, len(keys), _EXAMPLES_AT_ONCE):
            chunk = [pending[key] for key in keys[first : first + _EXAMPLES_AT_ONCE]]
            done = self._perturb_chunk(metrics, chunk)
            self._progress.advance(done)

    def wanted(self, case: Case) -> list[str]:
        """Methods that are to run on an example; on the model's own responses, headline ones."""
        length = case.prepared.example.length
        limit = self._options.limit
        names = self._options.methods_at(length)
        if case.prepared.example.generated:
            names = tuple(name for name in names if name in HEADLINE)
        return [name for name in names if case.number < limit(name, length)]

    def _own_responses(self, examples: Sequence[Example], generate: Generate) -> list[Example]:
        shortest = min(self._options.lengths)
        asked = [example for example in examples if example.length == shortest]
        missing = [example for example in asked if self._work.response(example.id) is None]
        if missing:
            self._progress.start("responses", len(missing))
            texts = generate([example.prompt for example in missing])
            for example, text in zip(missing, texts, strict=True):
                self._work.add({"kind": "response", "example": example.id, "text": text})
            self._progress.advance(len(missing))
        found = [split_response(e, self._work.response(e.id) or "") for e in asked]
        return [example for example in found if example is not None]

    def _names(self, entry: FamilyEntry, case: Case) -> list[str]:
        return [name for name in self.wanted(case) if name in entry.names]

    def _missing(self, case: Case, names: Sequence[str]) -> list[str]:
        return [name for name in names if self._work.scores(case.key, name) is None]

    def _explain(self, family: Family, case: Case, names: Collection[str]) -> None:
        found: Mapping[str, Scores] = {}
        reason, final = "the family gave no scores", True
        try:
            found = family.attribute(case.prepared, names)
        except MethodFailed as error:
            reason = str(error)
        except Exception as error:  # one method's bug must not cost the others their run
            reason, final = f"{type(error).__name__}: {error}", False
            self._progress.note(f"{case.prepared.example.id}: {', '.join(names)}: {reason}")
        for name in names:
            if name not in found:
                self._work.add_failure(case.key, name, reason, final=final)
            elif (problem := _problem(found[name], case.prepared)) is not None:
                self._work.add_failure(case.key, name, problem, final=True)
            else:
                self._work.add_scores(case.key, name, found[name])

    def _unperturbed(self, case: Case, protocols: Sequence[str]) -> Iterator[tuple[str, str, Row]]:
        length = case.prepared.example.length
        if case.number >= self._options.perturbation_examples:
            return
        for name in self._options.perturbed_at(length):
            row = self._work.scores(case.key, name)
            if row is None or "values" not in row:
                continue
            for protocol in protocols:
                if self._work.perturbation(case.key, name, protocol) is None:
                    yield name, protocol, row

    def _perturb_chunk(
        self,
        metrics: PerturbationMetrics,
        chunk: Sequence[tuple[Case, Sequence[tuple[str, str, Row]]]],
    ) -> int:
        flat = [(case, *wanted) for case, all_wanted in chunk for wanted in all_wanted]
        explanations = [
            Explanation(
                case.prepared,
                unpack(row["values"]),
                stop_mask(case.prepared) if protocol == WITHOUT_STOP_TOKENS else None,
            )
            for case, _, protocol, row in flat
        ]
        before = vars(metrics.cost).copy()
        for (case, name, protocol, _), result in zip(
            flat, metrics.evaluate(explanations), strict=True
        ):
            self._work.add(_perturbation_row(case.key, name, protocol, result))
        spent = {key: value - before[key] for key, value in vars(metrics.cost).items()}
        self._work.add({"kind": "cost", **spent})
        return len(flat)

    def _pad_token_id(self) -> int:
        tokenizer = self._resources.tokenizer
        pad = tokenizer.pad_token_id
        return int(tokenizer.eos_token_id if pad is None else pad)


def _problem(scores: Scores, prepared: Prepared) -> str | None:
    """What is wrong with scores, or None."""
    if scores.values.shape != (prepared.num_user_tokens,):
        return f"scores have shape {scores.values.shape}, P is {prepared.num_user_tokens}"
    if not np.isfinite(scores.values).all():
        return "scores are not finite"
    return None


def _perturbation_row(key: str, method: str, protocol: str, result: Perturbed) -> Row:
    return {
        "kind": "perturbation",
        "example": key,
        "method": method,
        "protocol": protocol,
        "rise": result.deletion.rise,
        "mas": result.deletion.mas,
        "case": result.deletion.case,
        "comprehensiveness": list(result.comprehensiveness.values()),
        "sufficiency": list(result.sufficiency.values()),
        "evaluations": result.evaluations,
    }
