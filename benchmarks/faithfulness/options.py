"""What a run does: options of the command line, and presets of them.

Invariant: an option given on the command line stands; presets fill in only what was left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.faithfulness.registry import METHODS, entries_of
from benchmarks.faithfulness.tasks import TASKS

LONG = 1024
"""From this length on only methods of `LONG_METHODS` run."""
VERY_LONG = 4096
"""From this length on they run on few examples."""
LONG_METHODS = (
    "flashtrace-k0",
    "flashtrace-k1",
    "flashtrace-k2",
    "flashtrace-auto",
    "flashtrace-k1-skip",
    "flashtrace-auto-skip",
    "random",
    "recency",
    "overlap",
)
EXPENSIVE = {
    "loo-token": 1,
    "loo-sentence": 10,
    "contextcite": 1,
    "clp-sentence": 1,
    "integrated-gradients": 1,
}
"""Six seconds and more for one short example: they run on the first examples of each task, the
cheaper ones on so many times more."""
_LONGEST = "loo-token"
"""Over a minute for one short example: it runs where it is asked for."""
HEADLINE = (
    "flashtrace-k0",
    "flashtrace-k1",
    "flashtrace-k2",
    "flashtrace-auto",
    "flashtrace-k1-skip",
    "flashtrace-auto-skip",
    "flashtrace-package",
    "ifr-per-token",
    "cage",
    "attention-mean",
    "attention-rollout",
    "value-norm",
    "attn-lrp",
    "loo-sentence",
    "clp-sentence",
    "random",
    "recency",
    "overlap",
)
_PERTURBED = (
    "flashtrace-k0",
    "flashtrace-k1",
    "flashtrace-auto-skip",
    "attn-lrp",
    "overlap",
    "random",
)
_ALL_TASKS = ",".join(TASKS)
_PRESETS: dict[str, dict[str, Any]] = {
    "full": {
        "tasks": _ALL_TASKS,
        "methods": ",".join(name for name in METHODS if name != _LONGEST),
        "examples": 50,
        "lengths": "256,1024,4096,8000",
        "perturbation_methods": ",".join(_PERTURBED),
        "perturbation_examples": 4,
        "expensive_examples": 2,
        "long_examples": 3,
    },
    "quick": {
        "tasks": _ALL_TASKS,
        "methods": (
            "flashtrace-k0,flashtrace-k1,flashtrace-auto-skip,flashtrace-package,ifr-per-token,"
            "attn-lrp,attention-mean,loo-sentence,random,recency,overlap"
        ),
        "examples": 6,
        "lengths": "256",
        "perturbation_methods": "flashtrace-k1,random",
        "perturbation_examples": 2,
        "expensive_examples": 1,
        "long_examples": 1,
    },
}
DEFAULT_PRESET = "full"


@dataclass(frozen=True)
class Options:
    """A run.

    Attributes:
        tasks: Names of `TASKS`, or ``file:PATH``.
        methods: Names of the registry.
        examples: Of each task and length under `VERY_LONG`.
        lengths: Context lengths in tokens, ascending.
        perturbation_methods: Tested by RISE, MAS, sufficiency and comprehensiveness.
        perturbation_examples: First examples of each task, at the shortest length, for that.
        expensive_examples: First examples of each task for the methods of `EXPENSIVE`.
        long_examples: Of each task and length from `VERY_LONG` on.
        generated: Whether the model's own responses are explained too.
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
    generated: bool
    both_protocols: bool
    seed: int
    dtype: str
    output: Path
    figures: Path | None
    preset: str

    @property
    def work_file(self) -> Path:
        """Rows of what has been done, beside the output."""
        return self.output.with_suffix(".work.jsonl")

    def methods_at(self, length: int) -> tuple[str, ...]:
        """Methods that run at a length."""
        if length < LONG:
            return self.methods
        return tuple(name for name in self.methods if name in LONG_METHODS)

    def limit(self, method: str, length: int) -> int:
        """On how many examples of a task a method runs: at least on those that test it."""
        if length >= VERY_LONG:
            return min(self.long_examples, self.examples)
        if method not in EXPENSIVE:
            return self.examples
        perturbed = method in self.perturbation_methods
        tested = self.perturbation_examples if perturbed else 0
        chosen = EXPENSIVE[method] * self.expensive_examples
        return min(self.examples, max(chosen, tested))

    def perturbed_at(self, length: int) -> tuple[str, ...]:
        """Methods that are tested by perturbation at a length; 0 is that of given texts."""
        return self.perturbation_methods if length in (0, min(self.lengths)) else ()


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Options from the command line; exits with a message where they make no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faithfulness", description=__doc__, allow_abbrev=False
    )
    add = parser.add_argument
    add("--preset", choices=sorted(_PRESETS), default=DEFAULT_PRESET)
    add("--tasks", help=f"of {_ALL_TASKS}, file:PATH")
    add("--methods", help="all, headline, or names")
    add("--examples", type=int, help="of each task and length")
    add("--lengths", help="context lengths in tokens")
    add("--perturbation-methods", help="names, or none")
    add("--perturbation-examples", type=int)
    add("--expensive-examples", type=int, help=f"for {', '.join(EXPENSIVE)}")
    add("--long-examples", type=int, help=f"at lengths from {VERY_LONG} on")
    add("--generated", action="store_true", help="explain the model's own responses too")
    add("--both-protocols", action="store_true", help="perturb without stop tokens, too")
    add("--seed", type=int, default=0)
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    add("--json", type=Path, required=True, metavar="OUT")
    add("--figures", type=Path, metavar="DIR")
    given = vars(parser.parse_args(arguments))
    preset = _PRESETS[given["preset"]]
    chosen = {key: preset.get(key) if value is None else value for key, value in given.items()}
    try:
        return _options(chosen)
    except ValueError as error:
        parser.error(str(error))


def _options(chosen: dict[str, Any]) -> Options:
    methods = _methods(chosen["methods"])
    perturbed = chosen["perturbation_methods"]
    names = () if perturbed == "none" else _methods(perturbed)
    tasks = tuple(_split(chosen["tasks"]))
    for task in tasks:
        if task not in TASKS and not task.startswith("file:"):
            raise ValueError(f"unknown task {task!r}; known are {_ALL_TASKS} and file:PATH")
    numbers = ("examples", "perturbation_examples", "expensive_examples", "long_examples")
    for key in numbers:
        if chosen[key] < (key == "examples"):
            raise ValueError(f"--{key.replace('_', '-')} is too small: {chosen[key]}")
    lengths = tuple(sorted({int(length) for length in _split(chosen["lengths"])}))
    if not tasks or not methods or not lengths or lengths[0] < 1:
        raise ValueError("tasks, methods and lengths must not be empty")
    return Options(
        tasks=tasks,
        methods=methods,
        lengths=lengths,
        perturbation_methods=tuple(name for name in names if name in methods),
        generated=chosen["generated"],
        both_protocols=chosen["both_protocols"],
        seed=chosen["seed"],
        dtype=chosen["dtype"],
        output=chosen["json"],
        figures=chosen["figures"],
        preset=chosen["preset"],
        **{key: chosen[key] for key in numbers},
    )


def _methods(text: str) -> tuple[str, ...]:
    if text in ("all", "headline"):
        return METHODS if text == "all" else HEADLINE
    names = tuple(_split(text))
    entries_of(names)  # refuses unknown ones
    return names


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
