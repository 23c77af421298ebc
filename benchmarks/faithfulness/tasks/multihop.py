"""Questions over invented people and places that take two to four facts to answer.

Invariant: gold is the facts of the asked chain; distractors state the same relations of others.
"""

from __future__ import annotations

import random

from benchmarks.faithfulness.tasks.compose import Draft, Fact
from benchmarks.faithfulness.tasks.words import name

HOPS = (2, 3, 4)
OTHERS = 2

_RELATIONS = (
    "{0} College was founded by {1}.",
    "{0} was born in the town of {1}.",
    "The town of {0} lies on the river {1}.",
    "The river {0} flows into the {1} Sea.",
)
_QUESTIONS = {
    2: "In which town was the founder of {0} College born?",
    3: "On which river lies the town where the founder of {0} College was born?",
    4: (
        "Into which sea flows the river on which lies the town where the founder of {0} College "
        "was born?"
    ),
}
_ASIDES = (
    "{0} College has a small library.",
    "{0} liked to walk in the hills.",
    "The town of {0} holds a fair in spring.",
    "The river {0} freezes in hard winters.",
    "{0} wrote letters to {1} for many years.",
    "The road from {0} to {1} is long.",
)


def draft(source: random.Random, index: int) -> Draft:
    """The asked chain and two others; filler speaks of further names."""
    hops = HOPS[index % len(HOPS)]
    taken: set[str] = set()
    chains = [[name(source, taken) for _ in range(hops + 1)] for _ in range(1 + OTHERS)]
    asked = chains[0]
    facts = [
        Fact(text, text if chain is asked else "")
        for chain in chains
        for text in (_RELATIONS[hop].format(*chain[hop : hop + 2]) for hop in range(hops))
    ]

    def aside(source: random.Random) -> str:
        known = set(taken)  # names of asides may repeat each other but no name of a chain
        return source.choice(_ASIDES).format(name(source, known), name(source, known))

    thought = " ".join(fact.text for fact in facts if fact.gold)
    return Draft(
        variant=f"h{hops}",
        head="Read the following notes.",
        facts=facts,
        filler=aside,
        tail=_QUESTIONS[hops].format(asked[0]),
        reasoning=f"{thought} So the answer is",
        output=f" {asked[-1]}",
        per_paragraph=4,
    )
