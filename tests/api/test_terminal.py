from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from tests.api.samples import haystack, sample
from vllm_flashtrace.api.attribution import Attribution
from vllm_flashtrace.api.terminal import TerminalHeatMap, render_terminal


def printed(attribution: Attribution, *, colour: bool = False, full: bool = False) -> str:
    out = io.StringIO()
    console = Console(
        file=out, width=100, force_terminal=colour, color_system="truecolor" if colour else None
    )
    console.print(TerminalHeatMap(attribution, full=full, rows=4))
    return out.getvalue()


def test_without_colour_brackets_mark_the_hot_tokens() -> None:
    text = printed(sample(haystack()))
    assert "\x1b" not in text
    assert "[The code is] [[7306]][.]" in text
    assert "It is [[7306]]." in text


def test_with_colour_hot_tokens_have_backgrounds_and_no_brackets() -> None:
    text = printed(sample(haystack()), colour=True)
    assert re.search(r"\x1b\[[0-9;]*48;2;255;74;26m7306\x1b", text)
    assert "[[7306" not in text


def test_no_color_keeps_the_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    text = printed(sample(haystack()), colour=True)
    assert "[[7306]]" in text
    assert "48;2;" not in text


def test_dull_stretches_are_elided_and_counted() -> None:
    attribution = sample(haystack(200, 200))
    text = printed(attribution)
    elided = [int(count) for count in re.findall(r"… (\d+) tokens …", text)]
    # Of 411 tokens, 0 and 203 (" The") to 208 (".") are warm; 12 stay on either side of them.
    assert elided == [203 - 12 - 13, 411 - 208 - 13]
    assert text.count(" grass") < 12
    assert printed(attribution, full=True).replace("\n", "").count("grass") == 100
    assert "tokens …" not in printed(attribution, full=True)


def test_short_prompts_are_shown_in_full() -> None:
    assert "tokens …" not in printed(sample([("a", 1.0), *[(" b", 0.0)] * 10]))


def test_table_and_mass_line() -> None:
    attribution = sample(haystack())
    text = printed(attribution)
    [row] = re.findall(r"^ *1  7306 +(\d+)  ([0-9.]+) +([0-9.]+)%$", text, re.MULTILINE)
    best = attribution.top(1)[0]
    assert row == (str(best.index), f"{best.score:.4f}", f"{best.score / 0.8:.1%}"[:-1])
    assert (
        "Mass: prompt 80.0% · left on reasoning 5.0% · target 15.0% · skipped 0.0% (2 passes)"
        in text
    )


def test_hops_that_ended_at_the_limit_are_named() -> None:
    assert "(2 passes)" in printed(sample(haystack(), auto_stopped="threshold"))
    limited = sample(haystack(), auto_stopped="max_hops")
    assert "(2 passes, the most that the server allows)" in " ".join(printed(limited).split())
    assert "ended at the most that the server allows" in limited.to_html()
    assert "ended at the most" not in sample(haystack()).to_html()


def test_top_k_alone_gives_the_table_without_a_heat_map() -> None:
    text = printed(sample(haystack(), top_k=3, tokens=False))
    assert "the prompt cannot be shown" in text
    assert re.search(r"1  7306 ", text)


def test_a_failed_trace_prints_its_error() -> None:
    error = {"code": "overloaded", "message": "too many"}
    text = printed(Attribution({"id": "ft-9", "status": "skipped", "error": error}))
    assert "ft-9 is skipped (overloaded: too many)" in text


def test_control_characters_never_reach_the_terminal() -> None:
    text = printed(sample([("\x1b[31mred", 1.0), ("\x07", 0.5)], text="\x1b]0;x 7306"))
    assert "\x1b" not in text and "\x07" not in text


def test_square_brackets_in_the_prompt_are_no_markup() -> None:
    assert "[bold]x[/bold]" in printed(sample([("[bold]x", 0.0), ("[/bold]", 0.0), ("y", 1.0)]))


def test_rich_prints_an_attribution_as_its_heat_map() -> None:
    attribution = sample(haystack())
    out = io.StringIO()
    Console(file=out, width=100).print(attribution)
    expected = io.StringIO()
    Console(file=expected, width=100).print(render_terminal(attribution))
    assert out.getvalue() == expected.getvalue() != ""


def test_a_model_that_is_traced_in_part_says_so() -> None:
    coverage = {"layers": [0, 2], "model_layers": 4, "layer_share": 0.5}
    text = printed(sample(haystack(), coverage=coverage))
    assert text.startswith(
        "Traced through 2 of 4 layers only: what flows through the others is in no score."
    )
