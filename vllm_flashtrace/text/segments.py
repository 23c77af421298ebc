"""Shares of the messages in the input mass.

Invariant: the scores of all segments add up to the input mass, the template's share stands last,
and a message that could not be located has no score of its own rather than a wrong one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_flashtrace.text.prompt_map import PromptMap

_NAMES = ("name", "tool_call_id")


def segments(
    prompt_map: PromptMap, messages: Sequence[Mapping[str, Any]] | None, scores: Sequence[float]
) -> list[dict[str, Any]]:
    """One entry per message with its role, names and score, and one for the rest.

    An assistant message with tool calls also has ``tool_calls``: which part of its score belongs to
    each of them. The rest is the template, unless there are messages that could not be located:
    then the rest names them.

    Args:
        prompt_map: The client's messages laid over the prompt.
        messages: The client's messages, None for a plain prompt.
        scores: Score of each prompt token.
    """
    of_message: dict[int, list[float]] = defaultdict(list)
    of_call: dict[tuple[int, int], list[float]] = defaultdict(list)
    rest: list[float] = []
    for located, score in zip(prompt_map.tokens, scores, strict=True):
        if located is None or located.message in prompt_map.unlocated:
            rest.append(score)
            continue
        of_message[located.message].append(score)
        if located.tool_call is not None:
            of_call[located.message, located.tool_call].append(score)
    entries: list[dict[str, Any]] = []
    for i, role in enumerate(prompt_map.roles):
        if i in prompt_map.unlocated:
            continue
        message = messages[i] if messages is not None else {}
        names = {key: message[key] for key in _NAMES if isinstance(message.get(key), str)}
        entries.append({"message": i, "role": role, **names, "score": math.fsum(of_message[i])})
        calls = message.get("tool_calls")
        if calls and isinstance(calls, Sequence):
            entries[-1]["tool_calls"] = [
                {"tool_call": n, **_call_names(call), "score": math.fsum(of_call[i, n])}
                for n, call in enumerate(calls)
            ]
    last: dict[str, Any] = {"role": "template", "score": math.fsum(rest)}
    if prompt_map.unlocated:
        last |= {"role": "unlocated", "unlocated_messages": sorted(prompt_map.unlocated)}
    elif not prompt_map.roles:
        last["role"] = "prompt"
    return [*entries, last]


def _call_names(call: Any) -> dict[str, str]:
    """Id and function name of a tool call, as far as the client gave them."""
    if not isinstance(call, Mapping):
        return {}
    function = call.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    names = {"id": call.get("id"), "name": name}
    return {key: value for key, value in names.items() if isinstance(value, str)}
