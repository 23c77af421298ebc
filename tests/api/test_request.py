from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from vllm_flashtrace.api.request import (
    PRESETS,
    FlashTraceRequest,
    RegexTarget,
    RequestLimits,
    TextTarget,
    TokensTarget,
    ToolCallTarget,
    WeightsTarget,
    check_against_limit,
    parse_flashtrace_field,
)
from vllm_flashtrace.base.errors import InvalidRequestError

LIMITS = RequestLimits()
NAN, INF = math.nan, math.inf


def parse(value, limits=LIMITS):
    return parse_flashtrace_field(value, limits)


def refusal(value, limits=LIMITS) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as error:
        parse(value, limits)
    assert error.value.message.startswith(error.value.param)
    assert len(error.value.message) < 600
    assert "pydantic" not in error.value.message
    return error.value


@pytest.mark.parametrize("value", [None, False])
def test_nothing_is_asked_for(value):
    assert parse(value) is None


@pytest.mark.parametrize("value", [True, {}])
def test_defaults(value):
    assert parse(value).model_dump() == {
        "target": "output",
        "targets": None,
        "sources": None,
        "citations": None,
        "guard": None,
        "hops": "auto",
        "reasoning": "auto",
        "recurse_over": "reasoning",
        "rows": "predicting",
        "heads": False,
        "weighting": "equal",
        "skip_tokens": "punctuation",
        "top_k": 20,
        "scope": "content",
        "include": ("sentences",),
        "verify": 0,
        "preset": "sources",
        "mode": "inline",
    }


def test_a_preset_gives_the_defaults_and_nothing_more():
    assert parse({"preset": "sources"}) == parse(True)
    paper = parse({"preset": "paper", "top_k": 3})
    assert (paper.hops, paper.skip_tokens, paper.include, paper.top_k) == (1, "none", (), 3)
    assert (paper.rows, paper.scope) == ("target", "prompt")
    given = {key: getattr(parse(True), key) for key in PRESETS["paper"]}
    own = parse({"preset": "paper", **given})
    assert own == parse(True).model_copy(update={"preset": "paper"})


def test_all_scores_are_those_of_all_tokens():
    assert parse({"top_k": None}).scope == "prompt"
    assert parse({"top_k": None, "scope": "content"}).scope == "content"
    assert parse({"top_k": 100_000}).scope == "content"


@pytest.mark.parametrize("preset", ["sources", "paper"])
def test_what_a_switch_asks_for_wins_over_a_preset_and_loses_to_a_key(preset):
    cited = parse({"preset": preset, "citations": True})
    assert (cited.targets, cited.sources, cited.skip_tokens) == ("claims", "auto", "punctuation")
    assert cited.hops == parse({"preset": preset}).hops
    assert parse({"preset": preset, "citations": True, "skip_tokens": "none"}).skip_tokens == "none"
    assert parse({"preset": preset, "guard": True}).recurse_over == "assistant"


@pytest.mark.parametrize("value", ["best", 1, None, ["sources"], {"sources": 1}])
def test_unknown_presets_are_refused(value):
    error = refusal({"preset": value})
    assert error.param == "flashtrace.preset"
    assert "'sources' or 'paper'" in error.message


@pytest.mark.parametrize("value", [0, 1, 1.0, NAN, "", "true", [], [{}], b"x"])
def test_other_values_are_refused(value):
    error = refusal(value)
    assert error.param == "flashtrace"
    assert (json.dumps(value) if value != b"x" else "b'x'") in error.message


@pytest.mark.parametrize(
    ("field", "value", "parsed"),
    [
        ("target", "output", "output"),
        ("target", "generated", "generated"),
        ("target", {"text": " 42"}, TextTarget(text=" 42")),
        ("target", {"regex": r"\d+"}, RegexTarget(regex=r"\d+")),
        ("target", {"tokens": [[0, 2], [5, 6]]}, TokensTarget(tokens=((0, 2), (5, 6)))),
        ("target", {"weights": {"0": 1, "7": 0.5}}, WeightsTarget(weights={0: 1.0, 7: 0.5})),
        ("target", {"weights": {3: 2, "4": 0}}, WeightsTarget(weights={3: 2.0, 4: 0.0})),
        ("target", {"tool_call": 0}, ToolCallTarget(tool_call=0)),
        ("target", {"argument": "to", "tool_call": 3}, ToolCallTarget(tool_call=3, argument="to")),
        ("hops", 0, 0),
        ("hops", 8, 8),
        ("hops", "auto", "auto"),
        ("reasoning", "none", "none"),
        ("reasoning", {"tokens": [[1, 4]]}, TokensTarget(tokens=((1, 4),))),
        ("reasoning", {"text": "so"}, TextTarget(text="so")),
        ("recurse_over", "generated", "generated"),
        ("recurse_over", "assistant", "assistant"),
        ("rows", "predicting", "predicting"),
        ("weighting", "surprise", "surprise"),
        ("skip_tokens", "punctuation", "punctuation"),
        ("skip_tokens", [], ()),
        ("skip_tokens", [",", " the"], (",", " the")),
        ("top_k", 1, 1),
        ("top_k", None, None),
        ("scope", "content", "content"),
        ("include", ["hops", "layers", "hops"], ("hops", "layers")),
        ("include", ("generated", "segments", "tokens"), ("generated", "segments", "tokens")),
        ("mode", "inline", "inline"),
        ("mode", "deferred", "deferred"),
    ],
)
def test_accepted(field, value, parsed):
    request = parse({field: value})
    assert getattr(request, field) == parsed
    assert type(getattr(request, field)) is type(parsed)
    assert FlashTraceRequest(**{field: value}) == request


# Field, refused value, where the message points, what it shows.
REFUSED = [
    ("hopz", 3, "hopz", "3"),
    ("hops", -1, "hops", "-1"),
    ("hops", 9, "hops", "9"),
    ("hops", 1.0, "hops", "1.0"),
    ("hops", "1", "hops", '"1"'),
    ("hops", "AUTO", "hops", '"AUTO"'),
    ("hops", True, "hops", "true"),
    ("hops", None, "hops", "null"),
    ("hops", NAN, "hops", "NaN"),
    ("hops", [1], "hops", "[1]"),
    ("hops", 10**5000, "hops", "16610 bits"),
    ("target", None, "target", "null"),
    ("target", 7, "target", "7"),
    ("target", "input", "target", '"input"'),
    ("target", {}, "target", "{}"),
    ("target", [[0, 1]], "target", "[[0, 1]]"),
    ("target", {"txt": "a"}, "target.txt", '"a"'),
    ("target", {"text": "a", "colour": 1}, "target.colour", "1"),
    ("target", {"text": "a", "regex": "b"}, "target", '{"regex": "b", "text": "a"}'),
    ("target", {"text": ""}, "target.text", '""'),
    ("target", {"text": 5}, "target.text", "5"),
    ("target", {"text": None}, "target.text", "null"),
    ("target", {"text": "x" * 65_537}, "target.text", '"xxx'),
    ("target", {"regex": ""}, "target.regex", '""'),
    ("target", {"regex": 1}, "target.regex", "1"),
    ("target", {"regex": "("}, "target.regex", '"("'),
    ("target", {"regex": "^$"}, "target.regex", 'empty string, got "^$"'),
    ("target", {"regex": "(a{1000}){1000}"}, "target.regex", 'many times, got "(a{1000})'),
    ("target", {"regex": "a" * 513}, "target.regex", '"aaa'),
    ("target", {"tokens": []}, "target.tokens", "[]"),
    ("target", {"tokens": "0-3"}, "target.tokens", '"0-3"'),
    ("target", {"tokens": {"0": 1}}, "target.tokens", '{"0": 1}'),
    ("target", {"tokens": [0, 3]}, "target.tokens[0]", "0"),
    ("target", {"tokens": [[0, 1], [3, 3]]}, "target.tokens[1]", "[3, 3]"),
    ("target", {"tokens": [[5, 2]]}, "target.tokens[0]", "[5, 2]"),
    ("target", {"tokens": [[-2, 2]]}, "target.tokens[0]", "[-2, 2]"),
    ("target", {"tokens": [[0, 1, 2]]}, "target.tokens[0]", "[0, 1, 2]"),
    ("target", {"tokens": [[0.0, 1]]}, "target.tokens[0]", "[0.0, 1]"),
    ("target", {"tokens": [[False, True]]}, "target.tokens[0]", "[false, true]"),
    ("target", {"tokens": [[0, NAN]]}, "target.tokens[0]", "[0, NaN]"),
    ("target", {"tokens": [[0, 1]] * 257}, "target.tokens", "has 257"),
    ("target", {"weights": {}}, "target.weights", "{}"),
    ("target", {"weights": [1, 2]}, "target.weights", "[1, 2]"),
    ("target", {"weights": {"0": -0.5}}, "target.weights.0", "-0.5"),
    ("target", {"weights": {"0": NAN}}, "target.weights.0", "NaN"),
    ("target", {"weights": {"3": INF}}, "target.weights.3", "Infinity"),
    ("target", {"weights": {"0": 10**400}}, "target.weights.0", "1329 bits"),
    ("target", {"weights": {"0": 1e300}}, "target.weights.0", "1e+300"),
    ("target", {"weights": {"0": "1"}}, "target.weights.0", '"1"'),
    ("target", {"weights": {"0": True}}, "target.weights.0", "true"),
    ("target", {"weights": {"0": None}}, "target.weights.0", "null"),
    ("target", {"weights": {"0": 0, "1": 0.0}}, "target.weights", '{"0": 0, "1": 0.0}'),
    ("target", {"weights": {"0": 1e-300}}, "target.weights", "1e-300"),
    ("target", {"weights": {"a": 1}}, "target.weights", '"a"'),
    ("target", {"weights": {"-1": 1}}, "target.weights", '"-1"'),
    ("target", {"weights": {"1.5": 1}}, "target.weights", '"1.5"'),
    ("target", {"weights": {"01": 1}}, "target.weights", '"01"'),
    ("target", {"weights": {"٣": 1}}, "target.weights", '"٣"'),
    ("target", {"weights": {"9" * 5000: 1}}, "target.weights", '"999'),
    ("target", {"weights": {True: 1}}, "target.weights", "true"),
    ("target", {"weights": {1: 1, "1": 2}}, "target.weights", '"1"'),
    ("target", {"tool_call": -1}, "target.tool_call", "-1"),
    ("target", {"tool_call": 65_536}, "target.tool_call", "65536"),
    ("target", {"tool_call": "0"}, "target.tool_call", '"0"'),
    ("target", {"tool_call": True}, "target.tool_call", "true"),
    ("target", {"tool_call": None}, "target.tool_call", "null"),
    ("target", {"tool_call": 0, "argument": ""}, "target.argument", '""'),
    ("target", {"tool_call": 0, "argument": 3}, "target.argument", "3"),
    ("target", {"tool_call": 0, "argument": "x" * 65_537}, "target.argument", '"xxx'),
    ("target", {"tool_call": 0, "text": "a"}, "target", '{"text": "a", "tool_call": 0}'),
    ("target", {"argument": "x"}, "target", '{"argument": "x"}'),
    ("target", {"text": "a", "argument": "x"}, "target.argument", '"x"'),
    ("reasoning", "some", "reasoning", '"some"'),
    ("reasoning", "output", "reasoning", '"output"'),
    ("reasoning", True, "reasoning", "true"),
    ("reasoning", {"regex": "a"}, "reasoning.regex", '"a"'),
    ("reasoning", {"tokens": [[4, 1]]}, "reasoning.tokens[0]", "[4, 1]"),
    ("reasoning", {"text": ""}, "reasoning.text", '""'),
    ("reasoning", {"text": "a", "tokens": [[0, 1]]}, "reasoning", '"text": "a"'),
    ("recurse_over", "everything", "recurse_over", '"everything"'),
    ("recurse_over", 1, "recurse_over", "1"),
    ("recurse_over", ["reasoning"], "recurse_over", '["reasoning"]'),
    ("rows", "all", "rows", '"all"'),
    ("weighting", "log", "weighting", '"log"'),
    ("rows", None, "rows", "null"),
    ("heads", "yes", "heads", '"yes"'),
    ("heads", None, "heads", "null"),
    ("heads", True, "heads", "true"),
    ("skip_tokens", "vowels", "skip_tokens", '"vowels"'),
    ("skip_tokens", None, "skip_tokens", "null"),
    ("skip_tokens", [""], "skip_tokens[0]", '""'),
    ("skip_tokens", ["a", 1], "skip_tokens[1]", "1"),
    ("skip_tokens", ["a"] * 257, "skip_tokens", "has 257"),
    ("top_k", 0, "top_k", "0"),
    ("top_k", -3, "top_k", "-3"),
    ("top_k", 100_001, "top_k", "100001"),
    ("top_k", 5.0, "top_k", "5.0"),
    ("top_k", "5", "top_k", '"5"'),
    ("top_k", True, "top_k", "true"),
    ("scope", "user", "scope", '"user"'),
    ("scope", None, "scope", "null"),
    ("include", "hops", "include", '"hops"'),
    ("include", None, "include", "null"),
    ("include", {"hops": True}, "include", '{"hops": true}'),
    ("include", ["hops", "everything"], "include[1]", '"everything"'),
    ("include", [["hops"]], "include[0]", '["hops"]'),
    ("mode", "later", "mode", "must be 'inline' or 'deferred', got \"later\""),
    ("mode", None, "mode", "null"),
]


@pytest.mark.parametrize(
    ("field", "value", "path", "shown"),
    REFUSED,
    ids=[f"{path}-{number}" for number, (_, _, path, _) in enumerate(REFUSED)],
)
def test_refusal_names_field_and_value(field, value, path, shown):
    error = refusal({field: value})
    assert error.param == f"flashtrace.{path}"
    assert shown in error.message
    assert error.code == "invalid_flashtrace"
    with pytest.raises(ValidationError):
        FlashTraceRequest(**{field: value})


def test_long_values_and_keys_are_shortened():
    error = refusal({"target": {"text": ["x" * 10_000] * 10_000}, "top_k": 0})
    assert len(error.message) < 200
    error = refusal({"k" * 10_000: 1})
    assert len(error.message) < 300


def test_deep_values_are_shortened():
    value: list = []
    for _ in range(900):
        value = [value]
    assert len(refusal({"hops": value}).message) < 200


@pytest.mark.parametrize(
    ("limits", "value", "path"),
    [
        (RequestLimits(max_hops=2), {"hops": 3}, "hops"),
        (RequestLimits(max_hops=0), {"preset": "paper"}, "hops"),  # It asks for one.
        (RequestLimits(max_verify=2), {"verify": 3}, "verify"),
        (RequestLimits(max_verify_requests=6), {"verify": 2, "targets": ["output"] * 2}, "verify"),
        (RequestLimits(max_top_k=10), {"hops": 1}, "top_k"),
        (RequestLimits(max_spans=1), {"target": {"tokens": [[0, 1], [2, 3]]}}, "target.tokens"),
        (RequestLimits(max_spans=1), {"reasoning": {"tokens": [[0, 1]] * 2}}, "reasoning.tokens"),
        (RequestLimits(max_skip_tokens=1), {"skip_tokens": ["a", "b"]}, "skip_tokens"),
        (RequestLimits(max_regex_length=3), {"target": {"regex": "abcd"}}, "target.regex"),
        (RequestLimits(max_text_length=3), {"target": {"text": "abcd"}}, "target.text"),
        (RequestLimits(max_text_length=3), {"skip_tokens": ["abcd"]}, "skip_tokens[0]"),
        (
            RequestLimits(max_weights=1),
            {"target": {"weights": {"0": 1, "1": 1}}},
            "target.weights",
        ),
    ],
)
def test_server_limits_apply(limits, value, path):
    assert refusal(value, limits).param == f"flashtrace.{path}"
    roomy = RequestLimits(*(10**6 for _ in range(7)))
    assert parse(value, roomy) is not None


def test_requests_cannot_be_changed():
    request = parse({"target": {"text": "a"}})
    with pytest.raises(ValidationError):
        request.hops = 3
    with pytest.raises(ValidationError):
        request.target.text = "b"


@pytest.mark.parametrize(
    ("value", "end", "path", "shown"),
    [
        ({"target": {"tokens": [[0, 2], [3, 9]]}}, 9, "target.tokens[1]", "[3, 9]"),
        ({"target": {"weights": {"2": 1, "8": 1}}}, 9, "target.weights", "8"),
        ({"target": {"weights": {"2": 1, "8": 0}}}, 9, "target.weights", "8"),
        ({"reasoning": {"tokens": [[1, 5]]}}, 5, "reasoning.tokens[0]", "[1, 5]"),
        ({"target": {"tokens": [[0, 10**30]]}}, 10**30, "target.tokens[0]", "[0, 10000"),
    ],
)
def test_positions_that_cannot_be_generated_are_refused(value, end, path, shown):
    request = parse(value)
    assert check_against_limit(request, end) is None
    with pytest.raises(InvalidRequestError) as error:
        check_against_limit(request, end - 1)
    assert error.value.param == f"flashtrace.{path}"
    assert f"got {shown}" in error.value.message
    assert str(end - 1) in error.value.message


@pytest.mark.parametrize("value", [True, {"target": {"text": "long text"}, "hops": 8}])
def test_requests_without_positions_fit_any_length(value):
    assert check_against_limit(parse(value), 1) is None


def test_json_schema_describes_every_key():
    schema = FlashTraceRequest.model_json_schema()
    json.dumps(schema, allow_nan=False)
    assert schema["additionalProperties"] is False
    assert list(schema["properties"]) == list(FlashTraceRequest.model_fields)
    models = [schema, *schema["$defs"].values()]
    assert len(models) == 10
    for model in models:
        assert model["description"]
        for field in model["properties"].values():
            assert field["description"]
    assert schema["properties"]["hops"]["anyOf"] == [
        {"minimum": 0, "type": "integer"},
        {"const": "auto", "type": "string"},
    ]


_spans = st.lists(
    st.tuples(st.integers(0, 10**6), st.integers(1, 10**4)).map(lambda s: [s[0], sum(s)]),
    min_size=1,
    max_size=20,
)
_weights = st.dictionaries(
    st.integers(0, 10**6).map(str), st.floats(1e-6, 1e6), min_size=1, max_size=20
)
_texts = st.text(min_size=1, max_size=20)
_requests = st.fixed_dictionaries(
    {},
    optional={
        "target": st.one_of(
            st.sampled_from(["output", "generated"]),
            st.fixed_dictionaries({"text": _texts}),
            st.fixed_dictionaries({"tokens": _spans}),
            st.fixed_dictionaries({"weights": _weights}),
            st.fixed_dictionaries({"tool_call": st.integers(0, 99)}, optional={"argument": _texts}),
        ),
        "hops": st.integers(0, 8) | st.just("auto"),
        "reasoning": st.one_of(
            st.sampled_from(["auto", "none"]),
            st.fixed_dictionaries({"tokens": _spans}),
            st.fixed_dictionaries({"text": _texts}),
        ),
        "recurse_over": st.sampled_from(["reasoning", "generated", "assistant"]),
        "skip_tokens": st.sampled_from(["none", "punctuation"]) | st.lists(_texts, max_size=5),
        "top_k": st.integers(1, 100_000) | st.none(),
        "include": st.lists(
            st.sampled_from(
                ["hops", "generated", "segments", "sentences", "layers", "attention", "tokens"]
            ),
            unique=True,
        ),
        "preset": st.sampled_from(["sources", "paper"]),
        "mode": st.sampled_from(["inline", "deferred"]),
    },
)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
_keys = st.sampled_from(
    [*FlashTraceRequest.model_fields, "text", "regex", "tokens", "weights", "tool_call", "argument"]
)


def test_weights_of_heads_need_the_servers_file():
    assert "option heads" in refusal({"heads": True}).message
    limits = RequestLimits(heads=True)
    assert parse({"heads": True}, limits).heads
    assert not parse(True, limits).heads
    for name in ("citations", "guard"):
        error = refusal({"heads": True, name: True}, limits)
        assert (error.param, f"with {name}" in error.message) == ("flashtrace.heads", True)


@pytest.mark.parametrize(
    "field",
    [
        {"target": {"weights": {"0": 1.0}}},
        {"targets": [{"text": "a"}, {"weights": {"0": 1.0}}]},
    ],
)
def test_weights_are_the_clients_or_the_models(field):
    error = refusal({**field, "weighting": "surprise"})
    assert error.param == "flashtrace.weighting"
    assert parse({**field, "weighting": "equal"})


@settings(max_examples=100, deadline=None)
@given(_requests)
def test_good_requests_keep_every_value(value):
    request = parse(value)
    found = json.loads(request.model_dump_json(exclude_unset=True))
    every = {"scope": "prompt"} if request.top_k is None else {}
    assert found == {**every, **json.loads(json.dumps(PRESETS[request.preset])), **value}


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(_keys, _json | st.dictionaries(_keys, _json, max_size=2)) | _json)
def test_any_json_is_parsed_or_refused(value):
    try:
        request = parse(value)
    except InvalidRequestError as error:
        assert error.param.startswith("flashtrace")
        assert error.message.startswith(error.param)
    else:
        assert request is None or parse(request.model_dump(exclude_unset=True)) == request
