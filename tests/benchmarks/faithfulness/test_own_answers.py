"""Questions, what counts as a right answer, and the numbers made of rankings of sentences."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.faithfulness import own_summary
from benchmarks.faithfulness.own_answers import ANSWER, is_right, parted, prompt_of
from benchmarks.faithfulness.own_methods import Embedder, bm25, words
from benchmarks.faithfulness.own_summary import found
from benchmarks.faithfulness.paraphrased import TASKS, Question, make_question, spelled


@pytest.mark.parametrize("task", TASKS)
def test_questions_share_no_word_of_the_answer_with_its_sources(task: str) -> None:
    for number in range(40):
        question = make_question(task, number, 12, seed=3)
        assert question == make_question(task, number, 12, seed=3)
        assert len(question.sentences) == len(set(question.sentences)) == 12
        gold = [question.sentences[i] for i in question.gold]
        assert gold
        for sentence in gold:
            assert question.answer.lower() not in words(sentence)
        # A sentence that says nothing about it has the answer's own word.
        others = [s for i, s in enumerate(question.sentences) if i not in question.gold]
        assert any(re.search(rf"(\b|_){question.answer}\b", s) for s in others)


def test_later_statements_stand_behind_what_they_contradict() -> None:
    for number in range(40):
        question = make_question("latest", number, 10, seed=0)
        [gold] = question.gold
        thing = words(question.sentences[gold])[2]
        other = [i for i, s in enumerate(question.sentences) if thing in words(s) and i < gold]
        assert gold > 0
        assert other
        code = make_question("code", number, 10, seed=0)
        first, second = code.gold
        name = code.sentences[first].split(" = ")[0]
        assert f"= {name} *" in code.sentences[second]


def test_numbers_are_spelled() -> None:
    assert [spelled(n) for n in (0, 13, 20, 42, 99)] == [
        *("zero", "thirteen", "twenty", "forty-two", "ninety-nine")
    ]


PLAIN = Question(("One.",), (0,), "How many? Answer with digits only.", "24", ("18",))
THOUGHT = Question(("One.",), (0,), "How many?", "1000", think=True)


@pytest.mark.parametrize(
    ("question", "text", "right"),
    [
        (PLAIN, "24", True),
        (PLAIN, "There are 24 of them.", True),
        (PLAIN, "24, not 18.", False),
        (PLAIN, "124", False),
        (PLAIN, "24.5", False),
        (PLAIN, "2,400", False),
        (THOUGHT, "Ten times a hundred. Answer: 1,000", True),
        (THOUGHT, "It is 1000.", False),
        (THOUGHT, "It is 1000. Answer: 12", False),
    ],
)
def test_right_answers(question: Question, text: str, right: bool) -> None:
    assert is_right(question, text) is right


def test_classes_are_right_in_the_plural() -> None:
    question = Question(("One.",), (0,), "Which?", "flower", ("fruit",))
    assert is_right(question, "Flowers.")
    assert not is_right(question, "Flowers and fruits.")


def test_prompts_ask_for_a_word_or_a_sentence() -> None:
    assert prompt_of(PLAIN, 0).endswith("How many? Answer with digits only.")
    assert prompt_of(PLAIN, 1).endswith("How many? Answer in one sentence.")
    assert ANSWER in prompt_of(THOUGHT, 1)
    reasoning, output = parted("Answer: no. Answer: 7")
    assert (reasoning, output) == ("Answer: no. Answer:", " 7")


def test_found_counts_ties_against_the_method() -> None:
    scores = np.array([1.0, 3.0, 3.0, 0.0])
    assert found(scores, frozenset({1, 2})) == 1.0
    assert found(scores, frozenset({1})) == 0.0
    assert found(scores, frozenset({0, 1})) == 0.5
    assert found(np.zeros(4), frozenset({0})) == 0.0


def test_bm25_prefers_rare_words_and_short_sentences() -> None:
    sentences = [words(s) for s in ("the cat sat", "the dog", "the dog sat on the mat today")]
    scores = bm25(words("The dog?"), sentences)
    assert scores.argmax() == 1
    assert scores[1] > scores[2] > scores[0]
    idf = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    length = 1 - 0.75 + 0.75 * 2 / 4
    common = math.log(1 + (3 - 3 + 0.5) / (3 + 0.5))
    by_hand = (idf + common) * 2.5 / (1 + 1.5 * length)
    assert scores[1] == pytest.approx(by_hand)


def test_unknown_words_score_nothing() -> None:
    found_: Any = bm25(["zebra"], [["a"], ["b"]])
    assert found_.tolist() == [0.0, 0.0]


def test_embeddings_are_means_of_the_packages_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"carp": 0, "fish": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    package = tmp_path / "wordllama"
    for name in ("weights", "tokenizers"):
        (package / name).mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('nothing of it is run')\n")
    tokenizer.save(str(package / "tokenizers" / "tokenizer.json"))
    vectors = np.array([[3, 0], [0, 3], [1, 1]], np.float16)
    save_file({"embedding.weight": vectors}, package / "weights" / "any_256.safetensors")
    monkeypatch.syspath_prepend(str(tmp_path))
    embed = Embedder().embed
    assert embed("carp").tolist() == [1.0, 0.0]
    assert embed("carp fish").tolist() == pytest.approx([0.5**0.5, 0.5**0.5])


class Work:
    """Rows of a work file."""

    def __init__(self, *rows: dict[str, Any]) -> None:
        names = ("kind", "example", "method")
        self.rows = {tuple(row[name] for name in names if name in row): row for row in rows}

    def get(self, *key: str) -> dict[str, Any] | None:
        return self.rows.get(key)


def test_verified_sentences_are_ordered_by_what_is_lost_and_stay_ahead() -> None:
    """Of six sentences ours proposes four; the best of all by leave-one-out is not among them."""
    tokens = (5.0, 4.0, 3.0, 2.0, 1.0, 0.0)
    lost = (0.0, 7.0, 1.0, -2.0, 9.0, 0.0)
    prepared = SimpleNamespace(
        user=(0, 6), texts=list("abcdef"), sentences=tuple((i, i + 1) for i in range(6))
    )
    case = SimpleNamespace(key="a", task="t", prepared=prepared)
    facts = {"evaluations": 7.0}
    work = Work(
        *(
            {"kind": "scores", "example": "a", "method": name, "values": list(values), **more}
            for name, values, more in (
                ("flashtrace-k1", tokens, {"seconds": 2.0}),
                ("loo-sentence", lost, {"seconds": 14.0, "facts": facts}),
            )
        )
    )
    scores = own_summary.sentence_scores([case], work)
    verified = scores["flashtrace-k1-verified4", "mean"]["a"]
    assert verified[:4].tolist() == pytest.approx(lost[:4], abs=1e-5)
    assert 0 <= verified[5] < verified[4] < 1e-6
    order = own_summary.order_of("flashtrace-k1-verified4", verified)
    assert np.argsort(-order, kind="stable").tolist() == [1, 2, 0, 3, 4, 5]
    # Its own seconds, and those of the whole text and four without a sentence.
    assert own_summary.seconds_of("flashtrace-k1-verified4", "a", work) == pytest.approx(12.0)
    assert own_summary.seconds_of("loo-sentence", "a", work) == 14.0
    assert own_summary.seconds_of("heads-mean-own", "a", work) is None


def test_the_cheapest_methods_are_compared_with_the_defaults_on_the_same_answers() -> None:
    """The defaults find the third of three sentences on each of twenty answers, words the first."""
    prepared = SimpleNamespace(
        user=(0, 3), texts=list("abc"), sentences=((0, 1), (1, 2), (2, 3)), prompt_length=7
    )
    cases = [
        SimpleNamespace(
            key=str(i), task="even" if i % 2 == 0 else "odd", prepared=prepared, gold={2}
        )
        for i in range(20)
    ]
    best = {own_summary.DEFAULTS: [0.0, 1.0, 2.0], "overlap": [2.0, 1.0, 0.0], "recency": [0, 0, 1]}
    rows = [
        {"kind": "scores", "example": case.key, "method": method, "values": values}
        for case in cases
        for method, values in best.items()
        if method != "recency" or case.task == "odd"  # It failed on the others.
    ]
    result = own_summary.widely(cases, list(best), Work(*rows))
    assert result["prompt_tokens"] == 7
    wide = {row["method"]: row for row in result["rows"]}
    assert wide["overlap"]["found"] == [0, 0, 0]
    assert wide["overlap"]["tasks"] == {"even": [0, 10], "odd": [0, 10]}
    assert wide["overlap"]["test"][:2] == [20, 1]
    assert wide["overlap"]["test"][3] < 0.001
    assert wide["recency"]["tasks"] == {"odd": [1, 10]}
    assert wide["recency"]["test"][:2] == [10, 0]
    assert wide[own_summary.DEFAULTS]["test"] is None
    shown = own_summary.by_length({"wide": result}, {"wide": result})
    assert "| method | 7 tokens (n = 20) | 7 tokens (n = 20) |" in shown
    assert "| overlap | 0.00 [0.00, 0.00] * | 0.00 [0.00, 0.00] * |" in shown
    assert "| recency |  | 1.00 |" in own_summary.widely_by_task({"wide": result})
