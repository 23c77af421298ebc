"""What the server's output parsers made of one completion.

Invariant: nothing here says where in the text a part lies. The parsers answer with strings, and
finding these among the tokens is for the modules that read this record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """One generated tool call as the client gets it.

    Attributes:
        name: Name of the function.
        arguments: Its arguments, JSON text.
    """

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ParsedOutput:
    """A completion taken apart.

    Attributes:
        reasoning: The reasoning; None or empty if there is none.
        content: The answer without reasoning and tool calls.
        tool_calls: The tool calls, in the order that the client gets them.
        max_tool_calls: How many of them the client gets; None for all.
        reads_reasoning: Whether a reasoning parser looked, so that no reasoning means none.
        reasoning_from: First character of the text at which the reasoning may begin.
        markers: Token ids that open and close reasoning, if each is a token of its own.
        hides_reasoning: Whether the client gets the answer without the reasoning.
    """

    reasoning: str | None = None
    content: str | None = None
    tool_calls: tuple[ParsedCall, ...] = ()
    max_tool_calls: int | None = None
    reads_reasoning: bool = True
    reasoning_from: int = 0
    markers: tuple[int, int] | None = None
    hides_reasoning: bool = False


class OutputParser(Protocol):
    """The server's reasoning and tool call parsers for one prompt."""

    def __call__(self, text: str, token_ids: Sequence[int], /) -> ParsedOutput:
        """Takes a finished completion apart, given its text and its generated token ids."""
