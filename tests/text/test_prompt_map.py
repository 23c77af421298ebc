"""Locations of prompt tokens in the client's messages: right, or absent."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.text.jinja_templates import template
from vllm_flashtrace.base.records import Completion
from vllm_flashtrace.text.offsets import token_offsets
from vllm_flashtrace.text.prompt_map import locate_prompt

PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TRIMMING = PLAIN.replace("m.content", "m.content | trim")
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n"
    "{% endif %}" + PLAIN
)
SYSTEM_LAST = (
    "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% for m in messages if m.role == 'system' %}rules: {{ m.content }}\n{% endfor %}"
)
UPPER = PLAIN.replace("m.content", "m.content | upper")
TWICE = PLAIN.replace("{{ m.content }}", "{{ m.content }} / {{ m.content }}")
DROPS_FIRST = PLAIN.replace("in messages", "in messages[1:]")
ESCAPES = PLAIN.replace("{{ m.content }}", "{{ m.content.encode('ascii', 'ignore').decode() }}")
PARTS = (
    "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text if p.type == 'text' else '<image>' }}\n{% endfor %}"
    "{% endif %}{% endfor %}"
)
TOOLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} "
    "{% set a = c.function.arguments %}{{ a if a is string else a | tojson }}"
    "</call>{% endfor %}<|im_end|>\n{% endfor %}"
)


@pytest.fixture
def locate(byte_level):
    """Locates the tokens of a rendered chat and checks every location against the message."""

    def run(messages, source=PLAIN, *, render="same", before="", keep=None):
        template_render = template(source)
        text = before + template_render(messages)
        ids = byte_level.encode(text, add_special_tokens=False)
        ids = ids if keep is None else ids[-keep:]
        prompt = token_offsets(byte_level, ids)
        completion = Completion(ids, [0], "", messages=messages)
        found = locate_prompt(completion, prompt, template_render if render == "same" else render)
        check_locations(found, prompt, messages)
        return found, prompt

    return run


def contents_of(messages):
    contents = {}
    for index, message in enumerate(messages):
        content = message["content"]
        if isinstance(content, str):
            contents[index, None] = content
        else:
            contents |= {(index, i): part.get("text") for i, part in enumerate(content or [])}
    return contents


def check_locations(found, prompt, messages):
    contents = contents_of(messages)
    assert len(found.tokens) == len(prompt)
    for i, located in enumerate(found.tokens):
        if located is not None and located.start is not None:
            said = contents[located.message, located.part][located.start : located.end]
            assert said
            # A token that straddles the edge of a message holds more than what is said in it.
            assert said in prompt.token(i)


def spelled(found, message, part=None):
    """Characters of a message that have a token."""
    return {
        c
        for located in found.tokens
        if located is not None and (located.message, located.part) == (message, part)
        if located.start is not None
        for c in range(located.start, located.end)
    }


def fully_located(found, message, content, part=None):
    return spelled(found, message, part) == set(range(len(content)))


CHAT = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "The secret code is 4821. 😀 Which code?"},
    {"role": "assistant", "content": "4821"},
    {"role": "user", "content": "The code"},
]


@pytest.mark.parametrize("source", [PLAIN, TRIMMING, DEFAULT_SYSTEM, SYSTEM_LAST])
def test_every_character_of_every_message_is_located(locate, source):
    found, _ = locate(CHAT, source)
    assert all(fully_located(found, i, m["content"]) for i, m in enumerate(CHAT))
    assert found.roles == ["system", "user", "assistant", "user"]


def test_template_tokens_have_no_location(locate):
    found, prompt = locate(CHAT)
    for i, located in enumerate(found.tokens):
        assert (located is None) == (prompt.token(i) in ("<|im_start|>", "<|im_end|>", "\n")) or (
            prompt.token(i) in "systemuserassistant"
        )


def test_template_that_trims_keeps_offsets_of_the_untrimmed_message(locate):
    messages = [{"role": "user", "content": "\n  the cat  "}]
    found, _ = locate(messages, TRIMMING)
    assert spelled(found, 0) == set(range(3, 10))


def test_template_that_keeps_blanks_locates_them(locate):
    messages = [{"role": "user", "content": "\n  the cat  "}]
    found, _ = locate(messages, PLAIN)
    assert fully_located(found, 0, messages[0]["content"])


def test_inserted_system_prompt_is_template(locate):
    messages = [{"role": "user", "content": "You are helpful."}]
    found, prompt = locate(messages, DEFAULT_SYSTEM)
    first = next(i for i, located in enumerate(found.tokens) if located is not None)
    assert prompt.starts[first] == prompt.text.rindex("You are helpful.")
    assert fully_located(found, 0, "You are helpful.")


def test_equal_messages_are_told_apart(locate):
    messages = [{"role": "user", "content": "the cat"}] * 3
    found, _ = locate(messages)
    assert all(fully_located(found, i, "the cat") for i in range(3))
    order = [located.message for located in found.tokens if located is not None]
    assert order == sorted(order)


@pytest.mark.parametrize("source", [UPPER, ESCAPES, TWICE])
def test_unfriendly_template_gives_no_wrong_location(locate, source):
    locate(CHAT, source)  # ``locate`` checks what it finds


def test_text_rendered_twice_has_no_place(locate):
    found, _ = locate([{"role": "user", "content": "the cat"}], TWICE)
    assert spelled(found, 0) == set()


def test_marks_lost_in_the_template_fall_back_to_search(locate):
    messages = [
        {"role": "user", "content": "The secret code is 4821."},
        {"role": "user", "content": "Which code?"},
    ]
    found, _ = locate(messages, ESCAPES)
    assert all(fully_located(found, i, m["content"]) for i, m in enumerate(messages))


def test_dropped_message_has_no_location(locate):
    found, _ = locate(CHAT, DROPS_FIRST)
    assert spelled(found, 0) == set()
    assert fully_located(found, 1, CHAT[1]["content"])


def test_content_parts(locate):
    parts = [
        {"type": "text", "text": "the cat"},
        {"type": "image_url", "image_url": {"url": "data:"}},
        {"type": "text", "text": "the cat sat"},
    ]
    messages = [{"role": "user", "content": parts}]
    found, _ = locate(messages, PARTS)
    assert fully_located(found, 0, "the cat", 0)
    assert fully_located(found, 0, "the cat sat", 2)
    located = next(located for located in found.tokens if located is not None)
    assert located.to_dict() == {"message": 0, "part": 0, "start": 0, "end": located.end}


def test_tool_arguments_in_a_form_that_spoils_marks_cost_no_other_location(locate):
    call = {"type": "function", "function": {"name": "sat", "arguments": {"code": "the cat"}}}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "the mat"},
    ]
    found, _ = locate(messages, TOOLS.replace(" | tojson", " | string"))
    assert fully_located(found, 1, "the mat")
    assert found.of_role("assistant") == []


ARGUMENTS = ['{"code": "the cat", "n": 17}', {"code": "the cat", "n": 17}]


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_tool_calls_belong_to_their_message_without_offsets(locate, arguments):
    call = {"type": "function", "function": {"name": "sat", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "The secret code"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "the mat"},
    ]
    found, prompt = locate(messages, TOOLS)
    called = "".join(prompt.token(i) for i in found.of_role("assistant"))
    assert "sat" in called
    assert '"code": "the cat' in called
    assert fully_located(found, 2, "the mat")
    tokens = [found.tokens[i] for i in found.of_role("assistant")]
    assert all(token.to_dict() == {} for token in tokens)


def test_token_put_in_front_by_the_tokenizer(locate):
    found, _ = locate(CHAT, before="<|endoftext|>")
    assert all(fully_located(found, i, m["content"]) for i, m in enumerate(CHAT))


def test_other_text_in_front_is_not_taken_for_a_token(locate, byte_level):
    # Something else than the rendering: only the search may locate.
    found, _ = locate(CHAT, before="The code is the code. ")
    assert spelled(found, 3) in (set(), set(range(len("The code"))))


def test_truncated_prompt_is_located_from_its_end(locate):
    found, prompt = locate(CHAT, keep=20)
    assert fully_located(found, 3, CHAT[3]["content"])
    assert spelled(found, 0) == set()
    assert len(prompt) == 20


@pytest.mark.parametrize("render", [None, lambda messages: None, lambda messages: "other"])
def test_without_rendering_unambiguous_messages_are_located(locate, render):
    messages = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "Which code?"},
    ]
    found, _ = locate(messages, render=render)
    assert all(fully_located(found, i, m["content"]) for i, m in enumerate(messages))


def test_without_rendering_ambiguous_messages_are_not(locate):
    messages = [
        {"role": "user", "content": "the cat"},
        {"role": "user", "content": "the cat sat on the cat"},
        {"role": "user", "content": "user"},
        {"role": "user", "content": "a"},
    ]
    found, _ = locate(messages[:2], render=None)
    assert fully_located(found, 1, messages[1]["content"])
    assert fully_located(found, 0, "the cat")  # the order leaves it one place
    found, _ = locate(
        messages[:1], DEFAULT_SYSTEM.replace("You are helpful.", "the cat"), render=None
    )
    assert spelled(found, 0) == set()
    found, _ = locate(messages[2:3], render=None)
    assert spelled(found, 0) == set()


def test_message_that_holds_marks_is_still_right(locate):
    locate([{"role": "user", "content": "x\U000f0000the cat\U000f0001"}])


WORDS = st.sampled_from(["the", "cat", " ", "\n", "😀", "user", "a", "<|im_end|>", "é", ""])
CONTENT = st.lists(WORDS, max_size=6).map("".join)


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(CONTENT, min_size=1, max_size=4),
    st.sampled_from([PLAIN, TRIMMING, DEFAULT_SYSTEM, SYSTEM_LAST, UPPER, TWICE]),
)
def test_rendered_locations_never_name_other_text(locate, contents, source):
    messages = [{"role": "user", "content": content} for content in contents]
    found, _ = locate(messages, source)
    if source == PLAIN:
        for i, content in enumerate(contents):
            assert spelled(found, i) == (set(range(len(content))) if content.strip() else set())


@pytest.mark.parametrize("text", ["the cat", " the cat ", "\nThe 😀 code"])
@pytest.mark.parametrize("front", ["", "<|endoftext|>"])
def test_plain_prompt(byte_level, text, front):
    ids = byte_level.encode(front + text, add_special_tokens=False)
    prompt = token_offsets(byte_level, ids)
    found = locate_prompt(Completion(ids, [0], "", prompt_text=text), prompt)
    assert fully_located(found, 0, text)
    assert found.roles == ["prompt"]
    assert found.tokens[0] is None if front else found.tokens[0].start == 0


@pytest.mark.parametrize("text", ["the cat", " the cat", "  the cat sat"])
def test_plain_prompt_of_a_tokenizer_that_changes_the_leading_blank(metaspace, text):
    ids = [metaspace.bos_token_id, *metaspace.encode(text, add_special_tokens=False)]
    prompt = token_offsets(metaspace, ids)
    found = locate_prompt(Completion(ids, [0], "", prompt_text=text), prompt)
    for i, located in enumerate(found.tokens):
        if located is not None:
            assert text[located.start : located.end] in prompt.token(i)
    assert spelled(found, 0) >= {c for c, char in enumerate(text) if char != " "}


def test_token_ids_alone_have_no_locations(byte_level):
    ids = byte_level.encode("the cat", add_special_tokens=False)
    found = locate_prompt(Completion(ids, [0], ""), token_offsets(byte_level, ids))
    assert found.tokens == [None] * len(ids)
    assert found.roles == []
