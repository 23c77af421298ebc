"""Lengths of requests: presets of kinds of traffic, or a file of observed ones.

Presets are log-normal in each length, cut at the context limit. Their parameters are assumptions
about typical traffic, not measurements; a JSONL file with ``prompt``, ``reasoning`` and ``output``
token counts replaces them.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from math import exp, log
from pathlib import Path

MAX_CONTEXT = 131_072


@dataclass(frozen=True, slots=True)
class Lengths:
    """Token counts of one completion: its prompt, and its generated reasoning and output."""

    prompt: int
    reasoning: int
    output: int

    def __post_init__(self) -> None:
        if self.prompt < 1 or self.reasoning < 0 or self.output < 1:
            raise ValueError(f"not the lengths of a completion: {self}")

    @property
    def generated(self) -> int:
        """Reasoning and output."""
        return self.reasoning + self.output

    @property
    def context(self) -> int:
        """All tokens."""
        return self.prompt + self.generated


@dataclass(frozen=True, slots=True)
class LogNormal:
    """A length by its median and the standard deviation of its logarithm; a median of 0 is 0."""

    median: float
    sigma: float

    def draw(self, source: random.Random, smallest: int, largest: int) -> int:
        """One length."""
        if self.median == 0:
            return 0
        length = round(exp(source.gauss(log(self.median), self.sigma)))
        return max(smallest, min(largest, length))


@dataclass(frozen=True, slots=True)
class Traffic:
    """A kind of traffic whose lengths are drawn independently."""

    prompt: LogNormal
    reasoning: LogNormal
    output: LogNormal

    def draw(self, count: int, seed: object, max_context: int = MAX_CONTEXT) -> list[Lengths]:
        """So many requests; the prompt is cut last, and none is longer than ``max_context``."""
        source = random.Random(str(seed))
        drawn = []
        for _ in range(count):
            output = self.output.draw(source, 1, max_context // 4)
            reasoning = self.reasoning.draw(source, 1, max_context // 4)
            prompt = self.prompt.draw(source, 1, max_context - output - reasoning)
            drawn.append(Lengths(prompt, reasoning, output))
        return drawn


PRESETS = {
    "chat": Traffic(LogNormal(500, 1.0), LogNormal(0, 0), LogNormal(250, 0.8)),
    "reasoning": Traffic(LogNormal(300, 0.8), LogNormal(3000, 0.8), LogNormal(400, 0.6)),
    "agent": Traffic(LogNormal(12_000, 0.8), LogNormal(400, 0.8), LogNormal(150, 0.6)),
    "RAG": Traffic(LogNormal(6_000, 0.5), LogNormal(0, 0), LogNormal(250, 0.6)),
}


def read_lengths(path: Path) -> list[Lengths]:
    """Reads a JSONL file of ``{"prompt": n, "reasoning": n, "output": n}``.

    Raises:
        ValueError: A line is not that, naming the line; or there is none.
    """
    found = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
            found.append(Lengths(data["prompt"], data.get("reasoning", 0), data["output"]))
        except (ValueError, KeyError, TypeError, AttributeError) as problem:
            raise ValueError(f"{path}, line {number}: {problem!r}") from problem
    if not found:
        raise ValueError(f"{path} holds no lengths")
    return found
