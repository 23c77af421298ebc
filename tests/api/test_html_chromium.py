"""The page in a real browser: what a reader sees, and that nothing leaves the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.chromium import Chromium
from tests.api.samples import haystack, sample
from vllm_flashtrace.api.attribution import Attribution

EXECUTABLE = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="there is no chromium to test pages in")

HOSTILE = [
    ("<script>window.hit = 1</script>", 0.6),
    ("<img src=//x.invalid/a.png onerror='window.hit=2'>", 0.2),
    ('"><svg onload=window.hit=3>', 0.4),
    ("</div></style><style>body{display:none}</style>", 0.1),
    ("  two\n\n\tlines  ", 0.2),
    ("{{ 7 * 7 }} &amp;", 0.1),
    ("\u202e7306", 1.0),
]
HOTTEST = "[...document.querySelectorAll('mark')].find(m => m.textContent === '7306')"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    assert EXECUTABLE is not None
    browser = Chromium(EXECUTABLE, tmp_path_factory.mktemp("profile"))
    browser.window(1000, 900)
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def attribution() -> Attribution:
    return sample(haystack(), text="The code is 7306.")


@pytest.fixture
def page(chromium: Chromium, attribution: Attribution, tmp_path: Path) -> Chromium:
    chromium.window(1000, 900)
    return shown(chromium, attribution, tmp_path)


def shown(chromium: Chromium, attribution: Attribution, folder: Path) -> Chromium:
    attribution.to_html(folder / "page.html")
    chromium.open(folder / "page.html")
    return chromium


def assert_silent(chromium: Chromium) -> None:
    """No console output, no error, no exception, and no request but the page itself."""
    for method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
        assert chromium.seen(method) == []
    urls = [event["request"]["url"] for event in chromium.seen("Network.requestWillBeSent")]
    assert [url for url in urls if not url.startswith("data:")] == urls[:1]
    assert urls[0].startswith("file:///")


def tooltip(chromium: Chromium, element: str) -> str | None:
    """The text that the element shows in its ``::after``, None if it shows none."""
    style = f"getComputedStyle({element}, '::after')"
    content = chromium.evaluate(f"{style}.content")
    visible = chromium.evaluate(f"{style}.display !== 'none' && {style}.visibility === 'visible'")
    return None if content in ("none", "normal") or not visible else str(content)


def hover(chromium: Chromium, element: str) -> None:
    chromium.evaluate(f"{element}.scrollIntoView({{block: 'center'}})")
    box = json.loads(chromium.evaluate(f"JSON.stringify({element}.getClientRects()[0])"))
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    chromium.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)


def press_tab(chromium: Chromium) -> None:
    for kind in ("keyDown", "keyUp"):
        chromium.send("Input.dispatchKeyEvent", type=kind, key="Tab", windowsVirtualKeyCode=9)


def test_page_is_silent_and_complete(page: Chromium, attribution: Attribution) -> None:
    assert_silent(page)
    prompt = page.evaluate(
        "(() => { const text = document.querySelector('.text').cloneNode(true);"
        "text.querySelectorAll('.nl').forEach(e => e.remove()); return text.textContent })()"
    )
    assert prompt == "".join(attribution.prompt_tokens or [])
    assert page.evaluate("document.querySelectorAll('.bar > *').length") >= 3
    assert "7306" in page.evaluate("document.querySelector('mark.target').textContent")


def test_score_on_hover(page: Chromium, attribution: Attribution) -> None:
    assert tooltip(page, HOTTEST) is None
    hover(page, HOTTEST)
    assert f"{attribution.top(1)[0].score:.4f}" in (tooltip(page, HOTTEST) or "")


def test_score_on_keyboard_focus(page: Chromium, attribution: Attribution) -> None:
    reached: dict[str, str | None] = {}
    for _ in range(40):
        press_tab(page)
        text = page.evaluate("document.activeElement.textContent")
        reached[text] = tooltip(page, "document.activeElement")
        if text == "7306":
            break
    assert f"{attribution.top(1)[0].score:.4f}" in (reached.get("7306") or "")


def test_hotter_tokens_look_hotter(page: Chromium) -> None:
    colours = page.evaluate(
        "[...document.querySelectorAll('.legend .step')].map(s => getComputedStyle(s)"
        ".backgroundColor.match(/\\d+/g).map(Number).reduce((a, b) => a + b))"
    )
    assert colours == sorted(colours, reverse=True)
    assert len(set(colours)) == len(colours)


def test_hostile_text_stays_text(chromium: Chromium, tmp_path: Path) -> None:
    own = [*HOSTILE]
    target = {"text": "<script>window.hit = 4</script>", "tokens": [[0, 1]]}
    text = "It is <script>window.hit = 4</script>"
    page = shown(chromium, sample(own, text=text, target=target), tmp_path)
    assert_silent(page)
    assert page.evaluate("window.hit") is None
    assert page.evaluate("document.querySelectorAll('script, img').length") == 0
    assert page.evaluate("getComputedStyle(document.body).display") == "block"
    prompt = page.evaluate("document.querySelector('.text').textContent")
    assert "<script>window.hit = 1</script>" in prompt
    assert "{{ 7 * 7 }} &amp;" in prompt
    assert "  two\n\n\tlines  " in prompt
    assert page.evaluate("getComputedStyle(document.querySelector('.text')).whiteSpace") in (
        "pre-wrap",
        "break-spaces",
    )


def test_scripts_are_refused_by_the_page_itself(
    chromium: Chromium, attribution: Attribution, tmp_path: Path
) -> None:
    document = attribution.to_html().replace(
        "</body>", "<script>window.hit = 1</script><img src='https://x.invalid/a.png'></body>"
    )
    (tmp_path / "changed.html").write_text(document, "utf-8")
    chromium.open(tmp_path / "changed.html")
    assert chromium.evaluate("window.hit") is None
    refusals = [entry["entry"]["text"] for entry in chromium.seen("Log.entryAdded")]
    assert sum("Content Security Policy" in text for text in refusals) >= 2


@pytest.mark.parametrize("width", [320, 390, 1000])
def test_nothing_runs_off_the_side(
    chromium: Chromium, attribution: Attribution, tmp_path: Path, width: int
) -> None:
    chromium.window(width, 800)
    page = shown(chromium, attribution, tmp_path)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    hover(page, HOTTEST)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_dark_mode(page: Chromium) -> None:
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


@pytest.mark.parametrize("status", ["failed", "skipped", "queued"])
def test_page_without_a_result(chromium: Chromium, tmp_path: Path, status: str) -> None:
    error = {"code": "overloaded", "message": "too many <b>traces</b> are waiting"}
    data = {"id": "ft-2", "object": "flashtrace.attribution", "status": status}
    if status != "queued":
        data |= {"error": error}
    page = shown(chromium, Attribution(data, text="It is 7306."), tmp_path)
    assert_silent(page)
    body = page.evaluate("document.body.innerText")
    assert status in body
    assert "It is 7306." in body
    assert ("too many <b>traces</b>" in body) == (status != "queued")
