"""The page in a real browser: documents that go with a question, and the sources of an answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests.api.chromium import Chromium
from tests.server.page.browser import (
    DONE,
    HOSTILE,
    PROBLEM,
    SHOWN,
    answer_pieces,
    ask,
    assert_clean,
    click,
    downloaded,
    drag,
    headline,
    set_field,
)
from tests.server.page_server import PageServer
from vllm_flashtrace.api.attribution import Attribution

PARIS = "Paris is the capital of France. 🗼 The Louvre is there."
ROME = "Rome is the capital of Italy."
PARTS = ["Paris is one.", "Rome is another."]
ANSWER = "\n".join(PARTS)
CLAIMS = "[...document.querySelectorAll('.claim')]"
SOURCES = "[...document.querySelectorAll('.source')]"
# What a reader sees of each source, and what of a source alone has colour.
LIT = f"{SOURCES}.map(s => [s.classList.contains('lit'), s.classList.contains('faded')])"
SAID = f"{SOURCES}.map(s => s.querySelector('.share').textContent.split(' · ')[0])"
QUOTES = f"{SOURCES}.map(s => s.querySelector('mark')?.textContent ?? null)"


def value(page: Chromium, expression: str) -> Any:
    return json.loads(page.evaluate(f"JSON.stringify({expression})"))


def hand_over(
    page: Chromium, kind: str, target: str, files: dict[str, str], text: str = ""
) -> None:
    """Drops or pastes files and text, which the browser itself takes from the desktop alone."""
    page.evaluate(
        f"""(() => {{
        const data = new DataTransfer();
        for (const [name, text] of Object.entries({json.dumps(files)}))
            data.items.add(new File([text], name, {{type: "text/plain"}}));
        if ({json.dumps(text)}) data.setData("text/plain", {json.dumps(text)});
        const options = {{bubbles: true, cancelable: true}};
        Object.assign(options, {{dataTransfer: data, clipboardData: data}});
        const make = {{drop: DragEvent, paste: ClipboardEvent}}.{kind};
        document.querySelector({json.dumps(target)}).dispatchEvent(new make("{kind}", options));
        }})()"""
    )


def documents(page: Chromium) -> list[str]:
    items = "[...document.querySelectorAll('#documents li > span')]"
    return value(page, f"{items}.map(item => item.innerText)")


def cite(page: Chromium, server: PageServer, text: str = ANSWER) -> None:
    """Asks about two documents; each part of the answer comes from one of them."""
    server.engine.answers = [text]

    def scores(length: int) -> torch.Tensor:
        tokenizer = server.engine.get_tokenizer()
        ids = server.engine.generations[-1].prompt["prompt_token_ids"]
        ends = [len(tokenizer.decode(ids[: i + 1])) for i in range(len(ids))]
        prompt = tokenizer.decode(ids)
        # A trace ends with the part that it explains.
        source = ROME if length > len(ids) + len(tokenizer.encode(text)) - 3 else PARIS
        start = prompt.index(source)
        made = torch.linspace(0.002, 0.001, length)
        made[[i for i, end in enumerate(ends) if start < end <= start + len(source)]] = 1.0
        return made

    server.engine.trace_scores = scores
    set_field(page, "hops", "0")
    hand_over(page, "paste", "#paste", {}, PARIS)
    hand_over(page, "drop", "body", {"rome.txt": ROME})
    page.wait_for("document.getElementById('documents').innerText.includes('rome.txt')")
    ask(page, "Which capitals?")
    page.wait_for(SHOWN)


def hover(page: Chromium, element: str) -> None:
    page.evaluate(f"{element}.scrollIntoView({{block: 'center'}})")
    box = value(page, f"{element}.getClientRects()[0]")
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)


def test_documents_are_sources_in_the_message(page, page_server):
    cite(page, page_server)
    content = f"[Document 1]\n{PARIS}\n\n[rome.txt]\n{ROME}\n\nWhich capitals?"
    assert page.evaluate("document.querySelector('.map .text').textContent") == content
    sent = json.loads(page.seen("Network.requestWillBeSent")[-1]["request"]["postData"])
    assert sent["messages"] == [{"role": "user", "content": content}]
    marked = sent["flashtrace"]["sources"]
    assert [source["title"] for source in marked] == ["Document 1", "rome.txt"]
    assert [content[slice(*source["span"])] for source in marked] == [PARIS, ROME]
    assert documents(page) == []
    listed = "[...document.querySelectorAll('.question .picked li')].map(l => l.textContent)"
    assert value(page, listed) == ["[1] Document 1", "[2] rome.txt"]
    assert_clean(page, page_server.url)
    # The second question goes with the first one's documents; numbers and places go on.
    hand_over(page, "paste", "#paste", {}, "Bern is in Switzerland.")
    assert documents(page)[0].startswith("[3] Document 3")
    set_field(page, "system", "Be brief.")
    page_server.engine.trace_scores = torch.ones
    ask(page, "And Bern?")
    sent = json.loads(page.seen("Network.requestWillBeSent")[-1]["request"]["postData"])
    texts = [
        sent["messages"][source["message"]]["content"][slice(*source["span"])]
        for source in sent["flashtrace"]["sources"]
    ]
    assert texts == [PARIS, ROME, "Bern is in Switzerland."]
    assert [source["id"] for source in sent["flashtrace"]["sources"]] == ["1", "2", "3"]


def test_a_part_lights_its_sources_up(page, page_server):
    cite(page, page_server)
    assert page.evaluate("document.querySelector('.answer').textContent") == ANSWER
    assert value(page, f"{CLAIMS}.map(c => c.textContent)") == PARTS
    assert value(page, f"{CLAIMS}.map(c => c.dataset.numbers)") == ["[1]", "[2]"]
    drawn = "getComputedStyle(document.querySelectorAll('.claim')[1], '::after').content"
    assert page.evaluate(drawn) == '"[2]"'
    assert value(page, f"{SOURCES}.map(s => s.querySelector('b').textContent)") == [
        "[1] Document 1",
        "[2] rome.txt",
    ]
    assert not page.evaluate("document.querySelector('.chip')")
    # The first part is chosen from the start.
    first = [[True, False], [False, True]]
    assert value(page, LIT) == first
    assert value(page, SAID) == ["cited", "not cited"]
    assert value(page, QUOTES)[1] is None and value(page, QUOTES)[0] in PARIS
    hover(page, f"{CLAIMS}[1]")
    page.wait_for(f"{SOURCES}[1].classList.contains('lit')")
    assert value(page, LIT) == first[::-1]
    assert value(page, SAID) == ["not cited", "cited"]
    assert value(page, QUOTES) == [None, ROME]
    assert headline(page) == PARTS[0]
    page.send("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    page.wait_for(f"{SOURCES}[0].classList.contains('lit')")
    # A click chooses the part, and what is known of it needs no request.
    requests = len(page.seen("Network.requestWillBeSent"))
    page.evaluate(f"{CLAIMS}[1].click()")
    assert headline(page) == PARTS[1]
    assert value(page, f"{CLAIMS}.map(c => c.ariaPressed)") == ["false", "true"]
    assert len(page.seen("Network.requestWillBeSent")) == requests
    assert_clean(page, page_server.url)


def test_parts_with_the_keyboard_and_a_screen_reader(page, page_server):
    cite(page, page_server)
    page.evaluate("document.querySelector('.answer').focus()")
    page.press("Tab")
    for part, key in ((0, "ArrowRight"), (1, "ArrowRight"), (1, "Home"), (0, "End"), (1, "Enter")):
        assert page.evaluate(f"document.activeElement === {CLAIMS}[{part}]")
        assert value(page, f"{CLAIMS}.map(c => c.tabIndex)") == [-part, part - 1]
        assert value(page, LIT)[part] == [True, False]
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.press(key)
    assert headline(page) == PARTS[1]
    nodes = page.send("Accessibility.getFullAXTree")["nodes"]
    buttons = {
        node["name"]["value"]: node["description"]["value"]
        for node in nodes
        if node["role"]["value"] == "button" and node.get("description", {}).get("value")
    }
    [spoken] = [text for name, text in buttons.items() if PARTS[1] in name]
    assert spoken == f"Sources: [2] rome.txt: “{ROME}”"


def test_any_selection_of_a_cited_answer_is_attributed(page, page_server):
    cite(page, page_server)
    pieces = answer_pieces(page)
    page_server.engine.trace_scores = torch.ones
    drag(page, len(pieces) - 3, len(pieces) - 3)
    chosen = pieces[-3].strip()
    page.wait_for(f"{DONE} && document.querySelector('.headline q').textContent === '{chosen}'")
    assert value(page, f"{CLAIMS}.map(c => c.ariaPressed)") == ["false", "false"]


@pytest.mark.parametrize(
    ("without", "verdict", "sign"),
    [(-4.0, "supported", "✓"), (-0.8, "weak", "≈"), (-0.5, "unsupported", "✗")],
)
def test_verdicts(page, page_server, without, verdict, sign):
    """By the log-probability of each token of the answer where the source is taken out."""
    page_server.engine.log_prob = lambda text: -0.5 if PARIS in text else without
    click(page, "verify")
    cite(page, page_server)
    labels = "c => getComputedStyle(c, '::before').content"
    assert value(page, f"[...document.querySelectorAll('.chip')].map({labels})") == [
        f'"{sign} {verdict}"',
        f'"{sign} {verdict}"',
    ]
    said = f"{SOURCES}[0].querySelector('.share').textContent"
    assert page.evaluate(said).startswith(f"cited · {sign} {verdict} · ")
    described = f"document.getElementById({CLAIMS}[0].getAttribute('aria-describedby')).textContent"
    assert page.evaluate(described).endswith(f". {verdict}")
    assert page.evaluate("document.querySelector('.answer').textContent") == ANSWER


def test_a_part_without_sources(page, page_server):
    cite(page, page_server)
    # Nothing of the documents has a score: only the template has.
    page_server.engine.trace_scores = lambda length: torch.eye(1, length)[0] + 1e-6
    ask(page, "And now?")
    last = "[...document.querySelectorAll('.turn')].at(-1)"
    page.wait_for(f"{last}.querySelectorAll('.claim').length === 2")
    assert not page.evaluate(f"{last}.querySelector('[data-numbers]')")
    faded = f"[...{last}.querySelectorAll('.source')].map(s => s.matches('.faded:not(.lit)'))"
    assert value(page, faded) == [True, True]


def test_files_of_a_cited_answer(page, page_server, tmp_path):
    cite(page, page_server)
    read = Attribution.from_response(json.loads(downloaded(page, tmp_path, "json").read_text()))
    assert [part.target["text"] for part in read.targets] == PARTS
    assert [each["sources"][0]["title"] for each in read.citations] == ["Document 1", "rome.txt"]
    page.open(downloaded(page, tmp_path, "html"))
    assert page.evaluate("document.querySelector('.answer').textContent") == ANSWER
    assert value(page, f"{CLAIMS}.map(c => [c.dataset.numbers, c.getAttribute('role')])") == [
        ["[1]", None],
        ["[2]", None],
    ]
    assert value(page, SAID) == ["cited", "not cited"]


def test_what_cannot_be_a_document(page, page_server):
    hand_over(page, "drop", "body", {"a.bin": "a\0b"})
    page.wait_for("!document.getElementById('problem').hidden")
    assert "a.bin was not added: it is no text in UTF-8" in page.evaluate(PROBLEM)
    hand_over(page, "drop", "body", {"b.txt": " \n "})
    page.wait_for(f"{PROBLEM}.includes('b.txt')")
    hand_over(page, "drop", "body", {"c.txt": "x" * (1 << 20) + "y"})
    page.wait_for(f"{PROBLEM}.includes('1 MiB')")
    assert documents(page) == []
    # Text that was typed and hostile text stay text, also twice.
    for _ in range(2):
        set_field(page, "paste", HOSTILE)
        click(page, "add")
    assert [line.split(" ")[0] for line in documents(page)] == ["[1]", "[2]"]
    page.evaluate("document.querySelector('#documents button').click()")
    assert len(documents(page)) == 1
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Remove Document 2"
    set_field(page, "paste", HOSTILE)
    ask(page, "What?")
    page.wait_for("document.querySelectorAll('.source').length === 2")
    texts = f"{SOURCES}.map(s => s.querySelector('.text').textContent)"
    assert value(page, texts) == [HOSTILE, HOSTILE]
    assert page.evaluate("window.hit") is None


@pytest.mark.parametrize("width", [360, 1280])
def test_cited_answers_fit(page, page_server, width):
    page.window(width, 800)
    cite(page, page_server, "word " * 30 + f"{'x' * 120}.\n{PARTS[1]}")
    hand_over(page, "drop", "body", {f"{'n' * 100}.txt": "y" * 300})
    page.wait_for("document.querySelectorAll('#documents li').length === 1")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
