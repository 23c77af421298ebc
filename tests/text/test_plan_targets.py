"""Which generated tokens a target names, and which tokens are skipped."""

from __future__ import annotations

import json

import pytest

import vllm_flashtrace.text.plan as plan
from vllm_flashtrace.api.request import RequestLimits, parse_flashtrace_field
from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.base.records import Completion
from vllm_flashtrace.text.generated import decode_generated
from vllm_flashtrace.text.plan import resolve_target, skip_mask, take_apart
from vllm_flashtrace.text.reasoning import find_reasoning

PROMPT = 5


@pytest.fixture
def resolve(byte_level):
    """Resolves a target; gives its weights by generated token and the tokens' text."""

    def run(text, target, *, visible=None, special="<|im_end|>"):
        ids = text
        if isinstance(text, str):
            ids = byte_level.encode(text + special, add_special_tokens=False)
        completion = Completion([0] * PROMPT, ids, text if visible is None else visible)
        request = parse_flashtrace_field({"target": target}, RequestLimits())
        generated = decode_generated(byte_level, completion)
        reasoning = find_reasoning("auto", generated)
        parts = take_apart(generated, completion, None)
        call = parts.tool_call
        found = resolve_target(request.target, generated, reasoning, PROMPT, call).weights
        positions = [int(p) - PROMPT for p in found.positions]
        weights = dict(zip(positions, found.weights.tolist(), strict=True))
        return weights, "".join(generated.full.token(i) for i in positions)

    return run


@pytest.mark.parametrize(
    ("text", "target", "found"),
    [
        ("<think>a</think>\n\n4821\n", "output", "4821"),
        ("<think>a</think> 4821", "generated", "<think>a</think> 4821"),
        ("the cat", "output", "the cat"),
        ("code 4821, code 4821.", {"text": "4821"}, " 4821"),
        ("é😀é", {"text": "😀"}, "😀"),
        ("code 17, code 4821.", {"regex": r"code (\d+)"}, " 4821"),
        ("code 17, code 4821.", {"regex": r"\d+, code"}, " 17, code"),
    ],
)
def test_text_of_target(resolve, text, target, found):
    weights, tokens = resolve(text, target)
    if found == "😀":  # four pieces of one character
        assert tokens == found * 4
    else:
        assert tokens in (found, found.strip())
    assert set(weights.values()) == {1.0}


def test_text_is_the_last_occurrence(resolve, byte_level):
    first, _ = resolve("code 4821, code", {"text": "code"})
    ids = byte_level.encode("code 4821, code", add_special_tokens=False)
    assert max(first) == len(ids) - 1


def test_tokens_and_weights_index_generated_tokens(resolve):
    assert resolve("the cat sat", {"tokens": [[0, 1], [0, 2]]})[0] == {0: 1.0, 1: 1.0}
    assert resolve("the cat sat", {"weights": {"1": 0.5, "0": 2, "2": 0}})[0] == {0: 2.0, 1: 0.5}


def test_end_of_sequence_and_stop_text_are_no_target(resolve):
    assert resolve("the cat", "generated")[1] == "the cat"
    assert resolve("the cat STOP", "generated", visible="the cat")[1] == "the cat"


def test_visible_special_tokens_are_found(resolve):
    weights, tokens = resolve("the cat", {"text": "<|im_end|>"}, visible="the cat<|im_end|>")
    assert tokens == "<|im_end|>"
    assert len(weights) == 1


@pytest.mark.parametrize(
    ("text", "visible", "target", "code"),
    [
        ("<think>a", None, "output", "empty_target"),
        ("<think>a</think>\n", None, "output", "empty_target"),
        ("", "", "generated", "empty_target"),
        ("STOP", "", "output", "empty_target"),
        ("the cat", None, {"text": "dog"}, "target_not_found"),
        ("the cat STOP", "the cat", {"text": "STOP"}, "target_not_found"),
        ("the cat", None, {"regex": "dog"}, "target_not_found"),
        ("the cat", None, {"tokens": [[0, 99]]}, "span_out_of_range"),
        ("the cat", None, {"tokens": [[10**9, 10**9 + 5]]}, "span_out_of_range"),
        ("the cat", None, {"weights": {"99": 1}}, "span_out_of_range"),
        ("the cat", None, {"tool_call": 0}, "tool_call_not_found"),
    ],
)
def test_refusals(resolve, text, visible, target, code):
    with pytest.raises(TraceError) as error:
        resolve(text, target, visible=visible)
    assert error.value.code == code
    assert "flashtrace.target" in error.value.message
    if isinstance(target, dict) and "text" in target:
        assert target["text"] in error.value.message


@pytest.mark.parametrize(
    ("text", "visible", "target", "why"),
    [
        ("<think>a", None, "output", "all that was generated is reasoning; 'generated' explains"),
        ("<think>a</think>\n", None, "output", "all that was generated is reasoning"),
        ("<think></think>", None, "output", "nothing but markers of reasoning"),
        (" \n", None, "output", "nothing but blanks"),
        ("STOP", "", "generated", "a stop string cut off all the text"),
        ("", "", "generated", "nothing but special tokens"),
    ],
)
def test_an_empty_target_says_why_and_what_would_do(
    resolve, byte_level, text, visible, target, why
):
    with pytest.raises(TraceError, match=why) as error:
        resolve(text, target, visible=visible)
    count = len(byte_level.encode(f"{text}<|im_end|>", add_special_tokens=False))
    assert f'{{"tokens": [[0, {count}]]}}' in error.value.message


def test_a_part_of_a_character_is_no_text(resolve, byte_level):
    token = byte_level.encode("\U0001f600", add_special_tokens=False)[0]
    with pytest.raises(TraceError, match="parts of a character"):
        resolve([token], "output", visible="")


def test_last_generated_token_is_within_range(resolve, byte_level):
    length = len(byte_level.encode("the cat<|im_end|>", add_special_tokens=False))
    assert resolve("the cat", {"tokens": [[length - 1, length]]})[1] == "<|im_end|>"
    with pytest.raises(TraceError):
        resolve("the cat", {"tokens": [[length - 1, length + 1]]})


def test_slow_regex_is_an_error_of_its_own(resolve, monkeypatch):
    monkeypatch.setattr(plan, "_REGEX_SECONDS", 0.01)
    with pytest.raises(TraceError) as error:
        resolve("a" * 3000, {"regex": r".*.*.*\da"})
    assert error.value.code == "regex_timeout"
    assert json.dumps(r".*.*.*\da") in error.value.message


TOKENS = [" cat", ",", " .", "\n", "", "...", "a,", "Cat"]
PUNCTUATION = [
    *"!?:;()[]{}\"'-/",
    "\u2014",
    " \u2013 ",
    "\u201c",
    "»",
    "。",
    ").",
    '?"',
    ". ,",
    "…",
]
OTHER = ["3.14", "-1", "<|im_end|>", "$", "+", "=", "a.", "\ufffd", "😀"]


def test_none_skips_nothing():
    assert skip_mask(TOKENS, "none") is None


@pytest.mark.parametrize(
    ("rule", "skipped"),
    [
        ("punctuation", [",", " .", "\n", "", "..."]),
        (["cat"], [" cat"]),
        ([" cat ", "..."], [" cat", "..."]),
        ([" "], ["\n", ""]),
        ([], []),
    ],
)
def test_rule(rule, skipped):
    mask = skip_mask(TOKENS, rule)
    assert [t for t, skip in zip(TOKENS, mask.tolist(), strict=True) if skip] == skipped


def test_punctuation_is_what_consists_of_nothing_else():
    assert skip_mask(PUNCTUATION, "punctuation").all()
    assert not skip_mask(OTHER, "punctuation").any()


@pytest.mark.parametrize("blank", ["", " ", "\n\n", "\t", "\r\n", "\u3000", "\xa0", "\x1c"])
def test_punctuation_covers_the_list_of_the_reference_package(blank):
    # flashtrace: a token is skipped if its text, stripped, is one of "", "," and ".".
    assert skip_mask([blank, "," + blank, blank + "."], "punctuation").all()
