"""An agent's tool call on a real engine: the argument leads back to the message it came from."""

from __future__ import annotations

import math
from typing import Any

import pytest

from examples.agent_conversation import (
    CHAT_TEMPLATE,
    MESSAGES,
    RESTATED,
    SOURCE,
    VALUE,
    attribute,
    print_table,
    scores,
)
from tests.engine.harness import Engine
from vllm_flashtrace import FlashTrace

TURNS = {"recurse_over": "assistant", "include": ["segments", "hops"], "top_k": None}


@pytest.fixture(scope="module")
def ft(smollm2: Engine) -> FlashTrace:
    return FlashTrace(llm=smollm2.llm, chat_template=CHAT_TEMPLATE, tool_call_parser="hermes")


@pytest.fixture(scope="module")
def direct(ft: FlashTrace) -> dict[str, Any]:
    return attribute(ft, hops=0)


@pytest.fixture(scope="module")
def followed(ft: FlashTrace) -> dict[str, Any]:
    return attribute(ft, **TURNS)


def test_conversation_is_an_agents() -> None:
    roles = [message["role"] for message in MESSAGES]
    assert len(MESSAGES) >= 6
    assert roles.count("tool") == 3
    holders = [i for i, message in enumerate(MESSAGES) if VALUE in str(message)]
    assert holders == [SOURCE, RESTATED]
    assert (roles[SOURCE], roles[RESTATED]) == ("tool", "assistant")


def test_argument_comes_first_from_the_message_it_was_copied_from(direct: dict[str, Any]) -> None:
    print_table("Without a hop", direct)
    assert direct["target"]["text"] == VALUE
    found = scores(direct)
    assert max(found, key=found.__getitem__) == SOURCE
    # The turn that repeated it comes next among the messages.
    messages = {i: score for i, score in found.items() if isinstance(i, int) and i != SOURCE}
    assert max(messages, key=messages.__getitem__) == RESTATED


def test_hops_through_the_assistants_turns_raise_that_messages_share(
    direct: dict[str, Any], followed: dict[str, Any]
) -> None:
    print_table("With hops through the assistant's turns", followed)
    before, after = scores(direct), scores(followed)
    assert after[SOURCE] > 1.5 * before[SOURCE]
    assert max(after, key=after.__getitem__) == SOURCE
    assert after[RESTATED] == 0
    assert after[SOURCE] / followed["input_mass"] > before[SOURCE] / direct["input_mass"]


def test_the_assistants_turns_themselves_lead_back_to_that_message(
    followed: dict[str, Any],
) -> None:
    """The hop alone, in which nothing but earlier turns and the call before the argument count."""
    message_of = {entry["index"]: entry.get("message") for entry in followed["scores"]}
    hop: dict[int, float] = {}
    for index, score in enumerate(followed["hops"][1]["scores"]):
        message = message_of[index]
        if message is not None:
            hop[message] = hop.get(message, 0.0) + score
    assert max(hop, key=hop.__getitem__) == SOURCE


def test_masses_balance(followed: dict[str, Any]) -> None:
    parts = [followed[f"{part}_mass"] for part in ("input", "remaining", "target", "skipped")]
    assert math.fsum(parts) == pytest.approx(1, abs=1e-4)
    assert math.fsum(scores(followed).values()) == pytest.approx(followed["input_mass"])
    for hop in followed["hops"]:
        parts = [hop[f"{part}_mass"] for part in ("input", "reasoning", "target", "skipped")]
        assert math.fsum(parts) == pytest.approx(1, abs=1e-4)


def test_unknown_parser_is_refused(smollm2: Engine) -> None:
    with pytest.raises(ValueError, match="nonesuch"):
        FlashTrace(llm=smollm2.llm, tool_call_parser="nonesuch")


def test_without_a_parser_there_are_no_calls(smollm2: Engine) -> None:
    ft = FlashTrace(llm=smollm2.llm, chat_template=CHAT_TEMPLATE)
    data = attribute(ft)
    assert data["status"] == "failed"
    assert data["error"]["code"] == "tool_call_not_found"
