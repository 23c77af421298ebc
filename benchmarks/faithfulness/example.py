"""One thing to explain, as text and as tokens.

Invariant: everything that methods and metrics see of an example is in :class:`Prepared`; all of
them rank the same ``P`` tokens, those of the user's text, and never a token of the chat template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_flashtrace.text.result import sentence_spans

Span = tuple[int, int]


@dataclass(frozen=True)
class Example:
    """A prompt and a finished response; spans are half-open, in characters of ``prompt``.

    Attributes:
        id: Unique within a run.
        task: Name of the task it belongs to.
        length: Nominal context length in tokens; 0 where the text was given.
        prompt: The user's message.
        reasoning: The chain of thought, as it stands before the output.
        output: The answer; what is explained.
        gold: Where in the prompt the answer comes from; empty when not known.
        generated: Whether the response is the explained model's own.
    """

    id: str
    task: str
    length: int
    prompt: str
    reasoning: str
    output: str
    gold: tuple[Span, ...] = ()
    generated: bool = False


@dataclass(frozen=True)
class Prepared:
    """An example in tokens; ranges are half-open positions in ``token_ids``.

    Attributes:
        example: Where it came from.
        token_ids: Chat template, user's text, template, reasoning, output; nothing after it.
        texts: Text of each token.
        user: The ``P`` tokens of the user's text.
        prompt_length: Tokens before the response.
        reasoning: Tokens of the chain of thought; may be empty.
        target: Tokens of the output.
        gold: Which of the ``P`` tokens overlap a gold span, by offset from ``user[0]``.
        sentences: Ranges of the user's sentences; they partition ``user``.
        reasoning_sentences: Ranges of the sentences of the chain of thought.
    """

    example: Example
    token_ids: tuple[int, ...]
    texts: tuple[str, ...]
    user: Span
    prompt_length: int
    reasoning: Span
    target: Span
    gold: frozenset[int]
    sentences: tuple[Span, ...]
    reasoning_sentences: tuple[Span, ...]

    @property
    def num_user_tokens(self) -> int:
        """``P``, the number of tokens that are ranked."""
        return self.user[1] - self.user[0]

    @property
    def response_length(self) -> int:
        """Tokens of reasoning and output together."""
        return len(self.token_ids) - self.prompt_length


def prepare(example: Example, tokenizer: Any) -> Prepared:
    """Renders an example in the model's chat template and finds its parts.

    The prompt, the reasoning and the output are tokenised apart, as a server that generated the
    response would have seen them.

    Args:
        example: What to explain.
        tokenizer: A fast Hugging Face tokenizer with a chat template.

    Raises:
        ValueError: A part is empty in tokens, or the template changes the user's text.
    """
    messages = [{"role": "user", "content": example.prompt}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    at = rendered.rfind(example.prompt)
    if at < 0:
        raise ValueError(f"{example.id}: the chat template changes the user's text")
    encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    offsets = [(start - at, end - at) for start, end in encoded["offset_mapping"]]
    inside = [
        i for i, (start, end) in enumerate(offsets) if start >= 0 and end <= len(example.prompt)
    ]
    inside = [i for i in inside if offsets[i][0] < offsets[i][1]]
    if not inside:
        raise ValueError(f"{example.id}: the user's text has no tokens")
    user = (inside[0], inside[-1] + 1)

    def parts(text: str, first: int) -> tuple[list[int], list[Span], Span]:
        part = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = list(part["input_ids"])
        return ids, list(part["offset_mapping"]), (first, first + len(ids))

    prompt_ids = list(encoded["input_ids"])
    thought, thought_offsets, reasoning = parts(example.reasoning, len(prompt_ids))
    answer, _, target = parts(example.output, reasoning[1])
    if not answer:
        raise ValueError(f"{example.id}: the output has no tokens")
    ids = prompt_ids + thought + answer
    return Prepared(
        example=example,
        token_ids=tuple(ids),
        texts=tuple(tokenizer.decode([token]) for token in ids),
        user=user,
        prompt_length=len(prompt_ids),
        reasoning=reasoning,
        target=target,
        gold=frozenset(
            i - user[0]
            for i in range(*user)
            if any(offsets[i][0] < end and start < offsets[i][1] for start, end in example.gold)
        ),
        sentences=_ranges(example.prompt, offsets[user[0] : user[1]], user[0]),
        reasoning_sentences=_ranges(example.reasoning, thought_offsets, reasoning[0]),
    )


def _ranges(text: str, offsets: Sequence[Span], first: int) -> tuple[Span, ...]:
    """Token ranges of the sentences of ``text``: a token belongs where its first letter is."""
    starts = [a if text[a:b].isspace() else b - len(text[a:b].lstrip()) for a, b in offsets]
    ends = [end for _, end in sentence_spans(text)]
    ranges: list[Span] = []
    start = 0
    for end in ends:
        stop = start
        while stop < len(starts) and starts[stop] < end:
            stop += 1
        if stop > start:
            ranges.append((first + start, first + stop))
            start = stop
    if start < len(offsets):
        ranges.append((first + start, first + len(offsets)))
    return tuple(ranges)
