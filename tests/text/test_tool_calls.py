"""Generated tool calls and their arguments, as vLLM's own parsers read them."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.text.output_parsers import MARKERS, take_apart_by, tokenizer_with, tool
from vllm_flashtrace.api.request import ToolCallTarget
from vllm_flashtrace.base.errors import TraceError

PAY = {"to": "DE89 3704", "amount": 250, "urgent": True, "note": None, "tags": ["a", {"b": "to"}]}
MAIL = {"to": "eve@x.org", "body": 'She said "no",\nthen \\ left 😀'}
CALLS = [("pay", PAY), ("mail", MAIL)]


def hermes(calls):
    return "Now. " + "\n".join(
        f"<tool_call>\n{json.dumps({'name': n, 'arguments': a}, ensure_ascii=False)}\n</tool_call>"
        for n, a in calls
    )


def llama_json(calls):
    return "; ".join(json.dumps({"name": n, "parameters": a}) for n, a in calls)


def mistral_array(calls):
    return "[TOOL_CALLS] " + json.dumps([{"name": n, "arguments": a} for n, a in calls])


def mistral_named(calls):
    return "".join(f"[TOOL_CALLS]{n}[ARGS]{json.dumps(a)}" for n, a in calls)


def mistral_braces(calls):
    return "".join(f"[TOOL_CALLS]{n}{json.dumps(a, ensure_ascii=False)}" for n, a in calls)


def pythonic(calls):
    written = [f"{n}({', '.join(f'{k}={v!r}' for k, v in a.items())})" for n, a in calls]
    return f"[{', '.join(written)}]"


def llama4(calls):
    return f"<|python_start|>{pythonic(calls)}<|python_end|>"


def xml(calls):
    def written(value):
        return value if isinstance(value, str) else json.dumps(value)

    return "Now.\n" + "\n".join(
        f"<tool_call>\n<function={n}>\n"
        + "".join(f"<parameter={k}>\n{written(v)}\n</parameter>\n" for k, v in a.items())
        + "</function>\n</tool_call>"
        for n, a in calls
    )


FORMATS = {
    "hermes": ("hermes", hermes),
    "qwen3_json": ("qwen3_json", hermes),
    "qwen3_xml": ("qwen3_xml", xml),
    "qwen3_coder": ("qwen3_coder", xml),
    "llama3_json": ("llama3_json", llama_json),
    "llama4_json": ("llama4_json", llama_json),
    "pythonic": ("pythonic", pythonic),
    "llama4_pythonic": ("llama4_pythonic", llama4),
    "mistral, array": ("mistral", mistral_array),
    "mistral, named": ("mistral", mistral_named),
    "mistral, braces": ("mistral", mistral_braces),
}
TYPES = {"pay": {"amount": "integer", "urgent": "boolean", "note": "null", "tags": "array"}}
TOOLS = [tool("pay", to="string", **TYPES["pay"]), tool("mail", to="string", body="string")]
everywhere = pytest.mark.parametrize("form", FORMATS)


@pytest.fixture(scope="module")
def tokenizers():
    plain = tokenizer_with(*MARKERS)
    return {True: plain, False: tokenizer_with(*MARKERS, "[ARGS]")}


class Found:
    """The places of calls and arguments: called, it gives what stands there."""

    def __init__(self, parts):
        self.parts = parts

    def span(self, call, argument=None):
        return self.parts.tool_call(ToolCallTarget(tool_call=call, argument=argument))

    def __call__(self, call, argument=None):
        start, end = self.span(call, argument)
        visible = self.parts.generated.visible
        tokens = visible.overlapping(start, end)
        # Exactly the tokens that hold a character of it.
        assert visible.starts[tokens[0]] <= start < visible.ends[tokens[0]]
        assert visible.starts[tokens[-1]] < end <= visible.ends[tokens[-1]]
        return visible.text[start:end]


@pytest.fixture
def read(tokenizers):
    """Lets a format's parser read a text."""

    def run(form, text, **request):
        name, _ = FORMATS[form]
        # A tokenizer that knows "[ARGS]" is one of the newer Mistral format.
        old = form not in ("mistral, named", "mistral, braces")
        request = {"tools": TOOLS, **request}
        return Found(take_apart_by(tokenizers[old], text, tool_parser=name, **request))

    return run


def refusal(function, *arguments):
    with pytest.raises(TraceError) as error:
        function(*arguments)
    return error.value


def value_of(form, written):
    """What a written value says, for the format's own notation of texts."""
    if "pythonic" in form:
        quoted = '"""' + written + '"""'
        return eval(quoted)
    return written if "xml" in form or "coder" in form else json.loads(f'"{written}"')


@everywhere
def test_every_argument_of_every_call_is_found(read, form):
    found = read(form, FORMATS[form][1](CALLS))
    assert found(0, "to") == "DE89 3704"
    assert found(0, "amount") == "250"
    assert found(0, "urgent").lower() == "true"
    assert found(0, "note").lower() in ("null", "none")
    assert found(0, "tags").replace("'", '"') == '["a", {"b": "to"}]'
    assert found(1, "to") == "eve@x.org"
    assert value_of(form, found(1, "body")) == MAIL["body"]


@everywhere
def test_whole_call_holds_its_name_and_arguments_and_no_marker(read, form):
    found = read(form, FORMATS[form][1](CALLS))
    for index, (name, arguments) in enumerate(CALLS):
        call = found(index)
        assert name in call
        assert arguments["to"] in call
        assert CALLS[1 - index][1]["to"] not in call
        assert "tool_call" not in call.lower()
        assert "python_" not in call


@everywhere
def test_same_value_twice_is_told_apart(read, form):
    calls = [("mail", {"to": "a@x", "cc": "a@x"})] * 2
    found = read(form, FORMATS[form][1](calls))
    wanted = [(0, "to"), (0, "cc"), (1, "to"), (1, "cc")]
    assert [found(*which) for which in wanted] == ["a@x"] * 4
    starts = [found.span(*which)[0] for which in wanted]
    assert starts == sorted(set(starts))


@everywhere
def test_what_is_not_there_is_named(read, form):
    found = read(form, FORMATS[form][1](CALLS))
    missing = refusal(found, 2)
    assert missing.code == "tool_call_not_found"
    assert "tool_call 2" in missing.message
    assert "2 tool calls" in missing.message
    unknown = refusal(found, 1, "iban")
    assert unknown.code == "argument_not_found"
    for part in ('"iban"', "tool call 1", '"mail"', '"body"'):
        assert part in unknown.message
    none = refusal(read(form, "No call."), 0, "to")
    assert none.code == "tool_call_not_found"
    assert "no tool call" in none.message


@everywhere
def test_call_that_is_cut_off_is_not_guessed(read, form):
    text = FORMATS[form][1](CALLS[:1])
    cut = text[: text.index("250") + 2]
    assert refusal(read(form, cut), 0, "amount").code == "tool_call_not_found"


def test_call_in_the_reasoning_is_none(tokenizers):
    draft = hermes([("mail", {"to": "draft@x.org"})])
    text = f"<think>{draft}</think>{hermes(CALLS)}"
    names = {"tool_parser": "hermes", "reasoning_parser": "deepseek_r1"}
    found = Found(take_apart_by(tokenizers[True], text, tools=TOOLS, **names))
    assert found(0, "to") == "DE89 3704"


def test_draft_outside_the_tags_is_none_for_hermes(read):
    draft = json.dumps({"name": "mail", "arguments": {"to": "draft@x.org"}})
    found = read("hermes", f"Should I {draft}? {hermes(CALLS[:1])}")
    assert found(0, "to") == "DE89 3704"


def test_last_of_two_equal_keys_is_the_argument(read):
    text = '<tool_call>{"name": "mail", "arguments": {"to": "a@x", "to": "b@x"}}</tool_call>'
    assert read("hermes", text)(0, "to") == "b@x"


def test_empty_text_is_its_quotes_in_json_and_nothing_in_xml(read):
    calls = [("mail", {"to": "", "body": "x"})]
    assert read("hermes", hermes(calls))(0, "to") == '""'
    error = refusal(read("qwen3_xml", xml(calls)), 0, "to")
    assert error.code == "argument_not_found"
    assert "empty" in error.message


def test_values_that_a_schema_changes_are_still_found(read):
    text = xml([("pay", {"to": 17, "amount": "0250", "urgent": "True"})])
    found = read("qwen3_xml", text)
    assert (found(0, "to"), found(0, "amount"), found(0, "urgent")) == ("17", "0250", "True")


def test_forced_calls_are_json_whatever_the_format(read):
    required = json.dumps([{"name": n, "parameters": a} for n, a in CALLS])
    assert read("pythonic", required, tool_choice="required")(1, "to") == "eve@x.org"
    choice = {"type": "function", "function": {"name": "pay"}}
    found = read("pythonic", json.dumps(PAY), tool_choice=choice)
    assert found(0, "to") == "DE89 3704"
    assert found(0) == json.dumps(PAY)


def test_older_mistral_writes_forced_calls_without_a_marker(read):
    array = json.dumps([{"name": n, "arguments": a} for n, a in CALLS])
    assert read("mistral, array", array, tool_choice="required")(1, "to") == "eve@x.org"


def test_further_calls_are_left_out_where_the_client_gets_one(read):
    found = read("hermes", hermes(CALLS), parallel_tool_calls=False)
    assert found(0, "to") == "DE89 3704"
    assert refusal(found, 1).code == "tool_call_not_found"


def test_arguments_that_are_no_object_have_no_names(read):
    text = '<tool_call>{"name": "pay", "arguments": [1, 2]}</tool_call>'
    found = read("hermes", text)
    assert found(0) == '{"name": "pay", "arguments": [1, 2]}'
    assert refusal(found, 0, "to").code == "argument_not_found"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**6) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)
ARGUMENTS = st.dictionaries(st.sampled_from(["to", "body", "cc"]), VALUES, min_size=1, max_size=3)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    form=st.sampled_from(sorted(FORMATS)),
    calls=st.lists(st.tuples(st.sampled_from(["pay", "mail"]), ARGUMENTS), min_size=1, max_size=3),
)
def test_what_is_found_says_the_argument(read, form, calls):
    text = FORMATS[form][1](calls)
    found = read(form, text, tools=[tool("pay"), tool("mail")])
    for index, (_, arguments) in enumerate(calls):
        for name, value in arguments.items():
            if value == "" and ("xml" in form or "coder" in form):
                assert refusal(found, index, name).code == "argument_not_found"
                continue
            written = found(index, name)
            if "xml" in form or "coder" in form:
                assert written == (value if isinstance(value, str) else json.dumps(value))
            elif "pythonic" in form:
                assert written == repr(value) or repr(value)[1:-1] == written
            else:
                quoted = f'"{written}"' if isinstance(value, str) and value else written
                assert json.loads(quoted) == value
