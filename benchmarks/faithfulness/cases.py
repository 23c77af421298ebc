"""The examples of a run, made or read, in tokens.

Invariant: a case is numbered within its task and length, so that "the first examples" of a task are
the same ones for every method.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faithfulness.example import Example, Prepared, prepare
from benchmarks.faithfulness.metrics import Mask
from benchmarks.faithfulness.options import Options
from benchmarks.faithfulness.tasks import make_examples
from benchmarks.faithfulness.tasks.files import read_examples
from benchmarks.faithfulness.work import key_of
from vllm_flashtrace.text.plan import skip_mask


@dataclass(frozen=True)
class Case:
    """An example, ready to be explained.

    Attributes:
        key: Its name in the work file.
        prepared: The example in tokens.
        number: Its place among the examples of its task and length.
    """

    key: str
    prepared: Prepared
    number: int

    @property
    def group(self) -> tuple[str, int]:
        """Task and length."""
        return self.prepared.example.task, self.prepared.example.length


def examples_of(options: Options, tokenizer: Any) -> Iterator[Example]:
    """Every example that the options ask for, those of files included."""
    for task in options.tasks:
        if task.startswith("file:"):
            yield from read_examples(Path(task.removeprefix("file:")), options.examples)
            continue
        for length in options.lengths:
            names = options.methods_at(length)
            count = max((options.limit(name, length) for name in names), default=0)
            yield from make_examples(task, length, count, seed=options.seed, tokenizer=tokenizer)


def as_cases(examples: Sequence[Example], tokenizer: Any) -> list[Case]:
    """The examples in tokens, numbered."""
    seen: dict[tuple[str, int], int] = {}
    cases = []
    for example in examples:
        prepared = prepare(example, tokenizer)
        group = (example.task, example.length)
        seen[group] = seen.get(group, -1) + 1
        cases.append(Case(key_of(prepared), prepared, seen[group]))
    return cases


def stop_mask(prepared: Prepared) -> Mask:
    """``[P]``, the user's tokens on the reference package's list of stop tokens."""
    mask = skip_mask(prepared.texts[slice(*prepared.user)], "punctuation")
    assert mask is not None
    return np.asarray(mask.numpy(), dtype=np.bool_)
