"""Whether the arguments of a tool call came from what a tool returned, not from who gave the task.

What the system and the user write is trusted; tool results and the request's other sources are
not. What the assistant wrote before is neither: it may repeat either of them. A text's share in an
argument is the sum of its tokens' scores, and an argument is flagged if the share of one untrusted
text is more than ``ratio`` times that of all trusted ones together. The documentation has the
measurements that the rule and its default were chosen by.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vllm_flashtrace.base.errors import InvalidRequestError
from vllm_flashtrace.base.records import Completion
from vllm_flashtrace.text.prompt_map import PromptMap
from vllm_flashtrace.text.sources import TOOL_ROLES, PromptSource

TRUSTED_ROLES = ("system", "developer", "user")


def require_messages(completion: Completion) -> None:
    """Refuses a prompt that does not say what the user wrote and what a tool returned.

    Raises:
        InvalidRequestError: The prompt is no chat.
    """
    if completion.messages is None:
        raise InvalidRequestError(
            "flashtrace.guard", "flashtrace.guard needs chat messages, got a plain prompt"
        )


def guarded_argument(
    tool_call: int,
    argument: str,
    ratio: float,
    prompt_map: PromptMap,
    messages: Sequence[Mapping[str, Any]],
    sources: Sequence[PromptSource] | None,
    scores: Sequence[float],
) -> dict[str, Any]:
    """What an argument owes to the trusted and to each untrusted text, and whether to flag it.

    An argument is also flagged where an untrusted text lies at a place of the prompt that is not
    known: nothing shows that the argument does not come from there.

    Args:
        tool_call: Index of the tool call.
        argument: Name of the argument.
        ratio: How many times the share of the trusted texts an untrusted one may have.
        prompt_map: The client's messages laid over the prompt.
        messages: The client's messages.
        sources: The request's sources, if it has any.
        scores: Score of each prompt token for this argument.
    """
    # Documents and marked texts may stand in the user's message, but the user did not write them.
    quoted = [source for source in sources or () if source.source.kind != "tool"]
    taken = {token for source in quoted for token, _, _ in source.tokens or ()}
    trusted: list[float] = []
    of_tool: dict[int, list[float]] = defaultdict(list)
    for token, (located, score) in enumerate(zip(prompt_map.tokens, scores, strict=True)):
        if located is None or token in taken:
            continue
        role = prompt_map.roles[located.message]
        if role in TRUSTED_ROLES:
            trusted.append(score)
        elif role in TOOL_ROLES:
            of_tool[located.message].append(score)
    untrusted: list[dict[str, Any]] = [
        {**_named(messages[message], message), "share": math.fsum(own)}
        for message, own in sorted(of_tool.items())
        if message not in prompt_map.unlocated
    ]
    untrusted += [
        {
            "source": source.source.id,
            "share": math.fsum(scores[token] for token, _, _ in source.tokens),
        }
        for source in quoted
        if source.tokens is not None
    ]
    trusted_share = math.fsum(trusted)
    reasons = list(_lost(prompt_map, quoted))
    worst = max(untrusted, key=lambda entry: entry["share"], default=None)
    if worst is not None and worst["share"] > ratio * trusted_share:
        reasons.append(
            f"{_place(worst)} has a share of {worst['share']:.3g}, more than {ratio:g} times that "
            f"of system and user together ({trusted_share:.3g})"
        )
    return {
        "tool_call": tool_call,
        "argument": argument,
        "trusted": trusted_share,
        "untrusted": untrusted,
        "flagged": bool(reasons),
        **({"reason": "; ".join(reasons)} if reasons else {}),
    }


def traced_in_part(judged: Mapping[str, Any]) -> dict[str, Any]:
    """The same argument, flagged: what reached it through layers that are not traced is unknown.

    Args:
        judged: What `guarded_argument` gives.
    """
    reason = "some of the model's layers are not traced, so nothing shows where it came from"
    reasons = [judged["reason"], reason] if judged["flagged"] else [reason]
    return {**judged, "flagged": True, "reason": "; ".join(reasons)}


def _named(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    names = {key: message.get(key) for key in ("tool_call_id", "name")}
    return {"message": index, **{k: v for k, v in names.items() if isinstance(v, str)}}


def _place(entry: Mapping[str, Any]) -> str:
    if "source" in entry:
        return "a source"
    return f"message {entry['message']}, a tool's result,"


def _lost(prompt_map: PromptMap, quoted: Sequence[PromptSource]) -> Iterator[str]:
    for message in sorted(prompt_map.unlocated):
        if prompt_map.roles[message] in TOOL_ROLES:
            yield f"the prompt does not show where message {message}, a tool's result, lies"
    if any(source.tokens is None for source in quoted):
        yield "the prompt does not show where a source lies"
