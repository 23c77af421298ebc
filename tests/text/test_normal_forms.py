"""Text that a tokenizer normalises finds its place all the same."""

from __future__ import annotations

import math
import time
import unicodedata
from functools import cache

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.text.families import FAMILIES
from tests.text.jinja_templates import template
from vllm_flashtrace.api.request import RequestLimits, parse_flashtrace_field
from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.base.records import Completion
from vllm_flashtrace.text.normal_forms import find_last, made_from
from vllm_flashtrace.text.offsets import token_offsets
from vllm_flashtrace.text.plan import plan_trace, skip_mask
from vllm_flashtrace.text.prompt_map import locate_prompt
from vllm_flashtrace.text.result import segments

TURNS = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}<|start|>"
)
LINES = "{% for m in messages %}### {{ m.role }}: {{ m.content }}\n{% endfor %}### assistant:"
DECOMPOSED = "Le cafe\u0301 e\u0301tait de\u0301ja\u0300 ferme\u0301"
WORDS = st.sampled_from(
    [
        *("the", "Cat", " ", "  ", "\n", "\t", "4821", ".", "café", "cafe\u0301", "e\u0301"),
        *(
            "\u0301",
            "각",
            "\u1100\u1161\u11a8",
            "\u1112\u1161\u11ab",
            "ﬁ",
            "\uff21\uff22\uff23",
            "①",
            "½",
        ),
        *(
            "👩‍👩‍👧",
            "❤\ufe0f",
            "🇩🇪",
            "\u200d",
            "\u200b",
            "\xa0",
            "\u3000",
            "İ",
            "ǆ",
            "ß",
            "Å",
            "\u212b",
        ),
        *(
            "क\u094dषि",
            "ไทย",
            "漢字",
            "㍿",
            "``",
            "\ufeff",
            "\x07",
            "a\u0323\u0307",
            "▁",
            "<|end|>",
        ),
    ]
)
CONTENT = st.lists(st.one_of(WORDS, st.characters(exclude_categories=["Cs"])), max_size=10)
CHATS = st.lists(CONTENT.map("".join), min_size=1, max_size=4)
QUICK = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@cache
def family(name: str):
    return FAMILIES[name]()


@pytest.fixture(params=FAMILIES, scope="module")
def tokenizer(request):
    return family(request.param)


def messages_of(contents):
    return [{"role": "user", "content": content} for content in contents]


def locate(tokenizer, contents, source=TURNS, *, special=False, render="same", last=None):
    """Locates a chat's tokens; gives the map, the rendering and the token ids."""
    own = template(source)
    text = own(messages_of(contents))
    ids = tokenizer.encode(text, add_special_tokens=special)[-(last or 10**9) :]
    prompt = token_offsets(tokenizer, ids)
    completion = Completion(ids, [0], "", messages=messages_of(contents))
    return locate_prompt(completion, prompt, own if render == "same" else render, tokenizer), text


def spans_of(found, message):
    return [
        (located.start, located.end)
        for located in found.tokens
        if located is not None and located.message == message
    ]


def covered(spans):
    return {c for start, end in spans for c in range(start, end)}


def check_cover(found, contents):
    assert found.unlocated == frozenset()
    for i, content in enumerate(contents):
        spans = spans_of(found, i)
        assert all(0 <= start < end <= len(content) for start, end in spans)
        # A message of nothing but dropped characters has no token.
        assert not spans or covered(spans) == set(range(len(content)))


def check_against_own_offsets(tokenizer, found, contents, text, special):
    """The tokenizer's offsets, trimmed as they are, lie within the reported places."""
    (encoding,) = tokenizer._tokenizer.encode_batch([text], add_special_tokens=special)
    begin, places = 0, []
    for content in contents:
        # The role and what separates it from the content: a line break, or a colon and a blank.
        begin = text.index("user", begin) + len("user")
        begin += 1 if text[begin] == "\n" else 2
        assert text.startswith(content, begin)
        places.append((begin, begin + len(content)))
        begin += len(content)
    assert len(encoding.offsets) == len(found.tokens)
    for (start, end), located in zip(encoding.offsets, found.tokens, strict=True):
        inside = [
            (i, max(start, first) - first, min(end, last) - first)
            for i, (first, last) in enumerate(places)
            if max(start, first) < min(end, last)
        ]
        if located is None:
            # An added token may have swallowed blanks of a message.
            assert all(not contents[i][a:b].strip() or text[start] == "<" for i, a, b in inside)
        elif inside and text[start:end].strip():
            assert located.message == inside[0][0]
            assert (
                located.start <= inside[0][1] or not contents[inside[0][0]][: located.start].strip()
            )
            # Decoders write U+FFFD for a piece of a character, too: what follows one may join it.
            joined = contents[located.message][located.start : located.end].endswith("\ufffd")
            assert inside[0][2] <= located.end or text[start] == "<" or joined


@QUICK
@example(["\ufffd\x80"], TURNS, False)
@given(CHATS, st.sampled_from([TURNS, LINES]), st.booleans())
def test_every_character_of_every_message_has_a_token(tokenizer, contents, source, special):
    found, text = locate(tokenizer, contents, source, special=special)
    check_cover(found, contents)
    check_against_own_offsets(tokenizer, found, contents, text, special)
    scores = [1 / (i + 2) for i in range(len(found.tokens))]
    entries = segments(found, messages_of(contents), scores)
    assert [entry["role"] for entry in entries] == ["user"] * len(contents) + ["template"]
    assert math.isclose(math.fsum(e["score"] for e in entries), math.fsum(scores))


@pytest.mark.parametrize("contents", [["Hi there", DECOMPOSED, "Which code?"]])
def test_one_decomposed_character_costs_nothing(tokenizer, contents):
    found, _ = locate(tokenizer, contents)
    check_cover(found, contents)
    assert all(spans_of(found, i) for i in range(3))
    plain, _ = locate(tokenizer, [unicodedata.normalize("NFC", content) for content in contents])
    assert spans_of(found, 0) == spans_of(plain, 0)
    assert spans_of(found, 2) == spans_of(plain, 2)


def test_plan_of_a_chat_locates_all_of_it(tokenizer):
    own = template(TURNS)
    messages = messages_of(["Hi there", DECOMPOSED, "Which code?"])
    prompt = tokenizer.encode(own(messages), add_special_tokens=False)
    answer = tokenizer.encode("the cat", add_special_tokens=False)
    completion = Completion(prompt, answer, "the cat", messages=messages)
    request = parse_flashtrace_field(True, RequestLimits())
    plan = plan_trace(request, completion, tokenizer, render=own)
    check_cover(plan.prompt_map, [m["content"] for m in messages])
    assert plan.prompt.pieces() == token_offsets(tokenizer, prompt).pieces()


def test_composed_tokens_report_all_characters_that_they_stand_for():
    found, _ = locate(family("qwen"), ["x e\u0301 \u1112\u1161\u11ab y"])
    assert {(1, 4), (2, 4)}.intersection(spans_of(found, 0))
    assert any(end - start >= 3 and end == 8 for start, end in spans_of(found, 0))


def test_tokens_that_swallow_blanks_take_none_of_a_message():
    source = "{% for m in messages %}<|start|>{{ m.content }}<|end|>\n{% endfor %}"
    found, text = locate(family("phi3"), ["  Hi there", "\n"], source)
    assert text == "<|start|>  Hi there<|end|>\n<|start|>\n<|end|>\n"
    assert covered(spans_of(found, 0)) == set(range(10))
    assert found.tokens[0] is None
    assert spans_of(found, 1) == []  # <|start|> swallowed all of it
    assert found.unlocated == frozenset()


@pytest.mark.parametrize("last", [5, 12, 20])
def test_truncated_prompt_is_located_from_its_end(tokenizer, last):
    contents = [DECOMPOSED * 3, f"Which {DECOMPOSED}?"]
    whole, _ = locate(tokenizer, contents)
    found, _ = locate(tokenizer, contents, last=last)
    assert found.unlocated == frozenset()
    assert found.tokens[1:] == whole.tokens[-last:][1:]


@pytest.mark.parametrize(
    "render", [None, lambda messages: None, lambda messages: "other"], ids=["none", "no", "other"]
)
def test_search_knows_the_form_that_the_tokenizer_writes(render):
    for name in ("qwen", "t5"):
        contents = ["Which code?", DECOMPOSED, "the ﬁne Cat"]
        found, _ = locate(family(name), contents, LINES, render=render)
        check_cover(found, contents)
        assert all(spans_of(found, i) for i in range(3))


def test_template_that_rejects_marks_leaves_a_search_in_the_clients_own_text(tokenizer):
    own = template(TURNS)

    def render(messages):
        if any(ord(max(m["content"])) >= 0xF0000 for m in messages):
            raise ValueError("private characters")
        return own(messages)

    contents = ["Which code?", DECOMPOSED, "the ﬁne Cat"]
    found, _ = locate(tokenizer, contents, render=render)
    check_cover(found, contents)
    assert all(spans_of(found, i) for i in range(3))


def test_icons_of_a_private_plane_are_no_marks(tokenizer):
    contents = ["the \U000f0001 cat", "the \U000f0001 cat", "the cat"]
    found, _ = locate(tokenizer, contents)
    check_cover(found, contents)
    assert all(spans_of(found, i) for i in range(3))


@QUICK
@given(CONTENT.map("".join), st.booleans())
def test_plain_prompt_is_covered(tokenizer, text, special):
    ids = tokenizer.encode(text, add_special_tokens=special)
    prompt = token_offsets(tokenizer, ids)
    found = locate_prompt(Completion(ids, [0], "", prompt_text=text), prompt, None, tokenizer)
    check_cover(found, [text])


ANSWERS = [DECOMPOSED, "The ﬁne Cat\tsaid: \u1112\u1161\u11ab각 4821.", "Ho\u0302tel \uff21 x²  3"]


def plan_for(tokenizer, answer, *, stored, **options):
    """Plans a stored answer, or one that was generated: its text is what the tokens decode to."""
    prompt = tokenizer.encode("Which code?", add_special_tokens=False)
    ids = tokenizer.encode(answer, add_special_tokens=False)
    text = answer if stored else token_offsets(tokenizer, ids, start_after=prompt).text
    request = parse_flashtrace_field(options, RequestLimits())
    return plan_trace(request, Completion(prompt, ids, text), tokenizer)


def target_tokens(plan):
    return [i for start, end in plan.target_spans for i in range(start, end)]


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("stored", [True, False])
def test_target_is_found_in_any_equivalent_form(tokenizer, answer, stored):
    whole = plan_for(tokenizer, answer, stored=stored, target="generated")
    for words in answer.split():
        exact = plan_for(tokenizer, answer, stored=stored, target={"text": words})
        for form in ("NFC", "NFD"):
            other = unicodedata.normalize(form, words)
            plan = plan_for(tokenizer, answer, stored=stored, target={"text": other})
            assert plan.target_spans == exact.target_spans
            assert plan.target_text in plan.generated.visible.text
            if stored:
                assert plan.target_text == words
    assert target_tokens(whole)[-1] == len(whole.generated) - 1


@QUICK
@given(st.lists(st.one_of(WORDS, st.sampled_from("abc é")), min_size=1, max_size=8), st.data())
def test_a_target_covers_its_characters_and_no_other_token(tokenizer, words, data):
    answer = "a" + "".join(words)
    ids = tokenizer.encode(answer, add_special_tokens=False)
    first = data.draw(st.integers(0, len(words) - 1))
    last = data.draw(st.integers(first + 1, len(words)))
    wanted = "".join(words[first:last])
    try:
        plan = plan_for(tokenizer, answer, stored=True, target={"text": wanted})
    except TraceError as error:  # a target of nothing but special tokens or blanks
        assert error.code == "empty_target" or not wanted.strip()
        return
    visible = plan.generated.visible
    assert visible.text == answer
    at = answer.rfind(wanted)
    assert target_tokens(plan) == visible.overlapping(at, at + len(wanted))
    assert {
        c for s, e in zip(visible.starts, visible.ends, strict=True) for c in range(s, e)
    } == set(range(len(answer)))
    assert len(visible) == len(ids)


@pytest.mark.parametrize("stored", [True, False])
def test_target_in_the_clients_case_is_found_in_text_that_the_tokenizer_folds(stored):
    plan = plan_for(
        family("bert"),
        "le Café fermé",
        stored=stored,
        target={"text": "CAFÉ"} if not stored else {"text": "Cafe\u0301"},
    )
    assert plan.target_text == ("Café" if stored else "cafe")


def test_characters_that_the_tokenizer_does_not_know_are_not_found_in_each_other():
    with pytest.raises(TraceError, match="does not occur"):
        plan_for(family("bert"), "the 漢 cat", stored=False, target={"text": "\u2603"})


def test_reasoning_and_skipped_strings_are_compared_in_the_same_form(tokenizer):
    answer = f"{DECOMPOSED} then 4821"
    given = unicodedata.normalize("NFC", "cafe\u0301")
    options = {"target": {"text": "4821"}, "reasoning": {"text": given}}
    assert plan_for(tokenizer, answer, stored=True, **options).recursion is not None
    assert skip_mask(["caf\u00e9", " cafe\u0301", "cafe"], ["cafe\u0301"]).tolist() == [
        True,
        True,
        False,
    ]


def test_bundled_tokenizer(smollm2_folder):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    contents = [DECOMPOSED, "\u1112\u1161\u11ab ﬁ \uff21 👩‍👩‍👧", "  Which code?\n"]
    messages = messages_of(contents)

    def render(messages):
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    ids = tokenizer.encode(render(messages), add_special_tokens=False)
    completion = Completion(ids, [0], "", messages=messages)
    found = locate_prompt(completion, token_offsets(tokenizer, ids), render, tokenizer)
    check_cover(found, contents)
    # Laid over the rendering or decoded: the tokens lie at the same places.
    assert made_from(tokenizer, render(messages), ids) == (token_offsets(tokenizer, ids), 0)


@pytest.mark.parametrize("front", [[], ["<s>"], ["<s>", "<s>"]])
@pytest.mark.parametrize("behind", [[], ["<|end|>"]])
def test_tokens_around_a_text_lie_nowhere_in_it(front, behind):
    tokenizer = family("qwen")
    text = "cafe\u0301 au lait"
    own = tokenizer.encode(text, add_special_tokens=False)
    around = [tokenizer.convert_tokens_to_ids(tokens) for tokens in (front, behind)]
    view, shift = made_from(tokenizer, text, [*around[0], *own, *around[1]])
    assert (view.text, shift) == (text, 0)
    assert view.tokens()[: len(front)] == [""] * len(front)
    assert view.tokens()[len(view) - len(behind) :] == [""] * len(behind)
    assert view.overlapping(0, len(text)) == list(range(len(front), len(front) + len(own)))


def test_other_tokens_are_not_laid_over_a_text():
    tokenizer = family("qwen")
    text = "the cat the cat"
    own = tokenizer.encode(text, add_special_tokens=False)
    the = tokenizer.encode("the", add_special_tokens=False)
    assert made_from(tokenizer, text, own[::-1]) is None
    assert made_from(tokenizer, text, [*the, *own]) is None  # no special token
    assert made_from(tokenizer, text, []) is None
    numbers = tokenizer.encode("4 the 4", add_special_tokens=False)
    assert numbers[0] == numbers[-1]
    assert made_from(tokenizer, "4 the 4", numbers[:1]) is None  # cut off at either end
    assert made_from(tokenizer, "4 the 4", numbers[:2])[0].text.strip() in ("4", "4 the")
    assert made_from(object(), text, own) is None


@pytest.mark.parametrize(
    ("text", "wanted", "place"),
    [
        ("a café café.", "cafe\u0301", (7, 11)),
        ("a cafe\u0301.", "café", (2, 7)),
        ("a cafe\u0301.", "cafe", (2, 6)),  # as it stands
        ("a café.", "cafe", None),
        ("각", "\u1100\u1161\u11a8", (0, 1)),
        ("각", "\u1100\u1161", None),
        ("\u1100\u1161\u11a8x", "각", (0, 3)),
        ("a\u0323\u0307!", "a\u0307\u0323", (0, 3)),
        ("\u212b", "Å", (0, 1)),
        ("the cat", "dog", None),
        ("é", "\u0301", None),
        ("é a\u0307\u0323b", "\u1ea1\u0307", (2, 5)),  # in neither form
        ("\u09c7\u09be x", "\u09cb", (0, 2)),
    ],
)
def test_equivalent_text_is_found(text, wanted, place):
    assert find_last(text, wanted) == place


def test_search_is_linear_in_both_texts():
    begun = time.process_time()
    half = "a" * 30_000
    assert find_last("a" * 500_000, f"{half}b{half}") is None
    assert find_last("a\u0323" * 250_000, f"{half}\u1ea1{half}") is None
    assert time.process_time() - begun < 5  # 9 s with str.rfind
