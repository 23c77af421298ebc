"""vLLM's renderer and parsers as plain callables."""

from __future__ import annotations

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from vllm_flashtrace.server.rendering import make_render

on_the_apps_loop = pytest.mark.asyncio(loop_scope="module")

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "What is the code?"}]},
]


@on_the_apps_loop
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_generation_prompt": False},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {
            "tools": [{"type": "function", "function": {"name": "look", "parameters": {}}}],
            "tool_choice": "none",
        },
    ],
)
async def test_render_gives_the_text_of_the_prompt_the_engine_gets(app, options):
    request = ChatCompletionRequest(model="m", messages=MESSAGES, **options)
    handler = app.app.state.openai_serving_chat
    _, (engine_input,) = await handler.render_chat_request(request)
    text = make_render(handler, request)(request.messages)
    ids = app.engine.get_tokenizer().encode(text, add_special_tokens=False)
    assert ids == engine_input["prompt_token_ids"]
    assert request.messages == MESSAGES


@on_the_apps_loop
async def test_render_of_messages_that_the_template_rejects_is_none(app):
    template = "{{ raise_exception('no') }}"
    request = ChatCompletionRequest(model="m", messages=MESSAGES, chat_template=template)
    assert make_render(app.app.state.openai_serving_chat, request)(MESSAGES) is None
