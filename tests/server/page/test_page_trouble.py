"""The page in a real browser: hostile text, refusals, faults and the API key."""

from __future__ import annotations

import json

import pytest
import torch

from tests.server.page.browser import (
    ANSWER,
    HOSTILE,
    PROBLEM,
    SHOWN,
    answer_pieces,
    ask,
    assert_clean,
    click,
    headline,
    rising,
    set_field,
)
from tests.server.page_server import PAGE_ON, served


def test_hostile_text_stays_text(page, page_server):
    page_server.engine.answers = [HOSTILE]
    scripts = page.evaluate("document.querySelectorAll('script').length")
    ask(page, f"Say {HOSTILE}")
    page.wait_for(SHOWN)
    assert "".join(answer_pieces(page)) == HOSTILE
    assert page.evaluate("document.querySelector('.map .text').textContent") == f"Say {HOSTILE}"
    assert page.evaluate("document.querySelectorAll('script').length") == scripts
    assert page.evaluate("document.querySelectorAll('img').length") == 0
    assert page.evaluate("window.hit") is None
    assert_clean(page, page_server.url)


def test_the_browser_refuses_to_parse_text_as_html(page, page_server):
    with pytest.raises(AssertionError, match="TrustedHTML"):
        page.evaluate("document.body.innerHTML = '<img src=x>'")


def test_refusal_of_the_server_is_shown(page, page_server):
    set_field(page, "tokens", "100000")
    ask(page)
    page.wait_for("!document.getElementById('problem').hidden")
    assert "100000" in page.evaluate(PROBLEM)
    assert page.evaluate("document.getElementById('question').value") == "Which code?"
    assert page.evaluate("document.querySelectorAll('.turn').length") == 0
    click(page, "problem-close")
    assert page.evaluate("document.getElementById('problem').hidden")


def test_failed_trace_is_shown_and_the_answer_can_still_be_selected(page, page_server):
    page_server.engine.trace_scores = lambda length: torch.full((length,), float("nan"))
    ask(page)
    page.wait_for("!document.getElementById('problem').hidden")
    assert "No attribution of the whole answer" in page.evaluate(PROBLEM)
    assert page.evaluate("document.querySelector('.answer').textContent") == ANSWER
    page_server.engine.trace_scores = rising
    box = json.loads(
        page.evaluate("JSON.stringify(document.querySelector('.answer').getBoundingClientRect())")
    )
    for kind, x in (("Pressed", 0), ("Moved", 300), ("Released", 300)):
        page.mouse(kind, box["x"] + x, box["y"] + 12)
    selected = page.evaluate("document.getSelection().toString()")
    page.wait_for(SHOWN)
    assert selected
    assert ANSWER.startswith(selected)
    assert headline(page).startswith(selected.strip())
    assert page.evaluate("document.getElementById('problem').hidden")


def test_engine_that_fails_in_the_middle_is_shown(page, page_server):
    page_server.engine.fail_after = 3
    ask(page)
    page.wait_for("!document.getElementById('problem').hidden")
    assert page.evaluate(PROBLEM)
    text = page.evaluate("document.querySelector('.answer').textContent")
    assert text
    assert ANSWER.startswith(text)
    assert page.evaluate("document.getElementById('shown').hidden")


def test_server_that_cannot_be_reached_is_shown(page, page_server):
    page.send(
        "Network.emulateNetworkConditions",
        offline=True,
        latency=0,
        downloadThroughput=-1,
        uploadThroughput=-1,
    )
    try:
        ask(page)
        page.wait_for("!document.getElementById('problem').hidden")
        assert "cannot be reached" in page.evaluate(PROBLEM)
        assert page.evaluate("document.getElementById('question').value") == "Which code?"
    finally:
        page.send(
            "Network.emulateNetworkConditions",
            offline=False,
            latency=0,
            downloadThroughput=-1,
            uploadThroughput=-1,
        )


def test_stopped_answer_keeps_its_text(page, page_server):
    async def stay(step: int) -> None:
        if step == 3:
            await page_server.engine.trace_gate.wait()

    page_server.engine.before_step = stay
    page_server.loop.call_soon_threadsafe(page_server.engine.trace_gate.clear)
    set_field(page, "question", "Which code?")
    click(page, "send")
    page.wait_for("document.querySelector('.answer')?.textContent.length > 3")
    click(page, "stop")
    page.wait_for("!document.getElementById('send').hidden")
    text = page.evaluate("document.querySelector('.answer').textContent")
    assert ANSWER.startswith(text)
    assert (
        page.evaluate("[...document.querySelectorAll('.turn .soft')].at(-1).textContent")
        == "Stopped."
    )
    page_server.loop.call_soon_threadsafe(page_server.engine.trace_gate.set)


def test_key_is_asked_for_and_kept_in_memory_only(chromium, plugins, model_path):
    with served(model_path, PAGE_ON, "--api-key=secret") as server:
        server.engine.answers = [ANSWER]
        chromium.window(1280, 900)
        chromium.visit(f"{server.url}/flashtrace")
        chromium.wait_for("!document.getElementById('problem').hidden")
        assert "API key" in chromium.evaluate(PROBLEM)
        assert chromium.evaluate("document.activeElement.id") == "key"
        set_field(chromium, "key", "secret", event="change")
        chromium.wait_for("document.getElementById('model').value === 'm'")
        ask(chromium)
        chromium.wait_for(SHOWN)
        stored = "[localStorage.length, sessionStorage.length, document.cookie, location.search]"
        assert json.loads(chromium.evaluate(f"JSON.stringify({stored})")) == [0, 0, "", ""]
        chromium.visit(f"{server.url}/flashtrace")
        chromium.wait_for("!document.getElementById('problem').hidden")
        assert chromium.evaluate("document.getElementById('key').value") == ""
