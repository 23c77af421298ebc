"""The demo's prompt: one fact hidden in repetitive filler, and a question about it.

Invariant: the fact occurs exactly once, and its character span in the user's message is exact.
The filler is the one of the RULER benchmark's needle-in-a-haystack tasks (arXiv 2404.06654).
"""

from __future__ import annotations

from dataclasses import dataclass

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
FACT = "The secret access code for the Lisbon office is 7306."
ANSWER = "7306"
QUESTION = "What is the secret access code for the Lisbon office? Answer with the code."


@dataclass(frozen=True, slots=True)
class Scenario:
    """A conversation with a known source of its answer.

    Attributes:
        messages: OpenAI chat messages.
        fact_start: First character of the fact in the last message.
        fact_end: One past its last character.
        answer: What a correct completion contains.
    """

    messages: list[dict[str, str]]
    fact_start: int
    fact_end: int
    answer: str = ANSWER

    @property
    def fact(self) -> str:
        """The sentence that holds the answer."""
        return self.messages[-1]["content"][self.fact_start : self.fact_end]


def build_scenario(repeats: int = 20, depth: float = 0.5) -> Scenario:
    """Hides the fact in filler.

    Args:
        repeats: How often the filler occurs; 20 make about 500 tokens.
        depth: Where the fact goes, 0 before all filler, 1 after it.

    Raises:
        ValueError: ``repeats`` is negative or ``depth`` is outside ``[0, 1]``.
    """
    if repeats < 0 or not 0.0 <= depth <= 1.0:
        raise ValueError(f"need repeats >= 0 and 0 <= depth <= 1, got {repeats} and {depth}")
    before = round(repeats * depth)
    sentences = [FILLER] * before + [FACT] + [FILLER] * (repeats - before)
    content = " ".join(sentences) + "\n\n" + QUESTION
    start = content.index(FACT)
    return Scenario([{"role": "user", "content": content}], start, start + len(FACT))
