"""The assistant's last message of a conversation, as the text that the model generated.

Invariant: what the client gives as reasoning and tool calls is what the text is taken apart into,
and a text that does not show it unmistakably is refused with HTTP 400, never approximated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm_flashtrace.base.errors import InvalidRequestError
from vllm_flashtrace.text.generated_calls import locate_calls
from vllm_flashtrace.text.parsed_output import OutputParser, ParsedCall, ParsedOutput

_PROBE = "The answer ends here."

Render = Callable[[Sequence[Mapping[str, Any]]], str | None]


@dataclass(frozen=True, slots=True)
class Answer:
    """The parts of the assistant's message.

    Attributes:
        where: The message's path in the request body.
        content: Its content, empty if there are tool calls only.
        reasoning: Its reasoning, if given.
        tool_calls: Its tool calls.
    """

    where: str
    content: str
    reasoning: str | None
    tool_calls: tuple[ParsedCall, ...]


def read_answer(messages: Sequence[Mapping[str, Any]]) -> Answer:
    """Reads the last message.

    Raises:
        InvalidRequestError: It is not the assistant's, or a part of it is missing or malformed.
    """
    index = len(messages) - 1
    last = messages[index]
    where = f"messages.{index}"
    if last.get("role") != "assistant":
        raise InvalidRequestError(
            f"{where}.role",
            f"{where}.role must be 'assistant', the answer to attribute; got {last.get('role')!r}",
        )
    tool_calls = _tool_calls(last.get("tool_calls"), where)
    content = last.get("content")
    if tool_calls and content is None:
        content = ""
    if not isinstance(content, str) or not (content or tool_calls):
        raise InvalidRequestError(
            f"{where}.content", f"{where}.content must be non-empty text, got {content!r}"
        )
    reasoning = last.get("reasoning_content") or last.get("reasoning")
    if reasoning is not None and not isinstance(reasoning, str):
        raise InvalidRequestError(
            f"{where}.reasoning_content",
            f"{where}.reasoning_content must be text, got {reasoning!r}",
        )
    return Answer(where, content, reasoning, tool_calls)


def text_with_calls(
    answer: Answer,
    messages: Sequence[Mapping[str, Any]],
    prompt: str | None,
    render: Render,
    opening: str,
) -> tuple[str, int]:
    """The generated text of an answer with tool calls: what the chat template makes of it.

    Args:
        answer: The last message.
        messages: All messages.
        prompt: The rendered prompt that the answer follows; None if it has no text form.
        render: Renders messages without the opening of a further turn.
        opening: The text that opens reasoning.

    Returns:
        The text, and where its reasoning begins (0 without reasoning).

    Raises:
        InvalidRequestError: The template does not write the calls, or writes them in a way that
            does not show where the answer begins and ends and which call is where.
    """
    whole = render(messages) if prompt is not None else None
    closing = _closing(messages, render) if whole is not None else None
    if prompt is None or whole is None or closing is None or not whole.startswith(prompt):
        raise _uncertain(answer, "the chat template does not show where the answer begins")
    text = whole.removeprefix(prompt)
    if not text.endswith(closing):
        raise _uncertain(answer, "the chat template does not show where the answer ends")
    text = text.removesuffix(closing)
    start, end = 0, 0
    if answer.reasoning is not None:
        opened = len(text) - len(text.lstrip())
        opened += len(opening) if text.startswith(opening, opened) else 0
        start = text.find(answer.reasoning.strip(), opened)
        if start < 0:
            raise InvalidRequestError(
                f"{answer.where}.reasoning_content",
                f"{answer.where}.reasoning_content: the chat template does not write it beside "
                "tool calls",
            )
        end = start + len(answer.reasoning.strip())
    if answer.content.strip() not in text[end:]:
        raise _uncertain(answer, "the chat template does not write the content beside them")
    if locate_calls(text, end, answer.tool_calls) is None:
        raise _uncertain(answer, "the text that the chat template makes does not show them")
    return text, start


def given_parser(
    answer: Answer, reasoning_from: int, server_parser: OutputParser | None
) -> OutputParser | None:
    """A parser that answers with what the client gave, and asks the server's for the rest.

    Args:
        answer: The client's answer.
        reasoning_from: Where its reasoning begins in the text.
        server_parser: The server's parser, if it has one.
    """
    if answer.reasoning is None and not answer.tool_calls:
        return server_parser

    def parse(text: str, token_ids: Sequence[int]) -> ParsedOutput:
        parsed = ParsedOutput(reads_reasoning=False)
        if server_parser is not None:
            parsed = server_parser(text, token_ids)
        if answer.reasoning is not None:
            parsed = replace(
                parsed,
                reasoning=answer.reasoning.strip(),
                reads_reasoning=True,
                reasoning_from=reasoning_from,
            )
        if answer.tool_calls:
            parsed = replace(parsed, tool_calls=answer.tool_calls)
        return parsed

    return parse


def _tool_calls(value: Any, where: str) -> tuple[ParsedCall, ...]:
    if not value:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise InvalidRequestError(
            f"{where}.tool_calls", f"{where}.tool_calls must be a list, got {value!r:.80}"
        )
    return tuple(_tool_call(call, f"{where}.tool_calls.{i}") for i, call in enumerate(value))


def _tool_call(call: Any, where: str) -> ParsedCall:
    function = call.get("function") if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise InvalidRequestError(
            f"{where}.function.name",
            f"{where}.function.name must be non-empty text, got {name!r:.80}",
        )
    try:
        decoded = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        decoded = None
    if not isinstance(decoded, Mapping):
        raise InvalidRequestError(
            f"{where}.function.arguments",
            f"{where}.function.arguments must be the JSON text of an object, got {arguments!r:.80}",
        )
    return ParsedCall(name, json.dumps(decoded, ensure_ascii=False))


def _closing(messages: Sequence[Mapping[str, Any]], render: Render) -> str | None:
    """What the template writes behind an assistant's message; None if it cannot be told."""
    rendered = render([*messages[:-1], {"role": "assistant", "content": _PROBE}])
    at = -1 if rendered is None else rendered.rfind(_PROBE)
    return None if rendered is None or at < 0 else rendered[at + len(_PROBE) :]


def _uncertain(answer: Answer, reason: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{answer.where}.tool_calls",
        f"{answer.where}.tool_calls: {reason}; give the generated text as content",
    )
