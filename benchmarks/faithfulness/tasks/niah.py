"""Needles in a haystack, several asked at once (after RULER's multi-query task).

Invariant: gold is key and value of every asked needle; needles that are not asked are distractors.
"""

from __future__ import annotations

import random

from benchmarks.faithfulness.tasks.compose import Draft, Fact
from benchmarks.faithfulness.tasks.words import KEYS, filler, listed, number

QUERIES = (2, 4, 8)
DISTRACTORS = 1


def draft(source: random.Random, index: int) -> Draft:
    """Two, four or eight keys are asked for."""
    queries = QUERIES[index % len(QUERIES)]
    keys = source.sample(KEYS, queries + DISTRACTORS)
    taken: set[str] = set()
    values = {key: number(source, taken) for key in keys}
    asked = keys[:queries]
    facts = [
        Fact(f"The code of the {key} is {values[key]}.", gold)
        for key in keys
        for gold in [f"{key} is {values[key]}" if key in asked else ""]
    ]
    thought = ", ".join(f"the {key} has {values[key]}" for key in asked)
    return Draft(
        variant=f"q{queries}",
        head="Some codes are hidden in the text below. Remember them.",
        facts=facts,
        filler=filler,
        tail=f"What are the codes of the {listed(asked)}? List them in this order.",
        reasoning=f"In the text, {thought}. So the codes are",
        output=" " + ", ".join(values[key] for key in asked),
    )
