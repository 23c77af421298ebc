"""Reasoning by option, by what a parser says, and by tags."""

from __future__ import annotations

import pytest

from vllm_flashtrace.api.request import TextTarget, TokensTarget
from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.base.records import Completion
from vllm_flashtrace.text.generated import ParsedOutput, decode_generated
from vllm_flashtrace.text.plan import take_apart
from vllm_flashtrace.text.reasoning import find_reasoning


def said(reasoning, **more):
    """A parser that answers so, whatever it reads."""
    return lambda text, ids: ParsedOutput(reasoning=reasoning, **more)


@pytest.fixture
def find(byte_level):
    """Finds reasoning in a text; gives (reasoning text, answer text, located)."""

    def run(text, option="auto", *, visible=None, prompt="Q: ", parser=None, eos=True):
        ids = byte_level.encode(text, add_special_tokens=False)
        completion = Completion(
            byte_level.encode(prompt, add_special_tokens=False),
            [*ids, byte_level.eos_token_id] if eos else ids,
            text if visible is None else visible,
        )
        generated = decode_generated(byte_level, completion)
        parts = take_apart(generated, completion, parser)
        found = find_reasoning(option, generated, prompt_text=prompt, parsed=parts.reasoning)
        texts = [
            "".join(generated.full.token(i) for i in part) for part in (found.tokens, found.answer)
        ]
        return (*texts, found.located)

    return run


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("<think>step by step</think>4821", "step by step", "4821"),
        ("<think>\nstep\n</think>\n\n4821\n", "step", "4821"),
        ("step</think>4821", "step", "4821"),  # opened by the template
        ("<think>step by step", "step by step", ""),  # cut off while thinking
        ("<think>a</think>b<think>c</think>4821", "ac", "4821"),
        ("<think></think>4821", "", "4821"),
        ("<think>a</think>\n</think></think>\n4821", "a", "4821"),
        ("<think>a</think><think> </think>4821", "a", "4821"),
        ("The code<think>a</think>", "a", ""),
        ("<think>a<think>b</think>4821", "a<think>b", "4821"),
    ],
)
def test_tags(find, text, reasoning, answer):
    found = find(text)
    assert (found[0].strip(), found[1], found[2]) == (reasoning, answer, True)


def test_blank_lines_inside_the_tags_are_reasoning(find):
    reasoning, answer, _ = find("<think>a b\n\nc</think> 4821")
    assert reasoning == "a b\n\nc"
    assert answer.strip() == "4821"


def test_block_opened_in_the_prompt_and_never_closed(find):
    assert find("step by step", prompt="Q<think>\n")[:2] == ("step by step", "")


def test_without_tags_everything_visible_is_answer(find):
    assert find("\nThe code is 4821. ") == ("", "The code is 4821.", False)


def test_none_ignores_tags(find):
    reasoning, answer, located = find("<think>a</think>b", "none")
    assert (reasoning, answer, located) == ("", "<think>a</think>b", True)


def test_explicit_text_is_the_last_occurrence(find):
    assert find("step, step, 4821", TextTarget(text="step"))[0].strip() == "step"
    assert find("step, step, 4821", TextTarget(text="step"))[1] == ", 4821"
    with pytest.raises(TraceError) as error:
        find("4821", TextTarget(text="step"))
    assert error.value.code == "reasoning_not_found"
    assert "step" in error.value.message


def test_explicit_text_may_be_hidden_from_the_client(find):
    assert find("step<|im_end|> 4821", TextTarget(text="<|im_end|>"), visible="step 4821")[0] == (
        "<|im_end|>"
    )


def test_explicit_tokens(find):
    reasoning, answer, _ = find("the cat", TokensTarget(tokens=((0, 1), (0, 1))))
    assert reasoning + answer == "the cat"
    with pytest.raises(TraceError) as error:
        find("the cat", TokensTarget(tokens=((0, 99),)))
    assert error.value.code == "span_out_of_range"
    assert "99" in error.value.message


def test_parser_comes_before_tags(find):
    text = "plan: a. </plan> <think>b</think> 4821"
    found = find(text, parser=said("plan: a."))
    assert found[0] == "plan: a."
    assert found[1].endswith("4821")


def test_closing_marker_behind_parsed_reasoning_is_no_answer(find):
    text = "<think>a</think>\n4821"
    assert find(text, parser=said("a", reasoning_from=7))[:2] == ("a", "4821")


def test_parser_that_finds_none_decides(find):
    assert find("<think>a</think>b", parser=said(None)) == ("", "<think>a</think>b", True)


@pytest.mark.parametrize("name", ["think", "thinking", "seed:think", "reasoning"])
def test_reasoning_in_which_nothing_was_said_is_no_answer(find, name):
    text = f"<{name}>\n\n</{name}>\n\n4821"
    assert find(text, parser=said(None)) == ("", "4821", True)
    assert find(f"{text} <{name}></{name}>", "none")[1] == f"4821 <{name}></{name}>"


@pytest.mark.parametrize(
    "answer", [{"reasoning": None, "reads_reasoning": False}, {"reasoning": "x"}]
)
def test_parser_that_cannot_tell_leaves_it_to_the_tags(find, answer):
    assert find("<think>a</think>b", parser=said(**answer))[:2] == ("a", "b")


def test_parser_reads_the_clients_text_and_all_ids(find, byte_level):
    calls = []
    find("the cat", parser=lambda text, ids: calls.append((text, list(ids))) or ParsedOutput())
    [(text, ids)] = calls
    assert text == "the cat"
    assert byte_level.decode(ids) == "the cat<|im_end|>"


@pytest.mark.parametrize(("reasoning", "found"), [("step", "step"), ("e", None)])
def test_reasoning_in_another_text_is_placed_only_if_unambiguous(find, reasoning, found):
    # The client's text is not how the tokens decode: "e" occurs twice in that.
    located = find("step e, 4821", visible="step! e, 4821", parser=said(reasoning))
    assert located[0].strip() == (found or "")
    assert located[2] is (found is not None)
