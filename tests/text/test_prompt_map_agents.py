"""Prompts of agents under the published chat templates: who said what, and what is followed."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch

from tests.api.samples import check_described
from tests.chat_templates import TEMPLATES
from tests.text.jinja_templates import template
from vllm_flashtrace.api.request import RequestLimits, parse_flashtrace_field
from vllm_flashtrace.base.records import Completion, TraceUsage
from vllm_flashtrace.text.plan import plan_trace
from vllm_flashtrace.text.result import build_result


def call(number, function, /, **arguments):
    function = {"name": function, "arguments": arguments}
    return {"id": f"call{number:05}", "type": "function", "function": function}


def result(number, content, **more):
    return {"role": "tool", "tool_call_id": f"call{number:05}", "content": content, **more}


TURNS = [
    {"role": "system", "content": "You pay invoices."},
    {"role": "user", "content": "Pay the one of the cat."},
    {"role": "assistant", "content": None, "tool_calls": [call(1, "find", text="cat", top=3)]},
    result(1, '{"invoice": "Q-17",\n "who": "the \\"cat\\" 😀"}', name="find"),
    {"role": "assistant", "content": None, "tool_calls": [call(2, "read", id="Q-17")]},
    result(2, '{"iban": "DE89 3704", "sum": 250}'),
    {"role": "assistant", "content": "Shall I pay 250 to DE89 3704?"},
    {"role": "user", "content": "Yes."},
]
ANSWER = '<tool_call>{"name": "pay", "arguments": {"iban": "DE89 3704"}}</tool_call>'
everywhere = pytest.mark.parametrize("name", TEMPLATES)


@pytest.fixture
def trace(byte_level):
    """Plans and runs a trace with made-up scores; gives the plan and the attribution object."""

    def run(name, messages=TURNS, **options):
        source = template(TEMPLATES[name])

        def render(messages):
            return source(messages, add_generation_prompt=True)

        ids = byte_level.encode(render(messages), add_special_tokens=False)
        completion = Completion(
            ids, byte_level.encode(ANSWER, add_special_tokens=False), ANSWER, messages=messages
        )
        field = {"target": {"text": "DE89 3704"}, "preset": "paper", "top_k": None, **options}
        request = parse_flashtrace_field(field, RequestLimits())
        plan = plan_trace(request, completion, byte_level, render=render)
        generator = torch.Generator().manual_seed(0)
        hops = []
        while (weights := plan.recursion.next_weights()) is not None:
            hops.append(weights.positions.tolist())
            plan.recursion.add(torch.rand(len(plan.token_ids), generator=generator))
        data = build_result([plan], TraceUsage(), "ft-" + "0" * 32)
        check_described(data)
        return plan, hops, data

    return run


def spelled(plan, positions):
    return "".join(plan.prompt.token(i) for i in positions if i < plan.prompt_length)


@everywhere
def test_every_message_is_a_segment_and_they_add_up(trace, name):
    _, _, data = trace(name, include=["segments"])
    segments = data["segments"]
    assert [s.get("message") for s in segments] == [*range(len(TURNS)), None]
    assert [s["role"] for s in segments] == [*(m["role"] for m in TURNS), "template"]
    assert [s.get("tool_call_id") for s in segments] == [
        *(m.get("tool_call_id") for m in TURNS),
        None,
    ]
    assert segments[3]["name"] == "find"
    assert math.fsum(s["score"] for s in segments) == pytest.approx(data["input_mass"])
    assert all(s["score"] > 0 for s in segments)


@everywhere
def test_tool_calls_of_a_turn_are_told_apart(trace, name):
    turns = copy.deepcopy(TURNS)
    if name != "llama":  # which takes one call a turn
        turns[2]["tool_calls"].append(call(9, "find", text="dog"))
    _, _, data = trace(name, turns, include=["segments"])
    segment = data["segments"][2]
    calls = segment["tool_calls"]
    assert [c["tool_call"] for c in calls] == list(range(len(turns[2]["tool_calls"])))
    assert [(c["id"], c["name"]) for c in calls] == [
        (c["id"], c["function"]["name"]) for c in turns[2]["tool_calls"]
    ]
    assert all(c["score"] > 0 for c in calls)
    # No content stands beside these calls.
    assert math.fsum(c["score"] for c in calls) == pytest.approx(segment["score"])
    assert "tool_calls" not in data["segments"][6]


@everywhere
def test_recursion_follows_assistant_turns_and_their_calls(trace, name):
    plan, hops, data = trace(name, recurse_over="assistant", hops=2, include=["segments", "hops"])
    assert len(hops) == 3
    text = spelled(plan, hops[1])
    for said in ("find", "cat", "3", "read", "Q-17", "Shall I pay 250 to DE89 3704?"):
        assert said in text
    for heard in ("You pay", "invoice", "iban", "Yes", "tool_response", "TOOL_RESULTS", "ipython"):
        assert heard not in text
    assert hops[1] == hops[2]
    assert not plan.input_mask[[i for i in hops[1] if i < plan.prompt_length]].any()
    masses = [data[f"{part}_mass"] for part in ("input", "remaining", "target", "skipped")]
    assert math.fsum(masses) == pytest.approx(1)
    scores = {s["message"]: s["score"] for s in data["segments"] if "message" in s}
    assert [i for i, score in scores.items() if score == 0] == [2, 4, 6]
    assert math.fsum(s["score"] for s in data["segments"]) == pytest.approx(data["input_mass"])
    for hop in data["hops"]:
        parts = [hop[f"{part}_mass"] for part in ("input", "reasoning", "target", "skipped")]
        assert math.fsum(parts) == pytest.approx(1)


def test_tool_result_written_as_json_text_is_located_to_the_character(trace):
    plan, _, data = trace("llama")
    content = TURNS[3]["content"]
    assert content not in plan.prompt.text  # the template writes it with escapes
    assert json.dumps(content, ensure_ascii=False) in plan.prompt.text
    entries = [entry for entry in data["scores"] if entry.get("message") == 3]
    covered = {i for entry in entries for i in range(entry["start"], entry["end"])}
    assert covered == set(range(len(content)))
    for entry in entries:
        said = content[entry["start"] : entry["end"]]
        escaped = json.dumps(said, ensure_ascii=False)[1:-1]
        assert escaped in entry["token"] or entry["token"] in escaped


def spelled_by_call(plan, message):
    calls = {}
    for i, located in enumerate(plan.prompt_map.tokens):
        if located is not None and located.message == message:
            calls.setdefault(located.tool_call, []).append(plan.prompt.token(i))
    return ["".join(calls[n]) for n in sorted(calls)]


NUMBERS = [
    [{"n": 17}, {"n": 17}],
    [{"n": 17}, {"n": 18}],
    [{"n": 17, "name": "cat"}, {"name": "cat", "n": 17}],
    [{"name": "find"}, {"n": [1, {"a": None}]}],
    [{}, {"n": 1.5}],
]


@pytest.mark.parametrize("arguments", NUMBERS)
@pytest.mark.parametrize("in_front", [False, True])
def test_numbers_belong_to_their_own_call_in_either_order(trace, arguments, in_front):
    calls = [call(1, "find", **arguments[0]), call(2, "read", **arguments[1])]
    if in_front:  # as the request's own types may order the keys
        for one in calls:
            one["function"] = dict(reversed(one["function"].items()))
    turns = [*TURNS[:2], {"role": "assistant", "content": None, "tool_calls": calls}]
    turns += [result(1, "a"), result(2, "b"), TURNS[-1]]
    plan, _, _ = trace("mistral", turns, recurse_over="assistant")
    assert not plan.prompt_map.unlocated
    texts = spelled_by_call(plan, 2)
    for text, name, values in zip(texts, ("find", "read"), arguments, strict=True):
        assert name in text
        written = json.dumps(values)[1:-1]
        # A text alone is marked by itself; with others, all arguments are found as written.
        assert written in text or all(str(value) in text for value in values.values())
        assert text.count("17") == written.count("17")
