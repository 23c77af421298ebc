"""What a user does on the page, and what the browser then shows."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch

from tests.api.chromium import Chromium

ANSWER = "First 4821 and then 4821 again."
HOSTILE = "</script><script>window.hit=1</script><img src=x onerror=window.hit=2>{{7*7}}&amp;"
DONE = "document.getElementById('result').ariaBusy === 'false'"
SHOWN = f"{DONE} && !document.getElementById('shown').hidden"
PROBLEM = "document.getElementById('problem').innerText"


def rising(length: int) -> torch.Tensor:
    """Scores that differ for every token, over four orders of magnitude."""
    return torch.linspace(0.01, 1.0, length) ** 4


def set_field(page: Chromium, name: str, value: str, event: str = "input") -> None:
    field = f"document.getElementById('{name}')"
    page.evaluate(
        f"{field}.value = {json.dumps(value)}; {field}.dispatchEvent(new Event('{event}'))"
    )


def click(page: Chromium, name: str) -> None:
    page.evaluate(f"document.getElementById('{name}').click()")


def ask(page: Chromium, question: str = "Which code?") -> None:
    set_field(page, "question", question)
    click(page, "send")
    page.wait_for(DONE)


def drag(page: Chromium, first: int, last: int) -> None:
    """Selects answer tokens ``first`` to ``last`` with the mouse."""
    tokens = "document.querySelectorAll('.answer .t')"
    page.evaluate(f"{tokens}[{first}].scrollIntoView({{block: 'center'}})")
    boxes = f"[{tokens}[{first}], {tokens}[{last}]].map(t => t.getBoundingClientRect())"
    start, end = json.loads(page.evaluate(f"JSON.stringify({boxes})"))
    y = start["y"] + start["height"] / 2
    page.mouse("Pressed", start["x"] + 0.3, y)
    page.mouse("Moved", end["x"] + end["width"] - 0.3, end["y"] + end["height"] / 2)
    page.mouse("Released", end["x"] + end["width"] - 0.3, end["y"] + end["height"] / 2)


def answer_pieces(page: Chromium) -> list[str]:
    pieces = "[...document.querySelectorAll('.answer .t')].map(t => t.textContent)"
    return json.loads(page.evaluate(f"JSON.stringify({pieces})"))


def headline(page: Chromium) -> str:
    return str(page.evaluate("document.querySelector('.headline q').textContent"))


def levels(page: Chromium) -> list[int]:
    marks = "[...document.querySelectorAll('.map .text mark')].map(m => +m.className.slice(1, 2))"
    return json.loads(page.evaluate(f"JSON.stringify({marks})"))


def assert_clean(page: Chromium, url: str) -> None:
    """No console output, no exception, no refused content, and no other host."""
    for method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
        assert page.seen(method) == []
    urls = [event["request"]["url"] for event in page.seen("Network.requestWillBeSent")]
    assert urls
    assert all(address.startswith((url, "data:", "blob:")) for address in urls)


def downloaded(page: Chromium, folder: Path, kind: str) -> Path:
    page.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    click(page, kind)
    deadline = time.monotonic() + 30
    while not (found := list(folder.glob(f"ft-*.{kind}"))):
        assert time.monotonic() < deadline, "nothing was downloaded"
        time.sleep(0.02)
    return found[0]
