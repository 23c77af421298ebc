"""Where the generated tool calls and their arguments stand in the generated text.

The server's own parser decides which calls there are. A call is located only if reading the text
gives exactly the parser's calls, in name, order and arguments, and one place for each part.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_flashtrace.api.checks import shown
from vllm_flashtrace.api.request import ToolCallTarget
from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.base.records import Span
from vllm_flashtrace.text.call_formats import READERS, WrittenCall, read_arguments
from vllm_flashtrace.text.generated import ParsedCall


def call_arguments(arguments: Any) -> Mapping[str, Any]:
    """Arguments of a tool call, which clients send as JSON text."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return {}
    return arguments if isinstance(arguments, Mapping) else {}


def locate_calls(text: str, begin: int, calls: Sequence[ParsedCall]) -> list[WrittenCall] | None:
    """Finds the calls that the server's parser found.

    Args:
        text: The generated text.
        begin: Where its reasoning ends.
        calls: The parser's calls.

    Returns:
        One entry per call, or None where no form of writing calls gives these, or two forms give
        them at different places.
    """
    if not calls:
        return None
    parsed = [_parsed_arguments(call) for call in calls]
    read = [reader(text, begin) for reader in READERS]
    if len(calls) == 1:
        read.append(read_arguments(text, begin, calls[0].name))
    agreed = [written for written in read if written and _same_calls(written, calls, parsed)]
    if not agreed or any(_spans(other) != _spans(agreed[0]) for other in agreed[1:]):
        return None
    return agreed[0]


def call_target_span(
    target: ToolCallTarget, calls: Sequence[ParsedCall], located: Sequence[WrittenCall] | None
) -> Span:
    """The characters of the call or argument that a target names.

    Args:
        target: Index of the call, and name of the argument if not the whole call is meant.
        calls: The calls that the client gets.
        located: At least these calls in the text, in the same order.

    Raises:
        TraceError: ``tool_call_not_found`` or ``argument_not_found``.
    """
    index, name = target.tool_call, target.argument
    if index >= len(calls):
        found = {0: "no tool call", 1: "1 tool call"}.get(len(calls), f"{len(calls)} tool calls")
        raise TraceError(
            "tool_call_not_found",
            f"flashtrace.target.tool_call {index}: the completion has {found}",
        )
    which = f"tool call {index} ({shown(calls[index].name)})"
    if located is None:
        raise TraceError(
            "tool_call_not_found",
            f"flashtrace.target.tool_call {index}: the generated text does not show where {which} "
            "was written",
        )
    call = located[index]
    if name is None:
        return call.span
    if name not in call.values:
        known = ", ".join(shown(key) for key in list(call.values)[:20]) or "none"
        raise TraceError(
            "argument_not_found",
            f"flashtrace.target.argument {shown(name)}: {which} has these arguments: {known}",
        )
    start, end = call.values[name]
    if start == end:
        raise TraceError(
            "argument_not_found",
            f"flashtrace.target.argument {shown(name)}: it is empty in {which}",
        )
    return start, end


def _parsed_arguments(call: ParsedCall) -> Any:
    try:
        return json.loads(call.arguments)
    except (ValueError, RecursionError):
        return call.arguments


def _same_calls(
    written: Sequence[WrittenCall], calls: Sequence[ParsedCall], parsed: Sequence[Any]
) -> bool:
    return len(written) == len(calls) and all(
        ours.name == theirs.name
        and (_same_arguments(ours.arguments, arguments) or ours.arguments == theirs.arguments)
        for ours, theirs, arguments in zip(written, calls, parsed, strict=True)
    )


def _same_arguments(written: Any, parsed: Any) -> bool:
    """Whether two sets of arguments are equal, in types too, but for what a schema may change."""
    if isinstance(written, dict) and isinstance(parsed, dict):
        return list(written) == list(parsed) and all(
            _equal(written[key], parsed[key]) or _means(written[key], parsed[key])
            for key in written
        )
    return _equal(written, parsed)


def _equal(first: Any, second: Any) -> bool:
    # As JSON text, since True == 1 == 1.0 in Python.
    try:
        return json.dumps(first) == json.dumps(second)
    except (TypeError, ValueError, RecursionError):
        return False


def _means(written: Any, parsed: Any) -> bool:
    """Whether a parser that knows the tool's schema may have read `written` as `parsed`."""
    if not isinstance(written, str):
        return isinstance(parsed, str) and _is_json_of(parsed, written)
    text = written.strip().lower()
    if parsed is None or isinstance(parsed, bool):
        return text in {None: ("null",), True: ("true", "1"), False: ("false", "0")}[parsed]
    if isinstance(parsed, int | float):
        try:
            return float(written) == parsed
        except ValueError:
            return False
    return not isinstance(parsed, str) and _is_json_of(written, parsed)


def _is_json_of(text: str, value: Any) -> bool:
    try:
        return _equal(json.loads(text), value)
    except (ValueError, RecursionError):
        return False


def _spans(calls: Sequence[WrittenCall]) -> list[tuple[Span, dict[str, Span]]]:
    return [(call.span, call.values) for call in calls]
