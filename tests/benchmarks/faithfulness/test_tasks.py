"""Generated tasks: gold holds what the answer rests on, the length is met, the seed decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faithfulness.example import Example, prepare
from benchmarks.faithfulness.tasks import TASKS, make_examples, read_examples, variant_of


@pytest.fixture(scope="module")
def tokenizer(smollm2_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_folder)


@pytest.fixture(scope="module", params=list(TASKS))
def examples(request: pytest.FixtureRequest, tokenizer: Any) -> list[Example]:
    return make_examples(request.param, 256, 30, seed=7, tokenizer=tokenizer)


def gold_texts(example: Example) -> list[str]:
    return [example.prompt[start:end] for start, end in example.gold]


def test_gold_spans_hold_what_the_output_says(examples: list[Example]) -> None:
    for example in examples:
        gold = " ".join(gold_texts(example))
        names = [word.strip(',."()') for word in example.output.replace("=", " ").split()]
        values = [word for word in names if any(letter.isdigit() for letter in word)]
        values = values or names[-1:]  # answers of the multi-hop task are names alone
        assert values and all(value in gold for value in values), example.id


def test_every_gold_fact_is_there_once_and_named_in_the_reasoning(examples: list[Example]) -> None:
    for example in examples:
        assert len(set(example.gold)) == len(example.gold) > 0
        for text in gold_texts(example):
            assert example.prompt.count(text) == 1
        if example.task == "multihop":
            assert all(text in example.reasoning for text in gold_texts(example))
        if example.task == "variables":
            steps = [text.replace(" = ", " is ") for text in gold_texts(example)]
            assert all(step in example.reasoning for step in steps)


def test_gold_has_a_fact_for_every_needle_and_hop(examples: list[Example]) -> None:
    for example in examples:
        variant = variant_of(example.id)
        expected = {
            "niah": lambda n: n,
            "variables": lambda n: n + 1,
            "multihop": lambda n: n,
            "agent": lambda n: 1,
        }[example.task](int(variant[1:]) if variant[1:].isdigit() else 1)
        assert len(example.gold) == expected, example.id


def test_lengths_are_met_within_a_tenth(examples: list[Example], tokenizer: Any) -> None:
    for example in examples:
        prepared = prepare(example, tokenizer)
        assert abs(prepared.prompt_length - 256) <= 25.6
        assert prepared.gold and prepared.reasoning_sentences


@pytest.mark.parametrize("task", list(TASKS))
def test_longer_contexts_hold_the_same_facts(task: str, tokenizer: Any) -> None:
    [short] = make_examples(task, 256, 1, seed=7, tokenizer=tokenizer)
    [long] = make_examples(task, 2000, 1, seed=7, tokenizer=tokenizer)
    assert abs(prepare(long, tokenizer).prompt_length - 2000) <= 200
    assert len(gold_texts(long)) == len(gold_texts(short))


@pytest.mark.parametrize("task", list(TASKS))
def test_the_seed_decides(task: str, tokenizer: Any) -> None:
    first = make_examples(task, 256, 6, seed=1, tokenizer=tokenizer)
    assert make_examples(task, 256, 4, seed=1, tokenizer=tokenizer) == first[:4]
    other = make_examples(task, 256, 6, seed=2, tokenizer=tokenizer)
    assert all(a.prompt != b.prompt for a, b in zip(first, other, strict=True))
    assert len({example.id for example in first}) == len({e.prompt for e in first}) == 6


def test_too_short_a_length_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="64 tokens was asked for"):
        make_examples("niah", 64, 3, seed=0, tokenizer=tokenizer)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    rows = [
        {"prompt": "The code is 7.", "reasoning": "So", "output": " 7", "gold": [[12, 13]]},
        {"prompt": "Hello", "output": "Hi", "more": 1},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    first, second = read_examples(path, 9)
    assert (first.task, gold_texts(first), first.length) == ("mine", ["7"], 0)
    assert (second.reasoning, second.gold) == ("", ())
    assert first.id != second.id
    assert read_examples(path, limit=1) == [first]


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"prompt": "a"}', '{"prompt": "a", "output": "b", "gold": [[0, 2]]}'],
)
def test_bad_lines_of_files_are_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "output": "b"}\n' + line)
    with pytest.raises(ValueError, match=r"bad\.jsonl:2"):
        read_examples(path, 9)
