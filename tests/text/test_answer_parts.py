"""The parts of an answer: nothing is lost, and each is what a reader would check by itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_flashtrace.text.answer_parts import answer_parts
from vllm_flashtrace.text.call_formats import WrittenCall


def parts(kind: str, text: str) -> list[str]:
    return [text[slice(*part.span)] for part in answer_parts(kind, text, (0, len(text)))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is 4821. Ask Bob!  Why?", ["It is 4821.", "Ask Bob!", "Why?"]),
        ("# Plan\n- First one. With a reason.\n* second\n 3. third\n(b) fourth\n---\n",
         ["# Plan", "First one. With a reason.", "second", "third", "fourth"]),
        ("Run:\n```sh\nls -l\n\ncat a\n```\nDone.", ["Run:", "ls -l\n\ncat a", "Done."]),
        ("Not closed:\n```\na = 1\nb = 2", ["Not closed:", "a = 1\nb = 2"]),
        ("2.5 kg is right. 3 is not.", ["2.5 kg is right.", "3 is not."]),
        ("[1, 2", ["[1, 2"]),
        ("...", []),
    ],
)  # fmt: skip
def test_claims(text: str, expected: list[str]) -> None:
    assert parts("claims", text) == expected


@pytest.mark.parametrize("frame", ["{}", "```json\n{}\n```", "  {}\n"])
def test_claims_of_a_json_answer_are_its_values(frame: str) -> None:
    document = {
        "name": 'Bob: the "first"',
        "of": [{"a b": 1.5e3}, [True, None, ""]],
        "none": {},
        "last": "x",
    }
    written = json.dumps(document, indent=1)
    text = frame.replace("{}", written)
    found = answer_parts("claims", text, (0, len(text)))
    assert {part.path: text[slice(*part.span)] for part in found} == {
        "$.name": 'Bob: the \\"first\\"',
        '$.of[0]["a b"]': "1500.0",
        "$.of[1][0]": "true",
        "$.of[1][1]": "null",
        "$.last": "x",
    }


_LEAVES = st.text(alphabet='ab "\\\n,:{}[]', max_size=5) | st.integers() | st.booleans()


@given(
    st.dictionaries(st.text(alphabet='ab:"', max_size=3), _LEAVES)
    | st.recursive(st.lists(_LEAVES), lambda inner: st.lists(inner, max_size=3), max_leaves=8)
)
def test_every_value_of_a_json_answer_is_found(document: Any) -> None:
    text = json.dumps(document)
    found = answer_parts("claims", text, (0, len(text)))
    values = [text[slice(*part.span)] for part in found]
    assert values == [said for leaf in leaves(document) if (said := written(leaf))]


def leaves(node: Any) -> list[Any]:
    if isinstance(node, dict):
        return [leaf for value in node.values() for leaf in leaves(value)]
    return [leaf for value in node for leaf in leaves(value)] if isinstance(node, list) else [node]


def written(leaf: Any) -> str:
    """As it stands in the text, without quotes; empty where it says nothing."""
    text = json.dumps(leaf)
    text = text[1:-1].strip() if isinstance(leaf, str) else text
    return text if any(c.isalnum() for c in text) else ""


@given(st.text(alphabet="ab. \n\t!-1)`", max_size=60))
def test_no_letter_of_an_answer_is_lost(text: str) -> None:
    for kind in ("sentences", "lines"):
        assert "".join("".join(parts(kind, text)).split()) == "".join(text.split())
    spans = [part.span for part in answer_parts("claims", text, (0, len(text)))]
    assert all(a < b for a, b in spans) and spans == sorted(spans)


def test_arguments_of_tool_calls_follow_the_content() -> None:
    text = 'Looking it up. {"name": "find", "arguments": {"city": "Rome", "empty": ""}}'
    begin = text.index("{")
    city, empty = text.index("Rome"), text.index('""') + 1
    call = WrittenCall(
        "find", (begin, len(text)), {}, {"city": (city, city + 4), "empty": (empty, empty)}
    )
    content, argument = answer_parts("claims", text, (0, begin), [call])
    assert text[slice(*content.span)] == "Looking it up."
    assert (argument.span, argument.tool_call, argument.argument) == ((city, city + 4), 0, "city")
