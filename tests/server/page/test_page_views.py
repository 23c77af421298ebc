"""The page in a real browser: hops, scales, files to keep, and sizes of the window."""

from __future__ import annotations

import json

import pytest

from tests.server.page.browser import (
    ANSWER,
    HOSTILE,
    SHOWN,
    answer_pieces,
    ask,
    assert_clean,
    click,
    downloaded,
    drag,
    levels,
    set_field,
)
from vllm_flashtrace.api.attribution import Attribution


def test_hops_have_tabs(page, page_server):
    set_field(page, "hops", "2")
    ask(page)
    pieces = answer_pieces(page)
    drag(page, len(pieces) - 1, len(pieces) - 1)
    page.wait_for("document.querySelectorAll('[role=tab]').length === 4")
    tabs = "[...document.querySelectorAll('[role=tab]')]"
    assert json.loads(page.evaluate(f"JSON.stringify({tabs}.map(t => t.textContent))")) == [
        "All hops",
        "Hop 0",
        "Hop 1",
        "Hop 2",
    ]
    table = "document.querySelector('#report table').innerText"
    overall = page.evaluate(table)
    page.evaluate(f"{tabs}[1].click()")
    assert page.evaluate("document.querySelector('.headline').textContent").startswith(
        "Hop 0: where"
    )
    assert page.evaluate(table) != overall
    page.press("ArrowRight")
    assert page.evaluate("document.activeElement.textContent") == "Hop 1"
    selected = f"{tabs}.filter(t => t.ariaSelected === 'true' && t.tabIndex === 0).length"
    assert page.evaluate(selected) == 1
    page.press("Home")
    assert page.evaluate(table) == overall


def test_threshold_hides_the_weak_tokens(page, page_server):
    ask(page, "One two three four five six seven eight nine ten. Which code?")
    page.wait_for(SHOWN)
    counts = []
    for position in ("0", "50", "100"):
        set_field(page, "threshold", position)
        counts.append(len(levels(page)))
    assert counts[0] > counts[1] > counts[2] >= 1
    kept = page.evaluate("document.getElementById('kept').textContent")
    assert kept.startswith("from ")


def test_scales(page, page_server):
    ask(page, "One two three four five six seven eight nine ten. Which code?")
    page.wait_for(SHOWN)
    heat = {}
    for scale in ("linear", "root", "log"):
        set_field(page, "scale", scale)
        heat[scale] = sum(levels(page))
        assert max(levels(page)) == 8
    assert heat["linear"] < heat["root"] < heat["log"]


def test_colours_are_those_of_the_reports(page, page_server, tmp_path):
    ask(page, "One two three four five six seven eight nine ten. Which code?")
    page.wait_for(SHOWN)
    page.evaluate("document.getElementById('whole').click()")
    shown = json.loads(
        page.evaluate(
            "JSON.stringify([...document.querySelectorAll('.map .text mark')]"
            ".map(m => [m.textContent, m.className, getComputedStyle(m).backgroundColor]))"
        )
    )
    document = downloaded(page, tmp_path, "json")
    Attribution.from_response(json.loads(document.read_text())).to_html(tmp_path / "report.html")
    page.open(tmp_path / "report.html")
    reported = json.loads(
        page.evaluate(
            "JSON.stringify([...document.querySelector('.text').querySelectorAll('mark')]"
            ".map(m => [m.textContent, m.className, getComputedStyle(m).backgroundColor]))"
        )
    )
    assert shown
    assert shown == reported


def test_json_download(page, page_server, tmp_path):
    ask(page)
    pieces = answer_pieces(page)
    drag(page, 0, 0)
    page.wait_for(f"{SHOWN} && document.querySelector('.headline q').textContent === 'First'")
    read = Attribution.from_response(json.loads(downloaded(page, tmp_path, "json").read_text()))
    assert read.target == {"text": pieces[0], "tokens": [[0, 1]], "start": 0, "end": 5}
    assert read.text == ANSWER
    assert read.is_complete
    own = [score for score in read.scores if score.message == 0]
    assert "".join(score.token for score in own) == "Which code?"
    assert [own[0].start, own[-1].end] == [0, len("Which code?")]
    assert sum(s["score"] for s in read.segments) == pytest.approx(read.input_mass)


def test_html_download_is_a_silent_document(page, page_server, tmp_path):
    page_server.engine.answers = [HOSTILE]
    ask(page, f"Say {HOSTILE}")
    page.wait_for(SHOWN)
    document = downloaded(page, tmp_path, "html")
    assert_clean(page, page_server.url)
    page.open(document)
    for method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
        assert page.seen(method) == []
    assert len(page.seen("Network.requestWillBeSent")) == 1
    assert page.evaluate("window.hit") is None
    assert page.evaluate("document.querySelectorAll('script, img').length") == 0
    assert page.evaluate("document.querySelector('.map .text').textContent") == f"Say {HOSTILE}"
    assert page.evaluate("document.querySelector('.answer').textContent") == HOSTILE
    assert page.evaluate("document.querySelector('.bar > *').style.flexGrow") != ""


@pytest.mark.parametrize("width", [360, 820, 1280])
def test_nothing_runs_off_the_side(page, page_server, width):
    page.window(width, 800)
    page_server.engine.answers = ["word " * 20 + "x" * 120]
    ask(page, "y" * 300)
    page.wait_for(SHOWN)
    click(page, "settings")
    page.evaluate("document.getElementById('settings').open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_dark_mode(page, page_server):
    brightness = (
        "getComputedStyle(document.documentElement).backgroundColor"
        ".match(/\\d+/g).map(Number).reduce((a, b) => a + b)"
    )
    light = page.evaluate(brightness)
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    page.send("Emulation.setEmulatedMedia", features=dark)
    try:
        assert page.evaluate(brightness) < 200 < 600 < light
    finally:
        page.send("Emulation.setEmulatedMedia", features=[])
