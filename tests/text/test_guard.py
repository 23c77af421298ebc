"""The guard's rule on made-up scores."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_flashtrace.api.request import RequestLimits, parse_flashtrace_field
from vllm_flashtrace.base.errors import InvalidRequestError
from vllm_flashtrace.base.records import Completion
from vllm_flashtrace.text.guard import guarded_argument, require_messages, traced_in_part
from vllm_flashtrace.text.prompt_map import LocatedToken, PromptMap
from vllm_flashtrace.text.sources import PromptSource, Source

ROLES = ["system", "user", "assistant", "tool", "tool"]
MESSAGES: list[dict[str, Any]] = [
    {"role": role, "content": role, **({"tool_call_id": f"c{i}"} if role == "tool" else {})}
    for i, role in enumerate(ROLES)
]
# Two tokens of each message, one of the template.
TOKENS = [LocatedToken(i // 2, None, 0, 1) for i in range(10)]


def judge(
    scores: dict[int, float],
    *,
    ratio: float = 1.0,
    unlocated: frozenset[int] = frozenset(),
    sources: list[PromptSource] | None = None,
) -> dict[str, Any]:
    """With the score of the first token of each message."""
    found = [scores.get(i // 2, 0.0) if i % 2 == 0 else 0.0 for i in range(10)]
    prompt_map = PromptMap([*TOKENS, None], ROLES, unlocated)
    return guarded_argument(1, "to", ratio, prompt_map, MESSAGES, sources, [*found, 5.0])


@pytest.mark.parametrize(
    ("scores", "ratio", "flagged"),
    [
        ({0: 0.1, 1: 0.1, 3: 0.21}, 1.0, True),
        ({0: 0.1, 1: 0.1, 3: 0.19}, 1.0, False),
        ({0: 0.1, 1: 0.1, 3: 0.19, 4: 0.19}, 1.0, False),  # one result alone counts
        ({0: 0.1, 1: 0.1, 4: 0.21}, 1.5, False),
        ({0: 0.1, 1: 0.1, 4: 0.21}, 0.5, True),
        ({1: 0.1, 2: 0.9}, 1.0, False),  # the assistant's own turns are neither
        ({4: 0.1}, 1.0, True),
        ({}, 1.0, False),
    ],
)
def test_the_rule(scores: dict[int, float], ratio: float, flagged: bool) -> None:
    found = judge(scores, ratio=ratio)
    assert found["flagged"] is flagged
    assert ("reason" in found) is flagged
    assert found["trusted"] == pytest.approx(scores.get(0, 0) + scores.get(1, 0))
    assert [(each["message"], each["tool_call_id"]) for each in found["untrusted"]] == [
        (3, "c3"),
        (4, "c4"),
    ]
    assert found["untrusted"][1]["share"] == pytest.approx(scores.get(4, 0.0))


def test_the_reason_names_the_message() -> None:
    found = judge({1: 0.1, 4: 0.4})
    assert "message 4" in found["reason"] and "message 3" not in found["reason"]


def test_a_result_without_a_known_place_is_flagged() -> None:
    found = judge({1: 0.5}, unlocated=frozenset({3}))
    assert found["flagged"] and "where message 3" in found["reason"]
    assert [each["message"] for each in found["untrusted"]] == [4]
    assert not judge({1: 0.5}, unlocated=frozenset({2}))["flagged"]


def test_a_document_in_the_users_message_is_not_trusted() -> None:
    document = Source("d", "user", "document", key=(1, None), span=(0, 4))
    sources = [PromptSource(document, [(2, 0, 4)])]
    found = judge({0: 0.1, 1: 0.3}, sources=sources)
    assert found["flagged"] and found["untrusted"][-1]["source"] == "d"
    assert found["trusted"] == pytest.approx(0.1)
    assert judge({0: 0.1, 1: 0.3})["flagged"] is False
    tool = [PromptSource(Source("c3", "tool", "tool", key=(3, None)), [(6, 0, 4)])]
    assert len(judge({}, sources=tool)["untrusted"]) == 2
    lost = judge({0: 0.1}, sources=[PromptSource(document, None)])
    assert lost["flagged"] and "where a source lies" in lost["reason"]


def test_an_argument_of_a_model_that_is_traced_in_part_is_flagged() -> None:
    clean = judge({1: 0.5})
    found = traced_in_part(clean)
    assert found["flagged"] and "not traced" in found["reason"]
    assert {k: v for k, v in found.items() if k not in ("flagged", "reason")} == {
        k: v for k, v in clean.items() if k != "flagged"
    }
    both = traced_in_part(judge({1: 0.1, 4: 0.4}))
    assert "message 4" in both["reason"] and "not traced" in both["reason"]


def test_a_plain_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="needs chat messages"):
        require_messages(Completion((1,), (2,), "a", "b"))


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ({"guard": 1}, "flashtrace.guard"),
        ({"guard": {"ratio": 0}}, "flashtrace.guard.ratio"),
        ({"guard": {"ratio": True}}, "flashtrace.guard.ratio"),
        ({"guard": {"ratio": "2"}}, "flashtrace.guard.ratio"),
        ({"guard": {"ratios": 2}}, "flashtrace.guard.ratios"),
        ({"guard": True, "target": "output"}, "flashtrace.guard"),
        ({"guard": True, "targets": "sentences"}, "flashtrace.guard"),
    ],
)
def test_bad_values(field: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as error:
        parse_flashtrace_field(field, RequestLimits())
    assert error.value.param == param


def test_what_it_implies() -> None:
    request = parse_flashtrace_field({"guard": {"ratio": 2}}, RequestLimits())
    assert request is not None and request.guard is not None
    assert (request.targets, request.recurse_over, request.guard.ratio) == (
        *("claims", "assistant"),
        2.0,
    )
    own = parse_flashtrace_field({"guard": True, "recurse_over": "generated"}, RequestLimits())
    assert own is not None and own.recurse_over == "generated"
    off = parse_flashtrace_field({"guard": False}, RequestLimits())
    assert off is not None and off.guard is None and off.targets is None
