"""Questions whose answer shares no word with the sentences that it comes from.

A context is a list of short sentences: the facts that the answer rests on (gold), facts of the same
kind about others, sentences that repeat the names and the words of the question, one that holds the
answer's own word and says nothing about it, and filler. What a model answers is its own; an example
counts only where the answer is right, see ``benchmarks.faithfulness.own_answers``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.faithfulness.tasks import short_filler

_PEOPLE = (
    "Mira", "Jonas", "Leila", "Tomas", "Ingrid", "Rafael", "Aiko", "Pavel", "Nadia", "Erik",
    "Sofia", "Samuel",
)  # fmt: skip
_ASIDES = (
    "{0} lives near the station.",
    "{0} likes to read in the evening.",
    "{0} has two sisters.",
    "{0} starts to work at eight.",
    "{0} was born in winter.",
    "{0} wears a green coat.",
)

_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def spelled(number: int) -> str:
    """A number from 0 to 99 in words."""
    if number < len(_ONES):
        return _ONES[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens - 2] + (f"-{_ONES[ones]}" if ones else "")


@dataclass(frozen=True, slots=True)
class Question:
    """A context and what is asked about it.

    Attributes:
        sentences: The context, in order.
        gold: Indices of the sentences that the answer rests on.
        text: The question.
        answer: The right answer.
        wrong: Answers that a right one must not name as well.
        think: Whether the model is to reason before it answers.
    """

    sentences: tuple[str, ...]
    gold: tuple[int, ...]
    text: str
    answer: str
    wrong: tuple[str, ...] = ()
    think: bool = False


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a question is made of, before its context has an order and a length."""

    gold: Sequence[str]
    others: Sequence[str]
    text: str
    answer: str
    wrong: Sequence[str] = ()
    think: bool = False
    ordered: bool = False
    """Whether gold stands in the given order behind the first of ``others``."""
    filler: Callable[[random.Random], str] = short_filler


# What the context says, what the question says, and a sentence in the question's words.
_COUNTS = (
    ("The ferry carries {} passengers.", "How many people fit on the boat?",
     "The boat was painted in spring."),
    ("The physician treated {} patients.", "How many sick people did the doctor help?",
     "The doctor lives near the station."),
    ("The farmer keeps {} hens.", "How many chickens live on the farm?",
     "The farm lies behind a hill."),
    ("The library lent out {} novels.", "How many books were borrowed?",
     "Some books were damaged by rain."),
    ("The pupil solved {} exercises.", "How many problems did the student finish?",
     "The student sits by the window."),
    ("The choir has {} members.", "How many singers are in the group?",
     "The group meets on Fridays."),
    ("The cottage has {} windows.", "How many panes of glass does the little house have?",
     "The little house stands alone."),
    ("The merchant sold {} garments.", "How many pieces of clothing did the trader sell?",
     "The trader opens his shop at nine."),
    ("The cyclist won {} medals.", "How many prizes did the bike rider receive?",
     "The bike rider trains every morning."),
    ("The gardener planted {} saplings.", "How many young trees were put into the ground?",
     "The ground is wet in autumn."),
)  # fmt: skip


def digits(source: random.Random) -> _Parts:
    """A count that the context spells and the answer writes in digits."""
    asked, *others = source.sample(_COUNTS, 4)
    numbers = source.sample(range(13, 99), 4)
    own = str(numbers[0])
    return _Parts(
        [asked[0].format(spelled(numbers[0]))],
        [
            *(each[0].format(spelled(n)) for each, n in zip(others, numbers[1:], strict=True)),
            asked[2],
            f"Room {own} is at the end of the corridor.",
        ],
        f"{asked[1]} Answer with digits only.",
        own,
        [str(n) for n in numbers[1:]],
    )


_UNITS = (
    ("The film lasts {} hours.", "How many minutes does the movie take?", 60,
     "Some minutes of the movie were cut."),
    ("The tower is {} kilometres away from the harbour.",
     "How many metres is it from the port to the tall building?", 1000,
     "The tall building has a clock."),
    ("The parcel weighs {} kilograms.", "How heavy is the package, in grams?", 1000,
     "The package has a red label."),
    ("The apprenticeship takes {} years.", "How many months does the training last?", 12,
     "The training begins in summer."),
    ("The voyage went on for {} weeks.", "How many days did the journey at sea last?", 7,
     "The journey at sea was calm."),
    ("The cook bought {} dozen eggs.", "How many single eggs were bought in the kitchen?", 12,
     "The kitchen smells of bread."),
    ("The rope is {} metres long.", "How many centimetres does the cord measure?", 100,
     "The cord hangs on a nail."),
)  # fmt: skip


def units(source: random.Random) -> _Parts:
    """A quantity that the answer gives in a smaller unit."""
    asked, *others = source.sample(_UNITS, 4)
    numbers = source.sample(range(2, 10), 4)
    own = str(numbers[0] * asked[2])
    return _Parts(
        [asked[0].format(spelled(numbers[0]))],
        [
            *(each[0].format(spelled(n)) for each, n in zip(others, numbers[1:], strict=True)),
            asked[3],
            f"Ticket {own} was found on the floor.",
        ],
        f"{asked[1]} Answer with digits only.",
        own,
    )


# Sentence, question, and instances by the class that is the answer.
_CLASSES = (
    ("{0} plays the {1}.", "Does {0} play a string instrument, a wind instrument or percussion?",
     {"string": ("violin", "cello", "harp", "guitar"), "wind": ("flute", "trumpet", "clarinet"),
      "percussion": ("drums", "cymbals", "timpani")}),
    ("{0} owns a {1}.", "Is the pet of {0} a mammal, a bird or a fish?",
     {"mammal": ("rabbit", "hamster", "poodle", "pony"), "bird": ("parrot", "canary", "pigeon"),
      "fish": ("carp", "goldfish", "trout")}),
    ("{0} grows {1}.", "Does {0} grow fruit, vegetables or flowers?",
     {"fruit": ("apples", "pears", "cherries"), "vegetables": ("carrots", "cabbages", "leeks"),
      "flowers": ("tulips", "roses", "daisies")}),
    ("{0} travels by {1}.", "Does {0} travel on land, on water or in the air?",
     {"land": ("bicycle", "tram", "lorry"), "water": ("canoe", "ferry", "sailboat"),
      "air": ("helicopter", "glider", "aeroplane")}),
)  # fmt: skip


def _instances(source: random.Random, classes: Mapping[str, Sequence[str]]) -> tuple[str, str, str]:
    """The asked class, an instance of it, and one of another class."""
    own, other = source.sample(sorted(classes), 2)
    return own, source.choice(classes[own]), source.choice(classes[other])


def category(source: random.Random) -> _Parts:
    """What kind of thing somebody has, where the context names the thing."""
    sentence, question, classes = source.choice(_CLASSES)
    name, other, third = source.sample(_PEOPLE, 3)
    own, thing, wrong = _instances(source, classes)
    return _Parts(
        [sentence.format(name, thing)],
        [
            sentence.format(other, wrong),
            *(aside.format(name) for aside in source.sample(_ASIDES, 3)),
            source.choice(_ASIDES).format(third),
            f"The word {own} is carved above the door.",
        ],
        f"{question.format(name)} Answer with one word.",
        own,
        [each for each in classes if each != own],
    )


_NICKNAMES = ("Captain", "Professor", "Fox", "Baron", "Owl", "Duke", "Pirate", "Bishop")


def alias(source: random.Random) -> _Parts:
    """As `category`, where the context says who has the thing by a nickname: two facts."""
    sentence, question, classes = source.choice(_CLASSES)
    names, nicknames = source.sample(_PEOPLE, 2), source.sample(_NICKNAMES, 2)
    own, thing, wrong = _instances(source, classes)
    known = "Everybody calls {0} the {1}."
    return _Parts(
        [known.format(names[0], nicknames[0]), sentence.format(f"The {nicknames[0]}", thing)],
        [
            known.format(names[1], nicknames[1]),
            sentence.format(f"The {nicknames[1]}", wrong),
            *(aside.format(names[0]) for aside in source.sample(_ASIDES, 2)),
            f"The word {own} is carved above the door.",
        ],
        f"{question.format(names[0])} Answer with one word.",
        own,
        [each for each in classes if each != own],
    )


_GOODS = ("apples", "stamps", "shells", "coins", "postcards", "marbles", "buttons", "tickets")
_TOOK = ("{0} collected {1} {2}.", "{0} has {1} {2}.", "{0} brought {1} {2}.")


def arithmetic(source: random.Random) -> _Parts:
    """The sum of what two people have, after a reasoning of the model's own."""
    goods, other_goods = source.sample(_GOODS, 2)
    first, second, third = source.sample(_PEOPLE, 3)
    numbers = source.sample(range(3, 20), 4)
    own = str(numbers[0] + numbers[1])
    gold = [
        source.choice(_TOOK).format(name, spelled(n), goods)
        for name, n in zip((first, second), numbers[:2], strict=True)
    ]
    return _Parts(
        gold,
        [
            source.choice(_TOOK).format(third, spelled(numbers[2]), goods),
            source.choice(_TOOK).format(first, spelled(numbers[3]), other_goods),
            *(source.choice(_ASIDES).format(name) for name in (first, second)),
            f"House {own} stands at the corner.",
        ],
        f"How many {goods} do {first} and {second} have together?",
        own,
        think=True,
    )


_CHANGES = (
    ("The {0} is kept in the cellar.", "Later the {0} was carried up to the attic.",
     "Is the {0} now high up or down below?", "high", "down"),
    ("The {0} lies in the freezer.", "Later the {0} was put on the stove.",
     "Is the {0} now hot or cold?", "hot", "cold"),
    ("The {0} belongs to a boy.", "Later the {0} was given to a girl.",
     "Is the owner of the {0} now male or female?", "female", "male"),
    ("The {0} stands in the garden.", "Later the {0} was moved to the kitchen.",
     "Is the {0} now inside or outside?", "inside", "outside"),
    ("The {0} was painted snow-white.", "Later the {0} was covered with coal dust.",
     "Is the {0} now dark or light?", "dark", "light"),
)  # fmt: skip
_OBJECTS = ("box", "parcel", "chair", "lamp", "kettle", "bucket", "clock", "basket", "pan")


def latest(source: random.Random) -> _Parts:
    """Two statements that contradict each other, of which the later one counts."""
    before, after, question, own, wrong = source.choice(_CHANGES)
    thing, other = source.sample(_OBJECTS, 2)
    return _Parts(
        [after.format(thing)],
        [
            before.format(thing),
            before.format(other),
            f"The {thing} was bought last year.",
            f"Nobody knows who made the {thing}.",
            f"The word {own} is carved above the door.",
        ],
        f"{question.format(thing)} Answer with one word.",
        own,
        [wrong],
        ordered=True,
    )


_VARIABLES = (
    "retries", "delay", "width", "height", "limit", "batch", "rows", "columns", "margin", "offset",
    "depth", "stride", "period", "budget",
)  # fmt: skip


def _assignment(source: random.Random) -> str:
    """A line that assigns a number to a name that no question uses."""
    name = f"{source.choice(_ASSIGNED)}_{source.choice(_ASSIGNED)}"
    return f"{name} = {source.randrange(100, 999)}"


_ASSIGNED = ("alpha", "beta", "gamma", "delta", "sigma", "omega", "kappa", "theta", "lambda0")


def code(source: random.Random) -> _Parts:
    """What a line of Python prints that depends on two assignments."""
    one, two, three, four = source.sample(_VARIABLES, 4)
    small, factor, other = source.sample(range(2, 10), 3)
    own = str(small * factor)
    return _Parts(
        [f"{one} = {small}", f"{two} = {one} * {factor}"],
        [f"{three} = {other}", f"{four} = {three} * {factor}", f"{two}_name = 'fast'",
         f"port_{own} = 'open'"],
        f"These are lines of Python. What does print({two}) show? Answer with digits only.",
        own,
        [str(other * factor)],
        ordered=True,
        filler=_assignment,
    )  # fmt: skip


TASKS: Mapping[str, Callable[[random.Random], _Parts]] = {
    "digits": digits,
    "units": units,
    "category": category,
    "alias": alias,
    "arithmetic": arithmetic,
    "latest": latest,
    "code": code,
}
"""Each makes the parts of a question."""


def make_question(task: str, number: int, sentences: int, seed: int) -> Question:
    """The question of a number: the same whatever else is asked for.

    Args:
        task: A name of `TASKS`.
        number: Of the question.
        sentences: Of the context; more where the facts alone are more.
        seed: Of everything random.
    """
    source = random.Random(f"{seed}/{task}/{sentences}/{number}")
    parts = TASKS[task](source)
    others = list(parts.others)
    used = len(parts.gold) + len(others)
    more = {parts.filler(source): None for _ in range(4 * sentences)}
    others += list(more)[: max(0, sentences - used)]
    first, rest = (others[:1], others[1:]) if parts.ordered else ([], others)
    body = [*((text, True) for text in parts.gold), *((text, False) for text in rest)]
    source.shuffle(body)
    if parts.ordered:
        # The facts stand in their order, and behind the statement that they contradict.
        places = sorted(i for i, (_, gold) in enumerate(body) if gold)
        for place, text in zip(places, parts.gold, strict=True):
            body[place] = (text, True)
        body[source.randint(0, places[0]) : 0] = [(text, False) for text in first]
    return Question(
        sentences=tuple(text for text, _ in body),
        gold=tuple(i for i, (_, gold) in enumerate(body) if gold),
        text=parts.text,
        answer=parts.answer,
        wrong=tuple(parts.wrong),
        think=parts.think,
    )
