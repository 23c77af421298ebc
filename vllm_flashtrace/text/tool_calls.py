"""Tool calls: of earlier turns, as a template writes them, and generated, with their arguments.

Tool calls of earlier assistant turns, as a chat template writes them.

Invariant: a range given for a call holds its name and all its arguments.

Where the generated tool calls and their arguments stand in the generated text.

Invariant: the server's own parser decides which calls there are. A call is located only if reading
the text gives exactly its calls, in name, order and arguments, and only one place for each part;
otherwise a TraceError says what was not found.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
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


def tool_call_range(
    function: Mapping[str, Any],
    prompt: str,
    start: int,
    end: int,
    *,
    in_front: Span | None = None,
) -> Span | None:
    """Extends the range of a call's name and text arguments over its other arguments.

    Args:
        function: Name and arguments of the call.
        prompt: The decoded prompt, up to the next text of the client.
        start: Where the first of the call's texts begins.
        end: Where the last of them ends.
        in_front: Where the arguments lie if the template writes them in front of the name: between
            the last text before the call, and the name.

    Returns:
        None where numbers, lists or other values are written in a form that is not known.
    """
    if not has_other_values(function):
        return start, end
    arguments = function.get("arguments")
    for form in _forms(arguments, call_arguments(arguments)):
        if in_front is not None:
            at = prompt.rfind(form, *in_front)
            if at >= 0:
                return min(start, at), end
            continue
        at = prompt.find(form, start)
        # Arguments end behind the texts in them; a form that ends earlier is part of the name.
        while 0 <= at <= end - len(form):
            at = prompt.find(form, at + 1)
        if at >= 0:
            return start, at + len(form)
    return None


def has_other_values(function: Mapping[str, Any]) -> bool:
    """Whether a call has arguments that are not texts, or none that can be read."""
    arguments = function.get("arguments")
    values = call_arguments(arguments)
    is_opaque = not values and isinstance(arguments, str) and arguments.strip() not in ("", "{}")
    return is_opaque or not all(isinstance(value, str) for value in values.values())


def holds_arguments_of(function: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether a call's arguments, as written, may hold another one's."""
    arguments = other.get("arguments")
    wanted = list(_forms(arguments, call_arguments(arguments)))
    arguments = function.get("arguments")
    written = list(_forms(arguments, call_arguments(arguments)))
    return any(form in text for form in wanted for text in written)


def _forms(arguments: Any, values: Mapping[str, Any]) -> Iterator[str]:
    """Usual ways to write arguments: as sent, and as JSON with and without blanks."""
    if isinstance(arguments, str):
        yield arguments
    if values:
        for separators in (None, (",", ":")):
            yield json.dumps(values, ensure_ascii=False, separators=separators)


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
    parsed = [_decoded(call) for call in calls]
    read = [reader(text, begin) for reader in READERS]
    if len(calls) == 1:
        read.append(read_arguments(text, begin, calls[0].name))
    agreed = [written for written in read if written and _agree(written, calls, parsed)]
    if not agreed or any(_places(other) != _places(agreed[0]) for other in agreed[1:]):
        return None
    return agreed[0]


def target_span(
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


def _decoded(call: ParsedCall) -> Any:
    try:
        return json.loads(call.arguments)
    except (ValueError, RecursionError):
        return call.arguments


def _agree(
    written: Sequence[WrittenCall], calls: Sequence[ParsedCall], parsed: Sequence[Any]
) -> bool:
    return len(written) == len(calls) and all(
        ours.name == theirs.name
        and (_same(ours.arguments, arguments) or ours.arguments == theirs.arguments)
        for ours, theirs, arguments in zip(written, calls, parsed, strict=True)
    )


def _same(written: Any, parsed: Any) -> bool:
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


def _places(calls: Sequence[WrittenCall]) -> list[tuple[Span, dict[str, Span]]]:
    return [(call.span, call.values) for call in calls]
