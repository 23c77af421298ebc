"""What the client sees of the generated tokens."""

from __future__ import annotations

import pytest

from vllm_flashtrace.base.records import Completion
from vllm_flashtrace.text.generated import decode_generated
from vllm_flashtrace.text.offsets import TokenText


@pytest.fixture
def decode(byte_level):
    def run(text, visible, prompt="Q: "):
        ids = byte_level.encode(text, add_special_tokens=False)
        return decode_generated(byte_level, Completion(byte_level.encode(prompt), ids, visible))

    return run


@pytest.mark.parametrize(
    ("text", "visible", "shown"),
    [
        ("The cat<|im_end|>", "The cat", "The cat"),
        ("The cat<|im_end|>", "The cat<|im_end|>", "The cat<|im_end|>"),
        ("The cat STOP", "The cat", "The cat"),
        ("The<|im_start|> cat<|im_end|>", "The cat", "The cat"),
        ("The<|im_start|> cat<|im_end|>", "The<|im_start|> cat", "The<|im_start|> cat"),
        # Not what the tokens decode to: all but the special tokens counts as seen.
        ("The cat<|im_end|>", "the cat", "The cat"),
        ("😀<|im_end|>", "😀", "😀"),
    ],
)
def test_visible_text(decode, text, visible, shown):
    generated = decode(text, visible)
    assert generated.full.text == text
    assert generated.visible.text == shown
    assert len(generated.full) == len(generated.visible) == len(generated)
    assert "".join(generated.visible.pieces()) == shown


def test_both_views_count_the_same_tokens(decode):
    generated = decode("The<|im_start|> cat<|im_end|>", "The cat")
    for i in range(len(generated)):
        hidden = generated.visible.token(i) == ""
        assert hidden == (i in generated.special)
        assert hidden or generated.visible.token(i) == generated.full.token(i)


@pytest.mark.parametrize(
    ("text", "visible", "kept"),
    [
        ("The cat<|im_end|>", "The cat", "The cat"),
        ("The<|im_start|> cat<|im_end|><|im_end|>", "The cat", "The<|im_start|> cat"),
        ("The cat<|im_end|>", "The cat<|im_end|>", "The cat<|im_end|>"),
        ("The cat sat", "The cat", "The cat"),
        ("STOP<|im_end|>", "", "STOP"),
        ("<|im_end|>", "", ""),
    ],
)
def test_shown_length_leaves_out_the_end(decode, text, visible, kept):
    generated = decode(text, visible)
    assert "".join(generated.full.tokens()[: generated.shown_length]) == kept


def test_text_of_a_character_in_pieces_goes_to_the_first(byte_level, decode):
    generated = decode("x😀y", "x😀y")
    assert generated.full.pieces() == ["x", "😀", "", "", "", "y"]


def test_pieces_of_overlapping_ranges_join_to_the_text():
    text = TokenText("abcd", [0, 0, 1, 3, 3], [2, 2, 3, 3, 4])
    assert text.pieces() == ["ab", "", "c", "", "d"]


def test_leading_space_of_the_metaspace_tokenizer(metaspace):
    prompt = metaspace.encode("The code is", add_special_tokens=False)
    whole = metaspace.encode("The code is 4821", add_special_tokens=False)
    completion = Completion(prompt, whole[len(prompt) :], " 4821")
    assert decode_generated(metaspace, completion).visible.text == " 4821"


def test_context_that_begins_inside_a_character_costs_no_space(metaspace):
    smile = [metaspace.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "😀".encode()]
    the = metaspace.encode("The the", add_special_tokens=False)
    the = the[len(metaspace.encode("The", add_special_tokens=False)) :]
    full = decode_generated(metaspace, Completion(smile * 3, the, " the")).full
    assert full.text == " the"
