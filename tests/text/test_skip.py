from __future__ import annotations

import pytest

from vllm_flashtrace.text.plan import skip_mask

TOKENS = [" cat", ",", " .", "\n", "", "...", "a,", "Cat"]


def test_none_skips_nothing():
    assert skip_mask(TOKENS, "none") is None


@pytest.mark.parametrize(
    ("rule", "skipped"),
    [
        ("punctuation", [",", " .", "\n", ""]),
        (["cat"], [" cat"]),
        ([" cat ", "..."], [" cat", "..."]),
        ([" "], ["\n", ""]),
        ([], []),
    ],
)
def test_rule(rule, skipped):
    mask = skip_mask(TOKENS, rule)
    assert [t for t, skip in zip(TOKENS, mask.tolist(), strict=True) if skip] == skipped
