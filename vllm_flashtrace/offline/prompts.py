"""The forms in which a caller of the offline API may give a prompt.

Invariant: a prompt is a string, a list of token ids, or a list of chat messages; nothing else
passes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from vllm_flashtrace.base.records import Completion
from vllm_flashtrace.text.tool_calls import call_arguments

Messages = Sequence[Mapping[str, Any]]
Prompt = str | Sequence[int] | Messages


def is_chat(prompt: Any) -> TypeGuard[Messages]:
    """Whether ``prompt`` is a list of chat messages."""
    return _is_list_of(prompt, Mapping)


def is_token_ids(prompt: Any) -> TypeGuard[Sequence[int]]:
    """Whether ``prompt`` is a list of token ids."""
    return _is_list_of(prompt, int)


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One or several prompts as a list.

    Raises:
        TypeError: Something in it is not a prompt.
    """
    single = isinstance(prompts, str) or is_chat(prompts) or is_token_ids(prompts)
    several: list[Any] = [prompts] if single else list(prompts)
    for prompt in several:
        if not (isinstance(prompt, str) or is_chat(prompt) or is_token_ids(prompt)):
            raise TypeError(
                "a prompt is a string, a non-empty list of token ids, or a list of messages; "
                f"got {prompt!r:.80}"
            )
    return several


def engine_input(prompt: Prompt) -> dict[str, Any]:
    """A plain prompt in the form ``vllm.LLM.generate`` takes."""
    return {"prompt": prompt} if isinstance(prompt, str) else {"prompt_token_ids": list(prompt)}


def completions_of(output: Any, prompt: Prompt) -> list[Completion]:
    """The completions in a vLLM ``RequestOutput``, in the order of their index."""
    return [
        Completion(
            prompt_token_ids=list(output.prompt_token_ids),
            generated_token_ids=list(choice.token_ids),
            text=choice.text,
            prompt_text=prompt if isinstance(prompt, str) else None,
            messages=prompt if is_chat(prompt) else None,
        )
        for choice in sorted(output.outputs, key=lambda choice: choice.index)
    ]


def with_decoded_arguments(messages: Messages) -> list[dict[str, Any]]:
    """A copy of the messages in the form that chat templates take.

    Clients send the arguments of tool calls as JSON text, templates expect them as an object.
    """
    copied = [copy.deepcopy(dict(message)) for message in messages]
    for message in copied:
        for call in message.get("tool_calls") or ():
            function = call.get("function") if isinstance(call, Mapping) else None
            arguments = function.get("arguments") if isinstance(function, dict) else None
            if isinstance(function, dict) and isinstance(arguments, str):
                known = call_arguments(arguments)
                if known or arguments.strip() in ("", "{}"):
                    function["arguments"] = dict(known)
    return copied


def _is_list_of(value: Any, kind: type) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str | bytes)
        and len(value) > 0
        and all(isinstance(item, kind) and not isinstance(item, bool) for item in value)
    )
