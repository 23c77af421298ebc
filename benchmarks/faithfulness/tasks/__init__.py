"""Tasks with known answers and known places where the answer comes from, made from a seed.

Invariant: an example depends on its task, length, number and seed alone, and on the tokenizer
through how much filler fits.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.faithfulness.example import Example
from benchmarks.faithfulness.tasks import agent, multihop, niah, variables
from benchmarks.faithfulness.tasks.compose import Draft, compose

TASKS: Mapping[str, Callable[[random.Random, int], Draft]] = {
    "niah": niah.draft,
    "variables": variables.draft,
    "multihop": multihop.draft,
    "agent": agent.draft,
}
"""Each takes a source of randomness and the number of the example, which selects the variant."""


def make_examples(
    task: str, length: int, count: int, *, seed: int, tokenizer: Any
) -> list[Example]:
    """Examples of a task at a context length.

    The first examples are the same however many are asked for. The id of each is
    ``task/variant/length/number``.

    Args:
        task: One of `TASKS`.
        length: Tokens of the rendered prompt, chat template included.
        count: How many.
        seed: Of everything random.
        tokenizer: Of the explained model, with a chat template.

    Raises:
        ValueError: No such task, or the length is too short for it.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; known are {', '.join(TASKS)}")
    examples = []
    for number in range(count):
        source = random.Random(f"{seed}/{task}/{length}/{number}")
        draft = TASKS[task](source, number)
        prompt, gold = compose(draft, length, source, tokenizer)
        examples.append(
            Example(
                id=f"{task}/{draft.variant}/{length}/{number}",
                task=task,
                length=length,
                prompt=prompt,
                reasoning=draft.reasoning,
                output=draft.output,
                gold=gold,
            )
        )
    return examples


def variant_of(example_id: str) -> str:
    """The variant of a task that an example is of, e.g. ``q4``; "" for examples from files."""
    parts = example_id.split("/")
    return parts[1] if parts[0] in TASKS and len(parts) > 1 else ""
