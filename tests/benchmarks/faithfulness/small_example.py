"""An example made by hand, small enough to work out what must come out."""

from __future__ import annotations

from benchmarks.faithfulness.example import Example, Prepared


def prepared_example() -> Prepared:
    """Two template tokens, twelve of the user's in four sentences, one of template, a response."""
    tokens = tuple(range(100, 119))
    return Prepared(
        example=Example("linear", "test", 0, "prompt", "why", "what"),
        token_ids=tokens,
        texts=tuple(str(token) for token in tokens),
        user=(2, 14),
        prompt_length=15,
        reasoning=(15, 17),
        target=(17, 19),
        gold=frozenset(),
        sentences=((2, 4), (4, 9), (9, 13), (13, 14)),
        reasoning_sentences=((15, 17),),
    )
