"""The generated text with the parts that the server's parsers find in it.

Invariant: the parsers run once per completion, and every part has its place in the same text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vllm_flashtrace.api.schema_options import ToolCallTarget
from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.base.records import Completion, Span
from vllm_flashtrace.text.generated import GeneratedText
from vllm_flashtrace.text.generated_calls import locate_calls, target_span
from vllm_flashtrace.text.parsed_output import OutputParser, ParsedOutput
from vllm_flashtrace.text.parsed_reasoning import (
    ReasoningBlock,
    hidden_tokens,
    reasoning_blocks,
)


@dataclass(frozen=True, slots=True)
class OutputParts:
    """A completion taken apart.

    Attributes:
        generated: The decoded generated tokens, and how many of them are hidden.
        parsed: What the server's parsers found; None where there are none.
        reasoning: Their reasoning; None where nothing located it.
    """

    generated: GeneratedText
    parsed: ParsedOutput | None = None
    reasoning: list[ReasoningBlock] | None = None

    def tool_call(self, target: ToolCallTarget) -> Span:
        """Characters of the visible text that are the call or the argument a target names.

        Raises:
            TraceError: ``tool_call_not_found`` or ``argument_not_found``.
        """
        if self.parsed is None:
            raise TraceError(
                "tool_call_not_found",
                f"flashtrace.target.tool_call {target.tool_call}: no tool call parser read this "
                "completion",
            )
        calls = self.parsed.tool_calls
        begin = self.reasoning[0].end if self.reasoning else 0
        located = locate_calls(self.generated.visible.text, begin, calls)
        return target_span(target, calls[: self.parsed.max_tool_calls], located)


def take_apart(
    generated: GeneratedText, completion: Completion, parser: OutputParser | None
) -> OutputParts:
    """Runs the server's parsers and locates what they found.

    Args:
        generated: The decoded generated tokens.
        completion: The completion they are of.
        parser: The server's parsers; None if it has none.
    """
    if parser is None:
        return OutputParts(generated)
    parsed = parser(completion.text, completion.generated_token_ids)
    blocks = reasoning_blocks(parsed, generated, completion)
    hidden = hidden_tokens(parsed, blocks, generated.visible, completion.generated_token_ids)
    return OutputParts(replace(generated, hidden=hidden), parsed, blocks)
