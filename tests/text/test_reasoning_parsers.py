"""Reasoning as vLLM's own parsers find it, by their marker tokens, and what stays hidden."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.text.output_parsers import MARKERS, take_apart_by, tokenizer_with, tool
from vllm_flashtrace.base.records import Completion
from vllm_flashtrace.text.generated import ParsedOutput, decode_generated
from vllm_flashtrace.text.plan import take_apart
from vllm_flashtrace.text.reasoning import find_reasoning

PARSERS = ["qwen3", "deepseek_r1"]
both = pytest.mark.parametrize("parser", PARSERS)
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "4821"}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_with(*MARKERS)


@pytest.fixture
def find(tokenizer):
    """Gives (text of each stretch of reasoning, answer text, the parts) for a generated text."""

    def run(parser, text, **options):
        parts = take_apart_by(tokenizer, text, reasoning_parser=parser, **options)
        generated = parts.generated
        reasoning = find_reasoning("auto", generated, parsed=parts.reasoning)
        blocks = [
            "".join(generated.full.token(i) for i in block.tokens)
            for block in parts.reasoning or []
        ]
        assert reasoning.tokens == [i for block in parts.reasoning or [] for i in block.tokens]
        return blocks, "".join(generated.full.token(i) for i in reasoning.answer), parts

    return run


@both
@pytest.mark.parametrize(
    ("text", "blocks", "answer"),
    [
        ("<think>\nstep by step\n</think>\n\n4821", ["\nstep by step\n"], "4821"),
        ("step by step</think>4821", ["step by step"], "4821"),  # opened by the template
        ("<think>step by step", ["step by step"], ""),  # cut off while thinking
        ("step by step", ["step by step"], ""),
        ("<think>a</think>b<think>c d</think> 4821", ["a", "c d"], " 4821"),
        ("<think>a</think>b<think>c</think>d<think>e", ["a", "c", "e"], ""),
        ("<think>the cat</think>the cat", ["the cat"], "the cat"),
        ("<think>a <think> b</think>4821", ["a  b"], "4821"),
    ],
)
def test_blocks_lie_between_the_parsers_tokens(find, parser, text, blocks, answer):
    found = find(parser, text)
    assert found[:2] == (blocks, answer)


@both
def test_tags_as_ordinary_text_are_found_by_the_parsers_text(find, parser):
    # No token of its own closes the reasoning here: the tag is spelled in pieces.
    spelled = tokenizer_with("<tool_call>")
    if parser == "deepseek_r1":
        return  # refuses a tokenizer without the tokens
    parts = take_apart_by(spelled, "<think>a b</think>4821", reasoning_parser=parser)
    [block] = parts.reasoning
    assert "".join(parts.generated.full.token(i) for i in block.tokens) == "a b"


def test_tool_call_ends_reasoning_that_was_not_closed(find):
    blocks, _, _ = find("qwen3", f"<think>\nI look.\n{CALL}", tools=[tool("look")])
    assert blocks == ["\nI look.\n"]


def test_thinking_that_was_switched_off(find):
    options = {"chat_template_kwargs": {"enable_thinking": False}}
    assert find("qwen3", "The cat sat.", **options)[:2] == ([], "The cat sat.")


@both
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<think>secret</think>\n\n4821", "4821"),
        ("secret</think>4821", "4821"),
        ("<think>secret", ""),
        ("secret", ""),
        ("<think>secret</think>", ""),
        ("<think>secret 4821</think>4821", "4821"),
        ("<think>secret</think>so<think>secret too</think>4821", "4821"),
        ("<think>secret</think>so<think>secret too", ""),
        ("<think></think>so<think>secret</think>4821", "4821"),
    ],
)
def test_hidden_reasoning_is_cut_off(find, parser, text, shown):
    _, _, parts = find(parser, text, include_reasoning=False)
    assert parts.generated.shown.text.strip() == shown
    assert parts.generated.visible.text == text
    hidden = parts.generated.hidden
    assert all(not parts.generated.shown.token(i) for i in range(hidden))
    _, _, parts = find(parser, text)
    assert parts.generated.hidden == 0


@both
def test_tool_calls_are_shown_where_reasoning_is_hidden(find, parser):
    options = {"include_reasoning": False, "tool_parser": "hermes", "tools": [tool("look")]}
    _, _, parts = find(parser, f"<think>secret</think>{CALL}", **options)
    assert parts.generated.shown.text.startswith('{"name": "look"')


def test_what_cannot_be_located_is_hidden_whole(tokenizer):
    """Reasoning that the parser rewrites."""
    text = "plan: secret. So 4821"
    ids = tokenizer.encode(text, add_special_tokens=False)
    completion = Completion(tokenizer.encode("Q"), ids, text)
    said = ParsedOutput(reasoning="a secret", content="So 4821", hides_reasoning=True)
    parts = take_apart(decode_generated(tokenizer, completion), completion, lambda *_: said)
    assert parts.generated.hidden == len(ids)


WORDS = st.sampled_from(["secret", " cat", "\n", "<think>", "</think>", " 4821", CALL, "😀"])


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    parser=st.sampled_from(PARSERS),
    tools=st.sampled_from([None, "hermes", "qwen3_xml"]),
    words=st.lists(WORDS, min_size=1, max_size=8),
)
def test_nothing_is_shown_but_what_the_client_gets(tokenizer, parser, tools, words):
    text = "".join(words)
    options = {"tool_parser": tools, "tools": [tool("look")]} if tools else {}
    parts = take_apart_by(
        tokenizer, text, reasoning_parser=parser, include_reasoning=False, **options
    )
    generated, parsed = parts.generated, parts.parsed
    shown = generated.shown.text
    assert text.endswith(shown)
    # Not only what the parser calls reasoning: nothing between its markers is shown, either.
    assert "<think>" not in shown
    assert "</think>" not in shown
    if parsed.reasoning and tools is None:  # A tool parser drops text around calls.
        assert shown.count("secret") <= (parsed.content or "").count("secret")
