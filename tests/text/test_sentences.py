"""Where sentences end, and which tokens are theirs."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_flashtrace.base.records import Completion
from vllm_flashtrace.text.prompt_map import LocatedToken, PromptMap
from vllm_flashtrace.text.result import containing, sentence_spans, sentences


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("one", ["one"]),
        ("One. Two! Three?  ", ["One. ", "Two! ", "Three?  "]),
        ("Pi is 3.14. v1.2.3 is out...", ["Pi is 3.14. ", "v1.2.3 is out..."]),
        ('He said "go." Then (he left.) So', ['He said "go." ', "Then (he left.) ", "So"]),
        ("a\nb\n\n\nc", ["a\n", "b\n\n\n", "c"]),
        (" \n One.", [" \n One."]),
        ("一。二\uff01三", ["一。", "二\uff01", "三"]),
        ("x = f(a.b)\n\ty", ["x = f(a.b)\n\t", "y"]),
    ],
)
def test_where_sentences_end(text: str, expected: list[str]) -> None:
    assert [text[start:end] for start, end in sentence_spans(text)] == expected


@given(st.text(st.sampled_from('ab.!? \n")。😀'), max_size=60))
def test_sentences_partition_the_text(text: str) -> None:
    spans = sentence_spans(text)
    assert "".join(text[start:end] for start, end in spans) == text
    assert all(text[start:end].strip() for start, end in spans) or not text.strip()
    starts = [start for start, _ in spans]
    for at in range(len(text)):
        start, end = spans[containing(starts, text, at, at + 1)]
        assert start <= at < end


@pytest.mark.timeout(30)  # Where time is squared, it takes minutes.
@pytest.mark.parametrize("unit", [".", ".)", ". ", "?x", "\n", '."'])
def test_hostile_text_takes_linear_time(unit: str) -> None:
    text = unit * 200_000 + "x"
    assert sentence_spans(text)[-1][1] == len(text)


def test_tokens_belong_where_their_first_letter_is() -> None:
    text = "One two. Three."
    pieces = ["One", " two", ".", " Three", "."]
    ends = [len("".join(pieces[: i + 1])) for i in range(len(pieces))]
    tokens = [LocatedToken(0, None, end - len(p), end) for p, end in zip(pieces, ends, strict=True)]
    template = [None, LocatedToken(0, None, None, None)]
    completion = Completion([1] * 7, [2], "x", prompt_text=text)
    scores = [9.0, 9.0, 1.0, 2.0, 4.0, 8.0, 16.0]
    found = sentences(PromptMap([*template, *tokens], ["prompt"]), completion, scores)
    assert found == [
        {"message": 0, "start": 0, "end": 8, "text": "One two.", "tokens": 3, "score": 7.0}
        | {"mean": 7 / 3},
        {"message": 0, "start": 9, "end": 15, "text": "Three.", "tokens": 2, "score": 24.0}
        | {"mean": 12.0},
    ]
    assert math.fsum(s["score"] for s in found) == 31.0


def test_parts_have_sentences_of_their_own_and_unlocated_messages_none() -> None:
    content = [{"type": "text", "text": "A. B."}, {"type": "text", "text": "C."}]
    messages = [{"role": "user", "content": content}, {"role": "user", "content": "lost"}]
    completion = Completion([1] * 4, [2], "x", messages=messages)
    tokens = [
        LocatedToken(0, 0, 0, 2),
        LocatedToken(0, 0, 2, 5),
        LocatedToken(0, 1, 0, 2),
        LocatedToken(1, None, 0, 4),
    ]
    prompt_map = PromptMap(tokens, ["user", "user"], frozenset({1}))
    found = sentences(prompt_map, completion, [1.0, 2.0, 3.0, 4.0])
    assert [(s["part"], s["text"], s["score"]) for s in found] == [
        (0, "A.", 1.0),
        (0, "B.", 2.0),
        (1, "C.", 3.0),
    ]
