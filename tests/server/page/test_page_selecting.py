"""The page in a real browser: asking, and selecting what is to be attributed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.server.page.browser import (
    ANSWER,
    DONE,
    SHOWN,
    answer_pieces,
    ask,
    assert_clean,
    click,
    drag,
    headline,
    levels,
    set_field,
)
from tests.server.page_server import PAGE_ON, served
from vllm_flashtrace.trace.wire import unseal


def test_answer_streams_and_is_attributed(page, page_server):
    ask(page, "Which code?")
    page.wait_for(SHOWN)
    assert "".join(answer_pieces(page)) == ANSWER
    assert headline(page) == ANSWER
    assert page.evaluate("document.querySelector('.map .text').textContent") == "Which code?"
    assert "100.0 % of the input" in page.evaluate("document.getElementById('kept').textContent")
    assert max(levels(page)) == 8
    assert_clean(page, page_server.url)


@pytest.mark.parametrize("occurrence", [0, 1])
def test_exactly_the_selected_tokens_are_attributed(page, page_server, occurrence):
    ask(page)
    pieces = answer_pieces(page)
    starts = [i for i in range(len(pieces) - 3) if "".join(pieces[i : i + 4]) == "4821"]
    assert len(starts) == 2
    first = starts[occurrence]
    before = len(page_server.engine.traces)
    drag(page, first, first + 3)
    page.wait_for(f"{SHOWN} && document.querySelector('.headline q').textContent === '4821'")
    new = page_server.engine.traces[before:]
    generated = page_server.engine.get_tokenizer().encode(ANSWER, add_special_tokens=False)
    prompt = page_server.engine.generations[-1].prompt["prompt_token_ids"]
    # The row in front of a token chose it, and a trace ends with the last row that it explains.
    assert new[0].prompt["prompt_token_ids"] == [*prompt, *generated[: first + 3]]
    spec = unseal(new[0].params.extra_args["flashtrace"])
    positions = np.frombuffer(spec.targets[0].positions, np.int32).tolist()
    assert positions == [len(prompt) + first + i for i in range(-1, 3)]
    marked = "[...document.querySelectorAll('.answer .t')].map((t, i) => [t, i])"
    chosen = page.evaluate(
        f"JSON.stringify({marked}.filter(([t]) => t.matches('.target')).map(([t, i]) => i))"
    )
    assert json.loads(chosen) == list(range(first, first + 4))
    assert_clean(page, page_server.url)


def test_selection_with_the_keyboard(page, page_server):
    ask(page)
    page.wait_for(SHOWN)
    pieces = answer_pieces(page)
    page.evaluate("document.querySelector('.answer').focus()")
    page.press("End")
    for _ in range(3):
        page.press("ArrowLeft", modifiers=8)
    wanted = "".join(pieces[-4:])
    assert wanted in page.evaluate("document.getElementById('live').textContent")
    page.press("Enter")
    page.wait_for(f"document.querySelector('.headline q').textContent !== {json.dumps(ANSWER)}")
    assert headline(page) == wanted.strip()


def test_selection_with_a_finger(page, page_server):
    page.send("Emulation.setTouchEmulationEnabled", enabled=True)
    try:
        ask(page)
        page.wait_for(SHOWN)
        assert page.evaluate("document.getElementById('explain').hidden")
        page.evaluate(
            "document.getSelection().selectAllChildren(document.querySelectorAll('.answer .t')[0])"
        )
        page.wait_for("!document.getElementById('explain').hidden")
        click(page, "explain")
        page.wait_for(f"{SHOWN} && document.querySelector('.headline q').textContent === 'First'")
    finally:
        page.send("Emulation.setTouchEmulationEnabled", enabled=False)


def test_selection_outside_the_answer_does_nothing(page, page_server):
    ask(page)
    page.wait_for(SHOWN)
    traces = len(page_server.engine.traces)
    box = json.loads(
        page.evaluate(
            "JSON.stringify(document.querySelector('.question .text').getBoundingClientRect())"
        )
    )
    page.mouse("Pressed", box["x"] + 1, box["y"] + 10)
    page.mouse("Moved", box["x"] + 80, box["y"] + 10)
    page.mouse("Released", box["x"] + 80, box["y"] + 10)
    assert page.evaluate("document.getSelection().toString()")
    assert page.evaluate(DONE)
    assert len(page_server.engine.traces) == traces


def test_second_question_carries_the_conversation(page, page_server):
    ask(page, "Which code?")
    page.wait_for(SHOWN)
    set_field(page, "system", "Be brief.")
    ask(page, "And again?")
    page.wait_for("document.querySelectorAll('.map h3').length === 4")
    roles = "[...document.querySelectorAll('.map h3 b')].map(b => b.textContent)"
    assert json.loads(page.evaluate(f"JSON.stringify({roles})")) == [
        "system",
        "user",
        "assistant",
        "user",
    ]
    texts = "[...document.querySelectorAll('.map .text')].map(t => t.textContent)"
    assert json.loads(page.evaluate(f"JSON.stringify({texts})")) == [
        "Be brief.",
        "Which code?",
        ANSWER,
        "And again?",
    ]


def test_reasoning_is_apart_and_followed(chromium, plugins, model_path):
    with served(model_path, PAGE_ON, "--reasoning-parser=minicpmv") as server:
        server.engine.answers = ["<think>\nI look it up: 4821.\n</think>\n\nIt is 4821."]
        chromium.window(1280, 900)
        chromium.visit(f"{server.url}/flashtrace")
        chromium.wait_for("document.getElementById('model').value === 'm'")
        ask(chromium)
        chromium.wait_for(SHOWN)
        thought = chromium.evaluate("document.querySelector('.thought').textContent")
        assert thought.strip() == "I look it up: 4821."
        assert "".join(answer_pieces(chromium)).strip() == "It is 4821."
        before = len(server.engine.traces)
        last = len(answer_pieces(chromium)) - 1
        drag(chromium, last, last)
        chromium.wait_for(f"{SHOWN} && document.querySelector('.headline q').textContent === '.'")
        followed = [unseal(trace.params.extra_args["flashtrace"]) for trace in server.engine.traces]
        # The second hop explains the same reasoning as for the whole answer, and nothing else.
        assert followed[before + 1].targets[0].positions == followed[1].targets[0].positions
