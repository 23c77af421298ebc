from __future__ import annotations

import pytest

from vllm_flashtrace.text.plan import skip_mask

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
