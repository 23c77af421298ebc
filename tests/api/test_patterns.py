from __future__ import annotations

import contextlib
import time

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_flashtrace.api.patterns import PatternError, check_pattern, last_match

ACCEPTED = [
    r"\d+(\.\d+)?",
    r"(foo|bar)+",
    r"answer: (.*)$",
    r"[A-Z]\w+ \d{4}",
    r".*",
    r"a|b|",
    r"(?i)answer\s*:\s*\w+",
    r"(\w+\s)+",
    r"(\w+)\s+\1",
    r"\{.*\}",
    r"\{[a-z]+\}",
    r"[{e<=1}]",
    r"(?<=x)\d+",
    r"\d{1,3}(,\d{3})*",
    r"([a-z]+,)*[a-z]+",
    r"(?s)<a>.*?</a>",
    r"\w{1,100}",
    r"(?:ab){10}",
    r"(?P<year>\d{4})-\d\d",
    r"[ab|]+",
    r"a\|a",
    "a" * 600,
    "a?" * 200 + "b",
    r"(?x) \d{4} - \d{2}  # ( year and [ month",
    r"(?:[0-9a-f]{1,4}:){7}[0-9a-f]{1,4}",
    r"(?s)answer.{200,}",
    "((a{1,1000}){1,1000}){1,1000}",
]

EXPONENTIAL = [
    r"(a+)+$",
    r"(a*)*b",
    r"(a*?)*?b",
    r"(a|a)*b",
    r"(a|aa)+$",
    r"(.*)*",
    r"(.*){10}",
    r"(.*a){5}",
    r"(.*a){20}",
    r"(\w|\d)+",
    r"(a|[ab])*c",
    r"(?i)(a|A)+$",
    r"(a|b|ab)*c",
    r"((a+)b?)+$",
    r"(x+x+)+y",
    r"(?=(a+)+$)x",
    r"(?<!(a+)+b)x",
    r"^(([a-z])+.)+[A-Z]([a-z])+$",
    r"(a{1,30}){1,30}$",
    r"((a)|a)+$",
    r"(\w+\s?)+$",
    r"(?:(b)?(?(1)a|a+))*c",
]

REFUSED = [
    ("", "empty string"),
    ("^$", "empty string"),
    (r"\b", "empty string"),
    ("(?=abc)", "empty string"),
    ("(", "not valid"),
    (")", "not valid"),
    ("[", "not valid"),
    ("a**", "not valid"),
    (r"\p{L}", "not valid"),
    ("(?R)", "not valid"),
    (r"\1", "not valid"),
    ("a{e<=2}", "repeat count"),
    ("(?:foo){i}", "repeat count"),
    ("[[:alpha:]]+", "[:alpha:]"),
    ("(?:a){1000000}", "too many times"),
    ("((a{1000}){1000}){1000}", "too many times"),
    ("(?:" * 60 + "a" + "){2,3}" * 60, "too many times"),
    ("(?:" * 80 + "a" + "b)+" * 80, "too many times"),
    ("(?:" + "a|" * 200 + "b){5000}", "too many times"),
]


@pytest.mark.parametrize("pattern", ACCEPTED)
def test_useful_pattern_is_accepted(pattern):
    assert check_pattern(pattern) is None


@pytest.mark.parametrize("text", ["a" * 26 + "c!", "a" * 65_536 + "!", "ab1 c," * 10_000 + "!"])
@pytest.mark.parametrize("pattern", EXPONENTIAL)
def test_exponential_pattern_is_accepted_and_ends_within_its_time(pattern, text):
    check_pattern(pattern)
    begun = time.process_time()
    with contextlib.suppress(TimeoutError):
        last_match(pattern, text, seconds=0.05)
    assert time.process_time() - begun < 2.0


@pytest.mark.parametrize(("pattern", "reason"), REFUSED)
def test_refusal_says_why(pattern, reason):
    with pytest.raises(PatternError) as refusal:
        check_pattern(pattern)
    assert reason in str(refusal.value)


@pytest.mark.parametrize(
    "pattern",
    [
        "a?" * 256,
        r"\w{1,100}" * 5,
        "(" * 256 + ")" * 256,
        "(a|" * 120 + "b" + ")" * 120,
        "(?:" * 120 + "a" + ")?" * 120,
        "(?i)" + "[!-\uffff]" * 100,
        "(?:a|bc|d){3500}",
        "|".join(f"w{i}" for i in range(140)),
        *(pattern for pattern, _ in REFUSED),
    ],
)
def test_check_of_a_large_pattern_is_quick(pattern):
    begun = time.process_time()
    with contextlib.suppress(PatternError):
        check_pattern(pattern)
    assert time.process_time() - begun < 0.5


_atoms = st.sampled_from(["a", "b", ".", "[ab]", r"\w", "(?=a)", ""])
_patterns = st.recursive(
    _atoms,
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,}", "{0,4}"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(_patterns)
def test_search_for_any_pattern_ends_within_its_time(body):
    # "c" ends the text but never follows a match, so every path is tried before giving up.
    pattern = f"(?:{body})!"
    check_pattern(pattern)
    for text in ("a" * 26 + "c!", "ab" * 13 + "c!"):
        begun = time.process_time()
        with contextlib.suppress(TimeoutError):
            last_match(f"^{pattern}", text, seconds=0.02)
        assert time.process_time() - begun < 1.0


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_accepted_or_refused(pattern):
    try:
        check_pattern(pattern)
    except PatternError as refusal:
        assert str(refusal)
    else:
        regex.compile(pattern)


@pytest.mark.parametrize(
    ("pattern", "text", "span"),
    [
        (r"\d+", "4 and 17 and 256.", (13, 16)),
        (r"answer: (.*)$", "the answer: 42", (12, 14)),
        (r"(\w)=(\w)", "a=b c=d", (4, 7)),  # More than one group: the whole match.
        (r"a*", "xaay", (1, 3)),  # Empty matches behind it do not count.
        (r"x(y)?", "xy x", (1, 2)),  # The group takes no part in the last match.
        (r"z", "xy", None),
        (r"a*", "xyz", None),
    ],
)
def test_last_match(pattern, text, span):
    assert last_match(pattern, text, seconds=5.0) == span


def test_last_match_ends_within_its_time():
    begun = time.perf_counter()
    with pytest.raises(TimeoutError):
        last_match(r"(a|aa)+$", "a" * 60 + "!", seconds=0.1)
    # Without a bound it would take years.
    assert time.perf_counter() - begun < 60


def test_many_quick_matches_end_within_the_time():
    with pytest.raises(TimeoutError):
        last_match("a", "a" * 3_000_000, seconds=0.01)
