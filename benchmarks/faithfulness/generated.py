"""The explained model's own responses, where they hold the answer.

Invariant: a response is only cut in two, never changed: reasoning up to the last occurrence of the
answer, then the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from benchmarks.faithfulness.example import Example

MAX_TOKENS = 160
Generate = Callable[[Sequence[str]], list[str]]


def split_response(example: Example, response: str) -> Example | None:
    """The example with the model's response instead of the written one; None without the answer.

    The blank before the answer goes with it, as in tokens.
    """
    answer = example.output.strip()
    start = response.rfind(answer)
    if not answer or start < 0:
        return None
    end = start + len(answer)
    if start and response[start - 1] == " ":
        start -= 1
    return replace(
        example,
        id=f"{example.id}/generated",
        task=f"{example.task}-generated",
        reasoning=response[:start],
        output=response[start:end],
        generated=True,
    )


def engine_generate(llm: object, max_tokens: int = MAX_TOKENS) -> Generate:
    """Greedy answers of a ``vllm.LLM`` to prompts in its chat template."""

    def generate(prompts: Sequence[str]) -> list[str]:
        from vllm import SamplingParams

        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        outputs = llm.chat(chats, params, use_tqdm=False)  # type: ignore[attr-defined]
        return [output.outputs[0].text for output in outputs]

    return generate
