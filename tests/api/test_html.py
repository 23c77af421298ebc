from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.api.samples import PREFIX, SUFFIX, haystack, response, sample
from vllm_flashtrace.api.attribution import Attribution
from vllm_flashtrace.api.heat import LEVELS, heat_level, level_floor

URL = re.compile(r"(?:https?:)?//[a-z]|url\(|@import|\bsrc=|\bsrcset=", re.IGNORECASE)


class Page(HTMLParser):
    """Tags of a page, and the text of its first ``.text`` block (the prompt)."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.prompt = ""
        self._depth = 0
        self._done = False
        self._skip = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        self._skip = tag == "i"
        if self._depth:
            self._depth += 1
        elif tag == "div" and attributes.get("class") == "text" and not self._done:
            self._depth = 1

    def handle_endtag(self, tag: str) -> None:
        self._skip = False
        if self._depth:
            self._depth -= 1
            self._done = self._depth == 0

    def handle_data(self, data: str) -> None:
        if self._depth and not self._skip:
            self.prompt += data

    def marks(self) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.tags if tag == "mark" and "tabindex" in attrs]


def test_page_refers_to_nothing_outside_itself() -> None:
    page = sample(haystack()).to_html()
    assert not URL.search(page)
    tags = {tag for tag, _ in Page(page).tags}
    assert not tags & {"script", "img", "iframe", "object", "embed"}
    policy = next(a["content"] for t, a in Page(page).tags if a.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'")
    assert "script-src" not in policy


@pytest.mark.parametrize("render", ["to_html", "_repr_html_"])
def test_every_text_is_escaped(render: str) -> None:
    evil = "<script>alert(1)</script>"
    quote = '"><img src=x onerror=alert(1)>'
    attribution = sample(
        [(evil, 1.0), (quote, 0.9)],
        text=f"{evil} {quote} and {evil}",
        id=quote,
        target={"text": evil, "tokens": [[0, 1]]},
        segments=[{"message": 0, "role": evil, "score": 0.5}],
        generated=[{"index": 0, "token": evil, "token_id": 1, "score": 0.1}],
    )
    tags = Page(getattr(attribution, render)()).tags
    assert not {tag for tag, _ in tags} & {"script", "img"}
    assert not any("onerror" in attrs for _, attrs in tags)


def test_a_failed_trace_is_a_page_with_its_error_escaped() -> None:
    error = {"code": "target_not_found", "message": "<script>x</script> is not there"}
    page = Attribution({"status": "failed", "error": error}, text="<b>hi</b>").to_html()
    assert "target_not_found" in page and "&lt;script&gt;" in page and "&lt;b&gt;hi" in page
    assert not {tag for tag, _ in Page(page).tags} & {"script", "b", "mark"}


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXTS, st.floats(0.0, 10.0)), min_size=1, max_size=12))
def test_the_prompt_is_shown_character_for_character(own: list[tuple[str, float]]) -> None:
    shown = Page(sample(own).to_html()).prompt
    assert shown == "".join(PREFIX) + "".join(text for text, _ in own) + "".join(SUFFIX)


def test_a_coloured_token_tells_its_score_to_pointer_and_keyboard() -> None:
    attribution = sample(haystack())
    [hottest] = [s for s in attribution.scores if s.token == "7306"]
    notes = [mark["aria-description"] or "" for mark in Page(attribution.to_html()).marks()]
    [note] = [note for note in notes if note.startswith(f"token {hottest.index} ")]
    assert f"score {hottest.score:.4f}" in note
    share = hottest.score / attribution.input_mass
    assert f"{100 * share:.1f} % of input" in note


def test_the_tab_key_stops_at_hot_tokens_alone() -> None:
    own = [("dull", 0.01), ("faint", 0.03), ("warm", 0.07), ("hot", 1.0)]
    html = sample(own).to_html()
    assert [mark["class"] for mark in Page(html).marks()] == ["h8 tpl", "h2", "h8"]
    assert re.search(r'<span title="token 3 · score [^"]+">dull</span>', html)
    assert re.search(r'<mark class="h1" title="token 4 · score [^"]+">faint</mark>', html)


def test_top_k_alone_gives_no_heat_map_and_says_so() -> None:
    page = sample(haystack(), top_k=5, tokens=False).to_html()
    assert "5 scores were returned and no text of the other tokens" in page
    assert not Page(page).marks()
    assert "7306" in page


def test_a_heat_map_with_missing_scores_says_so() -> None:
    page = sample([("a", 5.0), ("b", 4.0), ("c", 3.0)], top_k=2).to_html()
    assert "Only 2 scores were returned" in page
    assert "no score returned" in page


def test_masses_and_hops_are_shown() -> None:
    page = sample(haystack()).to_html()
    balance = "Prompt 80.0 %, Left on reasoning 5.0 %, Target and answer 15.0 %"
    assert f'aria-label="{balance}, Skipped tokens 0.0 %"' in page
    cells = re.findall(r'<td class="n">([^<]*)</td>', page)
    assert cells[-12:] == [
        *("0", "100.0 %", "60.0 %", "25.0 %", "15.0 %", "0.0 %"),
        *("1", "25.0 %", "80.0 %", "20.0 %", "0.0 %", "0.0 %"),
    ]


def test_the_target_is_marked_in_the_completion() -> None:
    page = sample(haystack(), text="7306? Yes, 7306.").to_html()
    assert '7306? Yes, <mark class="target">7306</mark>.' in page


def test_generated_scores_colour_the_completion() -> None:
    tokens = ["It", " is", " ", "73", "06"]
    generated = [{"index": i, "token": t, "score": i / 10} for i, t in enumerate(tokens)]
    page = sample(haystack(), generated=generated, target={"text": "", "tokens": [[3, 5]]})
    html = page.to_html()
    assert re.search(r'<mark class="h6 gen target"[^>]*>73</mark>', html)
    assert re.search(r'<mark class="h5 gen"[^>]*> </mark>', html)


def test_styles_of_a_notebook_fragment_stay_inside_it() -> None:
    fragment = sample(haystack())._repr_html_()
    assert fragment.startswith('<div class="flashtrace">') and "<body" not in fragment
    style = re.search(r"<style>(.*?)</style>", fragment, re.DOTALL)
    assert style is not None
    flat = re.sub(r"@media[^{]*\{(.*?\})\s*\}", r"\1", style[1], flags=re.DOTALL)
    selectors = [rule.strip() for rule in re.findall(r"([^{}]+)\{[^{}]*\}", flat)]
    assert len(selectors) > 40
    for selector in selectors:
        parts = re.split(r",(?![^()]*\))", selector)
        assert all(part.strip().startswith(".flashtrace") for part in parts), selector


def test_lone_surrogates_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    page = sample([("\ud83d", 1.0)]).to_html(path)
    assert path.read_text("utf-8") == page
    assert "\ufffd" in page


@given(st.floats(0.0, 1.0), st.floats(1e-9, 1.0))
def test_levels_rise_with_the_score_and_match_the_legend(score: float, scale: float) -> None:
    level = heat_level(score, scale)
    assert 0 <= level <= LEVELS
    assert heat_level(score / 2, scale) <= level
    if level > 0:
        assert score >= level_floor(level, scale) * (1 - 1e-9)
    if level < LEVELS:
        assert score <= level_floor(level + 1, scale) * (1 + 1e-9)


def test_an_attention_sink_in_the_template_does_not_wash_out_the_text() -> None:
    sink = response([("fact", 0.1), ("filler", 0.001)])
    marks = Page(Attribution(sink, text="").to_html()).marks()
    assert [mark["class"] for mark in marks] == ["h8 tpl", "h8"]


def test_a_vanishing_scale_does_not_overflow() -> None:
    assert heat_level(1.0, 5e-324) == LEVELS


def test_cited_answer_has_the_numbers_of_its_sources() -> None:
    text = "\U0001f5fc <b>Paris</b> is one. Who knows. Rome is another."
    parts = ["<b>Paris</b> is one.", "Rome is another."]
    sources = [
        {"index": 1, "id": "p", "title": "On <i>Paris</i>", "text": "Paris & France."},
        {"index": 0, "id": "r", "url": "https://example.com/rome", "text": "Rome, Italy."},
    ]
    citations = [
        {"text": parts[0], "start": 2, "end": 22, "sources": sources},
        {"text": parts[1], "start": 34, "end": 50, "sources": sources[1:]},
    ]
    targets = [
        {key: value for key, value in response(haystack()).items() if key != "usage"}
        | {"target": {"text": part, "tokens": [[0, 1]]}}
        for part in parts
    ]
    data = response(haystack()) | {"targets": targets, "citations": citations}
    page = Attribution(data, text=text).to_html()
    shown = Page(page)
    assert shown.prompt == ("\U0001f5fc <b>Paris</b> is one.[2][1] Who knows. Rome is another.[1]")
    assert not [tag for tag, _ in shown.tags if tag in ("b", "a", "script")]
    assert page.index("[1]</td>") < page.index("https://example.com/rome") < page.index("[2]</td>")
    assert page.count("Rome, Italy.") == 1 and "Paris &amp; France." in page
    # Where the text is another than the one that was cited, there is no answer to number.
    assert "<sup>" not in Attribution(data, text=f" {text}").to_html()
    assert "<sup>" not in Attribution(data).to_html()


PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9"
    "awAAAABJRU5ErkJggg=="
)


def with_image(urls: list[str | None], **image: object) -> Attribution:
    entry = {"index": 0, "tokens": 6, "rows": 2, "columns": 3, "score": 0.21}
    entry |= {"scores": [0.0, 0.01, 0.04, 0.16, 0.0, 0.0], **image}
    data = response(haystack(), images=[entry])
    data["scores"][4] |= {"token": "", "image": 0, "row": 1, "column": 2, "score": 0.7}
    return Attribution(data, text="It is 7306.", image_urls=urls)


def test_an_image_has_a_heat_map_of_its_parts() -> None:
    page = with_image([PIXEL]).to_html()
    tags = Page(page).tags
    cells = [attrs for tag, attrs in tags if tag == "i" and "row" in (attrs.get("title") or "")]
    assert [cell.get("class") for cell in cells] == [None, "h2", "h4", "h8", None, None]
    assert cells[5]["title"] == "row 1, column 2 · score 0"
    [picture] = [attrs for tag, attrs in tags if tag == "img"]
    assert picture["src"] == PIXEL
    assert "image 0, row 1, column 2" in page


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/a.png",
        "data:image/svg+xml;base64,PHN2Zz4=",
        'data:image/png;base64,AA" onerror="x',
        None,
    ],
)
def test_a_page_has_no_picture_from_elsewhere(url: str | None) -> None:
    page = with_image([url]).to_html()
    tags = Page(page).tags
    assert not [attrs for tag, attrs in tags if tag == "img"]
    assert len([a for t, a in tags if t == "i" and "row" in (a.get("title") or "")]) == 6
    assert not URL.search(page)


def test_an_image_whose_grid_is_not_known() -> None:
    data = with_image([PIXEL]).to_dict()
    del data["images"][0]["rows"], data["images"][0]["columns"]
    page = Attribution(data, text="It is 7306.", image_urls=[PIXEL]).to_html()
    assert "6 tokens stand for it" in page
    assert not [attrs for tag, attrs in Page(page).tags if tag == "img"]


def test_a_model_that_is_traced_in_part_says_so() -> None:
    coverage = {"layers": [0, 2], "model_layers": 4, "layer_share": 0.5}
    note = "Traced through 2 of 4 layers only: what flows through the others is in no score."
    attribution = sample(haystack(), coverage=coverage)
    assert note in attribution.to_html()
    share = sample(haystack(), coverage=coverage, change_share=0.25).to_html()
    assert "through 2 of 4 layers only, 25% of what mixing tokens changes: what flows" in share
    one = attribution.to_dict()
    several = {key: one[key] for key in ("id", "object", "status", "coverage")}
    assert note in Attribution(several | {"targets": [one]}).to_html()
    assert note not in sample(haystack()).to_html()
