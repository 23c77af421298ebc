"""Generated request bodies: good but for their ``flashtrace`` field, or broken altogether."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from hypothesis import strategies as st

from tests.server.fuzz_fields import FIELDS, PLAUSIBLE, nested
from vllm_flashtrace.api.request import FIELD
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.trace.wire import EXTRA_ARGS_KEY, TraceSpec, seal

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
ATTRIBUTIONS = "/v1/attributions"
ROUTES = (CHAT, COMPLETIONS, RESPONSES, MESSAGES, ATTRIBUTIONS)

CALL = '<tool_call>\n{"name": "pay", "arguments": {"iban": "DE89", "amount": 250}}\n</tool_call>'
ANSWERS = [
    "The code is 4821.",
    "<think>\nThe note says 4821.\n</think>\n\nIt is 4821.",
    f"I will pay.\n{CALL}\n{CALL}",
    "naïve 漢字 😀 e\u0301",
    "a" * 60 + "!",
    "",
]


@dataclass(frozen=True)
class Sent:
    """One generated request.

    Attributes:
        route: Path.
        body: The bytes of its body.
        answers: What the scripted engine generates, by choice.
        headers: Besides the content type.
        blamable: What an error may name; None if that is any part of the body.
    """

    route: str
    body: bytes
    answers: tuple[str, ...] = ("The code is 4821.",)
    headers: dict[str, str] = field(default_factory=dict)
    blamable: tuple[str, ...] | None = None


_USER = {"role": "user", "content": "The code is 4821. What is the code?"}
_CALLS = [
    {"id": "c1", "type": "function", "function": {"name": "pay", "arguments": '{"iban": "DE89"}'}}
]
CONVERSATIONS = [
    [_USER],
    [{"role": "system", "content": "Be brief."}, _USER],
    [_USER, {"role": "assistant", "content": "It is 4821."}, {"role": "user", "content": "Sure?"}],
    [
        _USER,
        {"role": "assistant", "content": None, "tool_calls": _CALLS},
        {"role": "tool", "tool_call_id": "c1", "content": "paid 4821"},
    ],
    [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": ""}]}],
    [{"role": "user", "content": ""}],
    [{"role": "user", "content": "4821 " * 100}],
]
_TOOLS = [{"type": "function", "function": {"name": "pay", "parameters": {"type": "object"}}}]
_PROMPTS: list[Any] = [
    "The code is 4821. Repeat:",
    ["a", "b"],
    [1, 2, 3],
    [[1, 2], [3]],
    "😀 é",
    "a",
]
_ANSWERED = [
    {"role": "assistant", "content": "It is 4821."},
    {"role": "assistant", "content": "It is 4821.", "reasoning_content": "The note says 4821."},
    {"role": "assistant", "content": None, "tool_calls": _CALLS},
    {"role": "assistant", "content": "", "reasoning": "\ud800"},
    {"role": "assistant", "content": "a", "tool_calls": [{"function": {"arguments": "[" * 5000}}]},
    {"role": "user", "content": "b"},
]
_SHARED = {
    "n": st.integers(1, 3),
    "stop": st.sampled_from([".", ["48", "</think>"]]),
    "ignore_eos": st.booleans(),
}
_MAX_TOKENS = st.sampled_from([64, 1, 8, 64, 64])
_BASES: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    CHAT: st.fixed_dictionaries(
        {"messages": st.sampled_from(CONVERSATIONS)},
        optional={**_SHARED, "max_tokens": _MAX_TOKENS, "tools": st.just(_TOOLS)},
    ),
    COMPLETIONS: st.fixed_dictionaries(
        {"prompt": st.sampled_from(_PROMPTS), "max_tokens": _MAX_TOKENS},
        optional={**_SHARED, "echo": st.booleans()},
    ),
    RESPONSES: st.fixed_dictionaries(
        {"input": st.sampled_from(["Which code?", [_USER], CONVERSATIONS[2]])},
        optional={"max_output_tokens": _MAX_TOKENS, "instructions": st.just("Be brief.")},
    ),
    MESSAGES: st.fixed_dictionaries(
        {
            "messages": st.sampled_from([CONVERSATIONS[0], CONVERSATIONS[2]]),
            "max_tokens": _MAX_TOKENS,
        },
        optional={"system": st.just("Be brief."), "stop_sequences": st.just(["."])},
    ),
    ATTRIBUTIONS: st.one_of(
        st.fixed_dictionaries(
            {
                "prompt": st.sampled_from(
                    ["Which code?", [1, 2, 3], "😀", "\ud800", [10**30], [10**9]]
                ),
                "completion": st.sampled_from([*ANSWERS, [5, 6, 7], [10**30], "a\udfff"]),
            },
            optional={"cache_salt": st.sampled_from(["x", "", "\ud800"])},
        ),
        st.fixed_dictionaries(
            {
                "messages": st.builds(
                    lambda prior, last: [*prior, last],
                    st.sampled_from(CONVERSATIONS),
                    st.sampled_from(_ANSWERED),
                )
            },
            optional={"tools": st.just(_TOOLS)},
        ),
    ),
}


def _sealed() -> str:
    """A spec that this very process would accept if only it came as bytes."""
    target = TargetWeights.from_spans([(1, 2)])
    return seal(TraceSpec.create(target, 3, exact_fraction=1.0)).decode("latin-1")


@cache
def _forgeries() -> list[dict[str, Any]]:
    values = ["AAAA", "", 0, 1.5, ["a", 1], _sealed(), "\ud800", None, True, {"a": 1}, [[1]]]
    reserved = [{"vllm_xargs": {EXTRA_ARGS_KEY: value, "mine": "x"}} for value in values]
    reserved += [{"vllm_xargs": {"flashtrace_trace": value}} for value in values]
    inside = {"vllm_xargs": {EXTRA_ARGS_KEY: _sealed()}}
    return [
        *reserved,
        {"extra_body": inside},
        {"extra_args": {EXTRA_ARGS_KEY: _sealed()}},
        {"sampling_params": {"extra_args": {EXTRA_ARGS_KEY: _sealed()}}},
        {"kv_transfer_params": {EXTRA_ARGS_KEY: _sealed()}},
        {"metadata": {EXTRA_ARGS_KEY: "AAAA"}},
    ]


@st.composite
def requests(draw: st.DrawFn, route: str, stream: bool) -> Sent:
    """A good request but for its field, or for what poses as an internal trace request."""
    body = {"model": "m", **draw(_BASES[route])}
    if stream:
        body["stream"] = True
        if route in (CHAT, COMPLETIONS) and draw(st.booleans()):
            body["stream_options"] = {"include_usage": True}
    forged = draw(st.integers(0, 7)) == 0
    forgery = draw(st.sampled_from(_forgeries())) if forged else {}
    body.update(forgery)
    text = json.dumps(body)
    if not forged or draw(st.booleans()):
        text = f'{text[:-1]}, "{FIELD}": {draw(FIELDS)}}}'
    answers = draw(st.lists(st.sampled_from(ANSWERS), min_size=1, max_size=3))
    if route == ATTRIBUTIONS:
        return Sent(route, text.encode(), tuple(answers))
    blamable = (FIELD, *forgery)
    return Sent(route, text.encode(), tuple(answers), blamable=blamable)


_JUNK: list[Any] = [
    # As "n" a number in a string is good, and thousands of choices keep vLLM busy for many seconds.
    *(None, True, 0, -1, 1.5, 10**30, "", "a", "\ud800", "4", "assistant", "auto", "none"),
    *([], [[]], [None], [1, "a"], {}, {"a": 1}, [_USER], {"role": "assistant", "content": []}),
    {"type": "text", "text": "a"},
    [{"type": "text", "text": "a"}],
    [{"type": "text"}],
    [{"type": "nonsense"}],
]
_ADDED = [
    *("temperature", "top_p", "logprobs", "top_logprobs", "seed", "tools", "tool_choice", "suffix"),
    *("response_format", "logit_bias", "cache_salt", "priority", "truncate_prompt_tokens"),
    *("min_tokens", "include_reasoning", "chat_template_kwargs", "documents", "user", "name"),
    *("add_generation_prompt", "continue_final_message", "stop_token_ids", "prompt_logprobs"),
    *("refusal", "reasoning", "tool_call_id"),
]


@st.composite
def altered(draw: st.DrawFn, route: str) -> dict[str, Any]:
    """A good request without the field, in which some places hold something else."""
    body = json.loads(json.dumps({"model": "m", **draw(_BASES[route])}))
    for _ in range(draw(st.integers(1, 2))):
        node: Any = body
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = draw(st.sampled_from([*keys, *(_ADDED if isinstance(node, dict) else [])]))
            inner = node[key] if key in keys else None
            if not (isinstance(inner, (dict, list)) and inner and draw(st.booleans())):
                break
            node = inner
        if key in keys and draw(st.integers(0, 3)) == 0:
            del node[key]
        else:
            node[key] = copy.deepcopy(draw(st.sampled_from(_JUNK)))
        if not node:
            break
    return body


@st.composite
def broken(draw: st.DrawFn) -> Sent:
    """Bytes, headers and sizes that no client library would send."""
    route = draw(st.sampled_from(ROUTES))
    base = (
        {"prompt": "Which?", "completion": "4821"} if route == ATTRIBUTIONS else draw(_BASES[route])
    )
    text = json.dumps({"model": "m", **base, FIELD: draw(PLAUSIBLE)})
    fault = draw(st.sampled_from(sorted(_FAULTS)))
    at = draw(st.integers(0, len(text)))
    headers = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "X-data-parallel-rank": st.sampled_from(["0", "-1", "x", "9" * 400, "9" * 5000]),
                "X-Request-Id": st.sampled_from(["", "a" * 5000, "é"]),
                "traceparent": st.sampled_from(["x", "00-" + "0" * 32 + "-" + "0" * 16 + "-00"]),
                "content-type": st.sampled_from(
                    ["text/plain", "application/json; charset=utf-16", "application/xml", "x"]
                ),
            },
        )
    )
    return Sent(route, _FAULTS[fault](text, at), headers=headers)


def _whole(text: str, more: str) -> bytes:
    return f"{text[:-1]}, {more}}}".encode()


_DEEP_CALL = [
    {"role": "user", "content": "a"},
    {
        "role": "assistant",
        "tool_calls": [
            {
                "id": "1",
                "type": "function",
                "function": {"name": "f", "arguments": nested("[", "]", 5000)},
            }
        ],
    },
    {"role": "assistant", "content": "4821"},
]
_FAULTS = {
    "cut": lambda text, at: text[:at].encode(),
    "byte": lambda text, at: text[:at].encode() + b"\xff\xfe" + text[at:].encode(),
    "null": lambda text, at: text[:at].encode() + b"\0" + text[at:].encode(),
    "twice": lambda text, at: (text * 2).encode(),
    "not an object": lambda text, at: f"[{text}]".encode(),
    "utf-16": lambda text, at: text.encode("utf-16"),
    "byte order mark": lambda text, at: text.encode("utf-8-sig"),
    "same field": lambda text, at: _whole(text, f'"{FIELD}": {{"hops": -1}}'),
    "same field, good last": lambda text, at: text.replace("{", f'{{"{FIELD}": 5, ', 1).encode(),
    "large field": lambda text, at: _whole(text, f'"{FIELD}": "{"a" * (3 << 20)}"'),
    "large list": lambda text, at: _whole(
        text, f'"{FIELD}": {{"skip_tokens": [{",".join(["1"] * 400_000)}]}}'
    ),
    "large unknown key": lambda text, at: _whole(text, f'"other": "{"a" * (2 << 20)}"'),
    "deep messages": lambda text, at: _whole(
        text, f'"messages": [{{"role": "user", "content": "a", "x": {nested("[", "]", 900)}}}]'
    ),
    "deep call": lambda text, at: _whole(text, f'"messages": {json.dumps(_DEEP_CALL)}'),
    "surrogates": lambda text, at: _whole(text, '"model": "\\ud800"'),
    "nothing": lambda text, at: b"",
}
