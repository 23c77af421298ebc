"""Variable tracking: follow assignments back to a number (after RULER's task).

Invariant: gold is every assignment of the asked chain and none of the other chains.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from benchmarks.faithfulness.tasks.compose import Draft, Fact
from benchmarks.faithfulness.tasks.words import filler, number

HOPS = (2, 3, 4, 5, 6)
CHAINS = (1, 2, 3)
_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
_MOST_ASSIGNMENTS = 10


def draft(source: random.Random, index: int) -> Draft:
    """Two to six hops, among one to three chains; long chains have fewer beside them.

    A chain of ``h`` hops has ``h + 1`` variables: the first gets a number, each next one the one
    before it.
    """
    hops = HOPS[index % len(HOPS)]
    chains = min(CHAINS[index % len(CHAINS)], max(1, _MOST_ASSIGNMENTS // (hops + 1)))
    names = _names(source, chains * (hops + 1))
    taken: set[str] = set()
    made = [names[i * (hops + 1) : (i + 1) * (hops + 1)] for i in range(chains)]
    values = [number(source, taken) for _ in made]
    waiting = [
        [Fact(f"VAR {text}.", text if i == 0 else "") for text in _assignments(chain, values[i])]
        for i, chain in enumerate(made)
    ]
    facts = []
    while any(waiting):  # chains interleave, each in its order
        facts.append(source.choice([chain for chain in waiting if chain]).pop(0))
    asked, value = made[0], values[0]
    steps = ", ".join(f"{asked[i]} is {asked[i - 1]}" for i in range(hops, 0, -1))
    return Draft(
        variant=f"h{hops}",
        head="Variables are assigned in the text below. Keep track of them.",
        facts=facts,
        filler=filler,
        tail=f"What is the value of {asked[-1]}?",
        reasoning=f"{steps}, and {asked[0]} is {value}. So the value of {asked[-1]} is",
        output=f" {value}",
        shuffled=False,
    )


def _assignments(chain: Sequence[str], value: str) -> list[str]:
    sources = [value, *chain[:-1]]
    return [f"{name} = {source}" for name, source in zip(chain, sources, strict=True)]


def _names(source: random.Random, count: int) -> list[str]:
    names: list[str] = []
    while len(names) < count:
        name = "".join(source.sample(_LETTERS, 2))
        if name not in names and name != "VA":
            names.append(name)
    return names
