"""Words for invented texts: filler sentences, names, numbers.

Invariant: filler never holds a digit, a key of a needle or an invented name.
"""

from __future__ import annotations

import random
from collections.abc import Callable


def _words(text: str, separator: str | None = None) -> tuple[str, ...]:
    return tuple(text.split(separator))


_ADJECTIVES = _words(
    "quiet old narrow bright wooden small broken painted heavy gentle early distant hollow smooth "
    "plain round dusty golden pale cheerful"
)
_THINGS = _words(
    "bridge garden window lantern wagon fountain orchard staircase mill kettle bench clock gate "
    "ladder chimney market path boat barn tower"
)
_ACTIONS = _words(
    "stood|waited|rested|leaned|caught the light|drew a crowd|needed repair|looked empty|"
    "smelled of rain|was being cleaned|seemed forgotten|kept its colour|cast a long shadow",
    "|",
)
_PLACES = _words(
    "near the river|behind the church|beside the school|under the trees|along the wall|"
    "at the crossroads|by the harbour|on the hill|outside the village|next to the bakery|"
    "below the cliffs|across the meadow",
    "|",
)
_TIMES = _words(
    "in the morning|at noon|after the rain|all winter|before supper|on market days|"
    "through the summer|at dusk|most of the week|without any hurry",
    "|",
)
KEYS = _words(
    "falcon tiger maple copper violet anchor pepper saddle marble cactus walnut silver dragon "
    "rocket pirate orange hammer parrot turtle velvet"
)
_STARTS = _words("Vel Tar Bre Osk Mir Dul Fen Gor Hal Jor Kel Lan Nar Pel Quor Ras Sil Tov Ul Wen")
_ENDS = _words(
    "ador amar enek olin avash item orion ugat apol esun obek athia ewick iston ara umi eta"
)


def filler(source: random.Random) -> str:
    """A sentence about nothing."""
    return (
        f"The {source.choice(_ADJECTIVES)} {source.choice(_THINGS)} {source.choice(_ACTIONS)} "
        f"{source.choice(_PLACES)} {source.choice(_TIMES)}."
    )


def number(source: random.Random, taken: set[str], digits: int = 4) -> str:
    """A number that is not taken yet; takes it."""
    return _fresh(lambda: str(source.randrange(10 ** (digits - 1), 10**digits)), taken)


def name(source: random.Random, taken: set[str]) -> str:
    """An invented name that is not taken yet, nor part of one that is; takes it."""
    return _fresh(lambda: source.choice(_STARTS) + source.choice(_ENDS), taken)


def _fresh(make: Callable[[], str], taken: set[str]) -> str:
    while True:
        word = make()
        if not any(word in other or other in word for other in taken):
            taken.add(word)
            return word


def listed(words: list[str]) -> str:
    """``a, b and c``."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
