"""Messages whose place in the prompt is not known are named, and templates may be hostile."""

from __future__ import annotations

import jinja2
import pytest

from tests.text.jinja_templates import template
from vllm_flashtrace.base.records import Completion
from vllm_flashtrace.text.offsets import token_offsets
from vllm_flashtrace.text.prompt_map import locate_prompt, prompt_call_span

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
# Earlier thoughts are cut off, as reasoning models' templates do.
WITHOUT_THOUGHTS = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
TWICE = CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.content }}")
CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<call>CALL</call>{% endfor %}<|im_end|>\n{% endfor %}"
)
JSON_CALLS = CALLS.replace("CALL", "{{ c.function.name }} {{ c.function.arguments | tojson }}")
XML_CALLS = CALLS.replace(
    "CALL",
    "{{ c.function.name }}{% for k, v in c.function.arguments.items() %}<{{ k }}>{{ v }}</{{ k }}>"
    "{% endfor %}",
)


@pytest.fixture
def locate(byte_level):
    def run(messages, source=CHATML, render="same"):
        own = template(source)
        ids = byte_level.encode(own(messages), add_special_tokens=False)
        prompt = token_offsets(byte_level, ids)
        completion = Completion(ids, [0], "", messages=messages)
        return locate_prompt(completion, prompt, own if render == "same" else render), prompt

    return run


def message(role, content, **fields):
    return {"role": role, "content": content, **fields}


def call(**arguments):
    return [{"type": "function", "function": {"name": "sat", "arguments": arguments}}]


def text_of(prompt, tokens):
    return "".join(prompt.token(i) for i in tokens)


@pytest.mark.parametrize("source", [CHATML, CHATML.replace("m.content", "m.content | trim")])
def test_located_messages_are_not_named(locate, source):
    found, _ = locate(
        [message("user", " The cat "), message("assistant", ""), message("user", "A")], source
    )
    assert found.unlocated == frozenset()


def test_message_rendered_twice_is_named(locate):
    found, _ = locate([message("user", "The cat")], TWICE)
    assert found.unlocated == {0}


def test_message_that_the_template_takes_apart_is_named_and_costs_no_other(locate):
    messages = [
        message("user", "Which code?"),
        message("assistant", "<think>step</think>The code"),
        message("user", "The cat"),
    ]
    found, prompt = locate(messages, WITHOUT_THOUGHTS)
    assert found.unlocated == {1}
    assert text_of(prompt, found.of_role("user")) == "Which code?The cat"


def test_message_that_is_not_rendered_is_not_missing(locate):
    messages = [message("system", "Be helpful"), message("user", "The cat")]
    found, _ = locate(messages, CHATML.replace("in messages", "in messages[1:]"))
    assert found.unlocated == frozenset()
    assert {located.message for located in found.tokens if located is not None} == {1}


def test_template_that_raises_on_marks_leaves_the_search(locate):
    def render(messages):
        raise jinja2.TemplateError("roles must alternate")

    found, prompt = locate([message("user", "Which code?")], render=render)
    assert text_of(prompt, found.of_role("user")) == "Which code?"
    assert found.unlocated == frozenset()


def test_search_does_not_take_part_of_a_word(locate):
    # The second message is dropped; its text is part of the first one's word.
    source = CHATML.replace("in messages", "in messages[:1]")
    found, _ = locate([message("user", "secrets"), message("user", "secret")], source, render=None)
    assert all(located is None or located.message == 0 for located in found.tokens)
    assert 1 in found.unlocated
    found, _ = locate([message("user", "art")], "<|im_start|>: no text here", render=None)
    assert found.tokens == [None] * len(found.tokens)


@pytest.mark.parametrize("field", ["reasoning_content", "tool_calls"])
def test_search_knows_nothing_of_calls_and_thoughts(locate, field):
    value = "step" if field == "reasoning_content" else call(code="4821")
    messages = [message("user", "Which code?"), message("assistant", "It is", **{field: value})]
    found, prompt = locate(messages, render=None)
    assert text_of(prompt, found.of_role("assistant")) == "It is"
    assert found.unlocated == {1}


def test_earlier_thoughts_are_part_of_their_turn(locate):
    source = CHATML.replace("{{ m.content }}", "{{ m.reasoning_content or '' }}; {{ m.content }}")
    messages = [message("user", "Code?"), message("assistant", "It is", reasoning_content="step")]
    found, prompt = locate(messages, source)
    said = text_of(prompt, found.of_role("assistant"))
    assert "step" in said and "It is" in said
    assert found.unlocated == frozenset()


@pytest.mark.parametrize(
    ("arguments", "last"),
    [
        ({"a": "the cat", "n": 17}, '"n": 17'),
        ({"n": 17, "a": "the cat"}, "the cat"),
        ({"n": [1, {"b": "x"}]}, '"x"}]'),
        ({"n": None}, "null"),
        ({}, "sat"),
    ],
)
def test_calls_are_located_whole(locate, arguments, last):
    messages = [
        message("assistant", None, tool_calls=call(**arguments) + call(code="4821")),
        message("tool", "17"),
    ]
    found, prompt = locate(messages, JSON_CALLS)
    said = text_of(prompt, found.of_role("assistant"))
    assert said.startswith("sat")
    assert last in said.partition("4821")[0]
    assert "4821" in said
    assert found.unlocated == frozenset()


def test_call_with_values_in_an_unknown_form_is_named(locate):
    messages = [message("assistant", None, tool_calls=call(code="4821", n=17))]
    found, _ = locate(messages, XML_CALLS)
    assert found.unlocated == {0}
    messages = [message("assistant", None, tool_calls=call(code="4821"))]
    found, _ = locate(messages, XML_CALLS)
    assert found.unlocated == frozenset()


@pytest.mark.parametrize(
    ("arguments", "prompt", "span"),
    [
        ('{"n":1}', 'f {"n":1} later {"n":1}', (0, 9)),
        ('{"n":1}', 'f {"n": 1}', (0, 10)),
        ({"n": 1}, 'f {"n":1}', (0, 9)),
        ({"n": 1}, "f n=1", None),
        ("not json", "f not json", (0, 10)),
        ("[1]", "f [ 1 ]", None),
        ("f", "f f", (0, 3)),
        ("f", "f", None),
        ("", "f", (0, 1)),
        (None, "f", (0, 1)),
    ],
)
def test_range_of_a_call(arguments, prompt, span):
    assert prompt_call_span({"name": "f", "arguments": arguments}, prompt, 0, 1) == span


def test_call_does_not_take_the_arguments_of_the_next(locate):
    only_last = JSON_CALLS.replace("{{ c.function.arg", "{% if loop.last %}{{ c.function.arg")
    only_last = only_last.replace("tojson }}", "tojson }}{% endif %}")
    messages = [message("assistant", None, tool_calls=call(n=1) + call(n=1))]
    found, _ = locate(messages, only_last)
    assert found.unlocated == {0}


def test_call_whose_marks_the_template_spoils_is_named(locate):
    messages = [
        message("assistant", "The cat", tool_calls=call(code="4821")),
        message("user", "Which code?"),
    ]
    found, prompt = locate(messages, JSON_CALLS.replace("tojson", "string"))
    assert text_of(prompt, found.of_role("assistant")) == "The cat"
    assert found.unlocated == {0}
