from __future__ import annotations

import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_flashtrace.text.offsets import (
    TokenText,
    special_token_ids,
    token_offsets,
    without_ids,
)

TEXTS = st.text(
    alphabet=st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from(list("ab \n.é😀👩‍👩‍👧e\u0301\u200d中ﬁ\ufe0f")),
    ),
    max_size=60,
)
QUICK = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def check_ranges(view: TokenText, ids) -> None:
    assert len(view) == len(ids) == len(view.ends)
    assert view.starts == sorted(view.starts)
    assert view.ends == sorted(view.ends)
    assert all(0 <= s <= e <= len(view.text) for s, e in zip(view.starts, view.ends, strict=True))
    covered = {c for s, e in zip(view.starts, view.ends, strict=True) for c in range(s, e)}
    assert covered == set(range(len(view.text)))


@QUICK
@given(TEXTS)
def test_byte_level_text_is_reproduced_and_covered(byte_level, text):
    ids = encode(byte_level, text)
    view = token_offsets(byte_level, ids)
    assert view.text == text
    check_ranges(view, ids)


@QUICK
@given(TEXTS)
def test_metaspace_text_is_the_tokenizers_own(metaspace, text):
    ids = encode(metaspace, text)
    view = token_offsets(metaspace, ids)
    assert view.text == metaspace._tokenizer.decode(ids, skip_special_tokens=False)
    check_ranges(view, ids)


@QUICK
@given(st.lists(st.integers(0, 500), max_size=60))
def test_any_token_sequence_has_ranges(byte_level, ids):
    ids = [i % len(byte_level) for i in ids]
    view = token_offsets(byte_level, ids)
    check_ranges(view, ids)
    own = byte_level._tokenizer.decode(ids, skip_special_tokens=False)
    # Runs of invalid bytes may be counted differently, but what is valid is the same.
    assert view.text.replace("\ufffd", "") == own.replace("\ufffd", "")


@QUICK
@given(TEXTS, TEXTS)
def test_generated_part_continues_the_prompt(metaspace, prompt, generated):
    ids = encode(metaspace, f"x{prompt} {generated}")
    cut = len(ids) // 2
    whole = token_offsets(metaspace, ids)
    parts = [
        token_offsets(metaspace, ids[:cut]),
        token_offsets(metaspace, ids[cut:], start_after=ids[:cut]),
    ]
    if "\ufffd" not in parts[0].text and "\ufffd" not in parts[1].text:
        assert parts[0].text + parts[1].text == whole.text


def test_pieces_of_a_character_share_its_range(byte_level):
    ids = encode(byte_level, "x😀y")
    view = token_offsets(byte_level, ids)
    assert len(ids) == 6
    assert [view.token(i) for i in range(6)] == ["x", "😀", "😀", "😀", "😀", "y"]
    assert view.overlapping(1, 2) == [1, 2, 3, 4]


def test_leading_space_depends_on_what_comes_before(metaspace):
    ids = encode(metaspace, "the code is 4821")
    assert token_offsets(metaspace, ids[1:]).text == "code is 4821"
    assert token_offsets(metaspace, ids[1:], start_after=ids[:1]).text == " code is 4821"


def test_special_tokens_keep_their_text(byte_level):
    ids = encode(byte_level, "<|im_start|>user\nthe cat<|im_end|>")
    view = token_offsets(byte_level, ids)
    assert view.token(0) == "<|im_start|>"
    assert view.tokens()[-1] == "<|im_end|>"


def test_invalid_bytes_are_linear_and_do_not_hide_what_follows(byte_level):
    bad = encode(byte_level, "😀")[:1]
    tail = encode(byte_level, "😀 the cat")
    view = token_offsets(byte_level, bad * 20_000 + tail)
    assert view.text.endswith("😀 the cat")
    assert set(view.text.removesuffix("😀 the cat")) == {"\ufffd"}
    begun = time.process_time()
    token_offsets(byte_level, bad * 20_000)
    # A quadratic decoder takes about a minute.
    assert time.process_time() - begun < 10


def test_incomplete_character_at_the_end_is_shown(byte_level):
    ids = encode(byte_level, "a😀")[:-1]
    view = token_offsets(byte_level, ids)
    assert view.text.startswith("a\ufffd")
    check_ranges(view, ids)


def test_tokenizer_without_a_fast_backend(byte_level):
    class Slow:
        all_special_ids = (1, 2)

        def decode(self, ids, skip_special_tokens):
            assert not skip_special_tokens
            return byte_level._tokenizer.decode(ids, skip_special_tokens=False)

    ids = encode(byte_level, "the 😀 cat<|im_end|>")
    assert token_offsets(Slow(), ids) == token_offsets(byte_level, ids)
    assert special_token_ids(Slow()) == {1, 2}


def test_special_ids_are_those_left_out_of_text(byte_level):
    assert special_token_ids(byte_level) == set(
        byte_level.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    )
    assert without_ids([5, 1, 6, 2, 5], {1, 2}) == [5, 6, 5]


@pytest.fixture
def view():
    #      0    1     2      3     4 (empty)  5
    # text "ab" "</t" "\n\n" "cd"  ""         ">\n"
    return TokenText("ab</t\n\ncd>\n", [0, 2, 5, 7, 9, 9], [2, 5, 7, 9, 9, 11])


@pytest.mark.parametrize(
    ("span", "tokens"),
    [
        ((0, 2), [0]),
        ((1, 3), [0, 1]),
        ((0, 11), [0, 1, 2, 3, 5]),
        ((9, 9), []),
        ((5, 2), []),
        ((10, 50), [5]),
        ((50, 60), []),
    ],
)
def test_overlapping(view, span, tokens):
    assert view.overlapping(*span) == tokens


@pytest.mark.parametrize(
    ("span", "tokens"),
    [
        ((0, 2), [0]),
        ((1, 5), [0, 1]),  # "b" counts
        ((6, 9), [3]),  # half of a blank token does not
        ((5, 9), [2, 3]),  # a whole blank token does
        ((10, 11), []),  # the line break behind ">" belongs to ">"
        ((9, 10), [5]),
    ],
)
def test_within_leaves_blank_overhangs(view, span, tokens):
    assert view.within(*span) == tokens


def test_cut_empties_what_is_behind(view):
    cut = view.cut(6)
    assert cut.text == "ab</t\n"
    assert cut.tokens() == ["ab", "</t", "\n", "", "", ""]
