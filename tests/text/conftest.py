"""Small tokenizers, and the chats that they tokenize."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from tests.text.small_tokenizers import make_byte_level, make_metaspace
from vllm_flashtrace.base.records import Completion


@pytest.fixture(scope="session")
def byte_level() -> PreTrainedTokenizerFast:
    return make_byte_level()


@pytest.fixture(scope="session")
def metaspace() -> PreTrainedTokenizerFast:
    return make_metaspace()


@pytest.fixture(scope="session")
def chat(byte_level) -> Callable[..., Completion]:
    """Builds the completion that answers a chat."""

    def build(messages, generated: str, *, text: str | None = None, eos: bool = True) -> Completion:
        prompt = byte_level.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        ids = byte_level.encode(generated, add_special_tokens=False)
        return Completion(
            prompt_token_ids=byte_level.encode(prompt, add_special_tokens=False),
            generated_token_ids=[*ids, byte_level.eos_token_id] if eos else ids,
            text=generated if text is None else text,
            messages=messages,
        )

    return build


@pytest.fixture(scope="session")
def render(byte_level):
    """Renders messages as the ``chat`` fixture does."""

    def run(messages):
        return byte_level.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )

    return run
