"""Texts found by their order alone."""

from __future__ import annotations

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_flashtrace.text.prompt_texts import forced_positions


def arrangements(text: str, wanted: list[str]) -> list[tuple[int, ...]]:
    """Every way to place the texts in order without overlap."""
    places = [[i for i in range(len(text)) if text.startswith(item, i)] for item in wanted]
    return [
        choice
        for choice in product(*places)
        if all(a + len(item) <= b for a, b, item in zip(choice, choice[1:], wanted, strict=False))
    ]


@settings(max_examples=400, deadline=None)
@given(
    st.text("ab-", max_size=14),
    st.lists(st.text("ab-", min_size=1, max_size=3), min_size=1, max_size=3),
)
def test_position_is_given_if_and_only_if_it_is_forced(text, wanted):
    possible = arrangements(text, wanted)
    if possible:
        forced = [
            at if all(way[i] == at for way in possible) else None
            for i, at in enumerate(possible[0])
        ]
        assert forced_positions(text, wanted) == forced


def test_without_an_arrangement_only_unique_texts_are_placed():
    assert forced_positions("system user", ["user", "system"]) == [7, 0]
    # "hi" is wanted twice and is there once: either could be it.
    assert forced_positions("x hi y", ["hi", "x hi y", "hi"]) == [None, 0, None]
    assert forced_positions("hi", ["hi", "hi"]) == [None, None]
    assert forced_positions("b a b", ["c", "a"]) == [None, 2]
