"""One thing to explain, as text and as tokens, and what a method says about it.

Everything that methods and metrics see of an example is in :class:`Prepared`. All of them rank the
same ``P`` tokens, those of the user's text, and never a token of the chat template. A method gives
one finite float64 score for each of them, or raises :class:`MethodFailed`; it never sees the gold
spans.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from vllm_flashtrace.text.plan import skip_mask
from vllm_flashtrace.text.sentences import sentence_spans

Span = tuple[int, int]
Values = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


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
    """

    id: str
    task: str
    length: int
    prompt: str
    reasoning: str
    output: str
    gold: tuple[Span, ...] = ()


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


class MethodFailed(RuntimeError):
    """A method could not explain an example; the message says why."""


@dataclass(frozen=True)
class Scores:
    """What a method says about one example.

    Attributes:
        values: ``[P]`` float64, by offset from the first user token.
        seconds: What it cost on its own, also when it was computed together with others.
        facts: Numbers beyond the scores, e.g. ``reasoning_mass`` or ``remaining_mass``.
    """

    values: Values
    seconds: float
    facts: Mapping[str, float] = field(default_factory=dict)


class Family:
    """Methods that share work on an example.

    Attributes:
        labels: Description of every method by its name, e.g. ``{"flashtrace-k1": "..."}``.
    """

    labels: ClassVar[Mapping[str, str]]

    def attribute(self, prepared: Prepared, names: Collection[str]) -> dict[str, Scores]:
        """Scores of these methods; one that fails alone is left out.

        Raises:
            MethodFailed: None of them can explain this example.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Lets go of what the family holds."""


_OWN = 1e-6
"""Share of a token's own score: enough to rank the tokens of one sentence."""


def by_sentence(values: Values, prepared: Prepared) -> Values:
    """``(1 - e) mean(sentence) + e values`` with a tiny ``e``.

    Args:
        values: ``[P]``.
        prepared: Whose ``sentences`` partition the ``P`` tokens.
    """
    found = _OWN * values
    for start, end in prepared.sentences:
        part = slice(start - prepared.user[0], end - prepared.user[0])
        found[part] += (1 - _OWN) * values[part].mean()
    return found


def stop_mask(prepared: Prepared) -> Mask:
    """``[P]``, the user's tokens on the reference package's list of stop tokens."""
    mask = skip_mask(prepared.texts[slice(*prepared.user)], (",", ".", " "))
    assert mask is not None
    return np.asarray(mask.numpy(), dtype=np.bool_)
