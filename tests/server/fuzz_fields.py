"""Generated values of the ``flashtrace`` field as JSON texts: good, nearly good and hostile."""

from __future__ import annotations

import copy
import json
from functools import cache
from typing import Any

import schemathesis
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode

from vllm_flashtrace.api.request import FlashTraceRequest


def nested(opening: str, closing: str, depth: int) -> str:
    return opening * depth + closing * depth


def _words(text: str) -> list[str]:
    return text.split()


# JSON texts, some of which no Python value would be written as.
HOSTILE = [
    *_words("null true false 0 -1 1 2 2.5 1.0 -0.0 1e-320 1e308 1e999 NaN Infinity -Infinity"),
    *_words('"" "\\u0000" "\\ud800" "a\\udfffb" "\\ud83d\\ude00" "output" "4821" "e\\u0301"'),
    *_words("[] {} [[]] [{}] [null] [true] [[0,1]] [[1,0]] [[0,0]] [[-1,2]] [[0,1,2]] [[0]]"),
    *_words('[[0,1e9]] [[0,99999999999999999999]] [["0","1"]] [[0.0,1.0]] [[true,2]] {"":0}'),
    *_words('{"0":1} {"00":1} {"-1":1} {"0":-1} {"0":0} {"0":1e-45} {"0":1e31} {"1e3":1}'),
    *_words('{"0":1,"0":2} {"\\ud800":1} {"a":1} {"0":"1"} {"0":null} {"0":true}'),
    *_words('{"text":"a","regex":"b"} {"tokens":[]} {"tool_call":0} {"argument":"a"}'),
    "9" * 400,
    "-" + "9" * 4000,
    "9" * 5000,
    '"' + "a" * 70_000 + '"',
    '"' + "\\u0041" * 600 + '"',
    "[" + ",".join(["[0,1]"] * 300) + "]",
    "{" + ",".join(f'"{i}":1' for i in range(2500)) + "}",
    nested("[", "]", 60),
    nested("[", "]", 900),
    nested('{"text":', "}", 300).replace(":}", ":1}"),
    nested("[", "]", 100_000),
]
REGEXES = [
    *_words("4821 \\d+ (\\d)(\\d) .* .+ a* ^ $ ^$ \\b (?:) ( ) [ * + ? {1} x{2,1} a{99999} \\"),
    *_words("(a+)+$ (a|a)*$ (a|aa)+$ (.*a){20} (?=a)* (?i)(a|A)+$ (\\w+\\s?)+$ ((a*)*)*"),
    *_words("(?P<n>a)(?P=n) (?#x (?R) (?<=a+)b \\p{L}+ [[:alpha:]] (e){i<=3} \\1 (?z)"),
    "(" * 200 + "a" + ")" * 200,
    "(?:" * 120 + "a" + ")?" * 120,
    "a?" * 200 + "a" * 100,
    "\u0000",
    "😀|é",
]
_WORDS = [
    "4821",
    "The",
    "code",
    "a",
    "😀",
    "é",
    "漢",
    "DE89",
    "I will",
    "</think>",
    " ",
    "zz",
    "\n",
]
_KEYS = [
    *FlashTraceRequest.model_fields,
    "",
    "target_",
    "__class__",
    "text",
    "\ud800",
    "flashtrace",
]


@cache
def schema_fields() -> st.SearchStrategy[Any]:
    """What the field's JSON schema allows, and what it does not."""
    parts = FlashTraceRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    components = {**parts.pop("$defs"), "Field": parts}
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Field"}}}
    operation = {
        "requestBody": {"required": True, "content": content},
        "responses": {"200": {"description": "any"}},
    }
    document = {
        "openapi": "3.1.0",
        "info": {"title": "the field", "version": "1"},
        "paths": {"/": {"post": operation}},
        "components": {"schemas": components},
    }
    operation_of_field = schemathesis.openapi.from_dict(document)["/"]["POST"]
    return st.one_of(
        operation_of_field.as_strategy(generation_mode=mode)
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    ).map(lambda case: case.body if _is_json(case.body) else str(case.body))


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


_SPANS = st.lists(
    st.tuples(st.integers(0, 9), st.integers(1, 5)).map(lambda pair: [pair[0], sum(pair)]),
    min_size=1,
    max_size=4,
)
_TARGETS = st.one_of(
    st.sampled_from(["output", "generated"]),
    st.fixed_dictionaries({"text": st.sampled_from(_WORDS)}),
    st.fixed_dictionaries({"regex": st.sampled_from(REGEXES)}),
    st.fixed_dictionaries({"tokens": _SPANS}),
    st.fixed_dictionaries(
        {
            "weights": st.dictionaries(
                st.integers(0, 12).map(str),
                st.sampled_from([0, 1, 0.25, 1e-45, 1e-30, 1e30, 3]) | st.floats(0, 1),
                min_size=1,
                max_size=6,
            )
        }
    ),
    st.fixed_dictionaries(
        {"tool_call": st.integers(0, 2)},
        optional={"argument": st.sampled_from(["iban", "amount", "no", None])},
    ),
)


def _without_a_single_one(field: dict[str, Any]) -> dict[str, Any]:
    """Several targets go without ``target``, scores by layer and sums of attention."""
    if "targets" in field:
        field.pop("target", None)
        single = ("layers", "attention")
        field["include"] = [part for part in field.get("include", []) if part not in single]
    return field


PLAUSIBLE = st.fixed_dictionaries(
    {"mode": st.sampled_from(["inline", "deferred"])},
    optional={
        "target": _TARGETS,
        "targets": st.sampled_from(["sentences", "lines", "claims"])
        | st.lists(_TARGETS, min_size=1, max_size=3),
        "hops": st.integers(0, 8) | st.just("auto"),
        "reasoning": st.sampled_from(["auto", "none"])
        | st.fixed_dictionaries({"tokens": _SPANS})
        | st.fixed_dictionaries({"text": st.sampled_from(_WORDS)}),
        "recurse_over": st.sampled_from(["reasoning", "generated", "assistant"]),
        "skip_tokens": st.sampled_from(["none", "punctuation", [], ["4821", " "]]),
        "top_k": st.sampled_from([None, 1, 3, 100_000]),
        "scope": st.sampled_from(["prompt", "content"]),
        "weighting": st.sampled_from(["equal", "surprise"]),
        "rows": st.sampled_from(["target", "predicting"]),
        "heads": st.sampled_from([False, False, False, True]),  # The server has no file.
        "include": st.lists(
            st.sampled_from(
                ["hops", "generated", "segments", "sentences", "layers", "attention", "tokens"]
            ),
            max_size=5,
        ),
        "sources": st.sampled_from(["auto", [{"id": "a", "message": 0}]]),
        "verify": st.integers(0, 3),
        "preset": st.sampled_from(["paper", "sources"]),
    },
).map(_without_a_single_one)


@st.composite
def _mutated(draw: st.DrawFn) -> str:
    """A field of which one part is replaced by, or joined by, something hostile."""
    # A copy: values that are drawn are the strategy's own, and are drawn again.
    value = copy.deepcopy(draw(PLAUSIBLE | schema_fields()))
    if not isinstance(value, dict):
        return json.dumps(value)
    holders: list[Any] = [value]
    for holder in holders:
        children = holder.values() if isinstance(holder, dict) else holder
        holders += [child for child in children if isinstance(child, (dict, list)) and child]
    holder = draw(st.sampled_from(holders))
    keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    unknown = st.sampled_from(_KEYS)
    key = draw(st.sampled_from(keys) | unknown if keys else unknown)
    if isinstance(holder, dict) or isinstance(key, int):
        holder[key] = "\0hostile"
    return json.dumps(value).replace('"\\u0000hostile"', draw(st.sampled_from(HOSTILE)))


FIELDS = st.one_of(
    st.sampled_from(["true", "false", "null"]),
    st.sampled_from(HOSTILE),
    # Equal strategies would count once.
    *[PLAUSIBLE.map(json.dumps) for _ in range(8)],
    schema_fields().map(json.dumps),
    _mutated(),
    _mutated(),
)
