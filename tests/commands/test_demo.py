"""The demo's scenario, and what it prints of an answer that is given to it."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer

from tests.api.samples import sample
from vllm_flashtrace.api.attribution import Attribution
from vllm_flashtrace.base.errors import TraceError
from vllm_flashtrace.commands.demo import (
    ANSWER,
    FACT,
    FILLER,
    QUESTION,
    Scenario,
    build_scenario,
    run_demo,
)
from vllm_flashtrace.models.smollm2 import ModelPreparationError

FACT_SCORE, FILLER_SCORE = 3.0, 0.05


def attributed(scenario: Scenario, text: str = "The code is 7306.", **extra: Any) -> Attribution:
    """The scenario's words as tokens, the fact's ones scored higher."""
    content = scenario.messages[-1]["content"]
    own = [
        (word[0], FACT_SCORE if scenario.fact_start < word.end() <= scenario.fact_end else 0.05)
        for word in re.finditer(r"\s*\S+", content)
    ]
    assert sum(score == FACT_SCORE for _, score in own) == 10  # the words of the fact
    return sample(own, text=text, **extra)


def run(tmp_path: Path, ask: Any, prepare: Any = lambda: Path("model")) -> tuple[int, str]:
    out = io.StringIO()
    console = Console(file=out, width=100)
    code = run_demo(tmp_path / "demo.html", console=console, prepare=prepare, ask=ask)
    return code, out.getvalue()


def test_the_last_line_is_the_facts_share(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[Path, Scenario]] = []

    def ask(folder: Path, scenario: Scenario) -> Attribution:
        seen.append((folder, scenario))
        return attributed(scenario)

    code, out = run(tmp_path, ask)
    assert code == 0
    assert seen[0][0] == Path("model")
    words = len(seen[0][1].messages[-1]["content"].split())
    share = 10 * FACT_SCORE / (10 * FACT_SCORE + (words - 10) * FILLER_SCORE + 2.0)
    assert out.endswith(f"\nfact share of input mass: {100 * share:.1f} %\n")
    assert re.search(r"10 of \d+ prompt tokens", out)
    assert "[[" in out and "Lisbon" in out
    assert capsys.readouterr().out == ""


def test_the_page_is_written_and_its_path_printed(tmp_path: Path) -> None:
    code, out = run(tmp_path, lambda folder, scenario: attributed(scenario))
    assert code == 0
    assert f"heat-map page: {tmp_path / 'demo.html'}\n" in out
    assert "Lisbon" in (tmp_path / "demo.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("ask", "reason"),
    [
        (lambda f, s: attributed(s, text="The code is 1234."), "answered 'The code is 1234.'"),
        (
            lambda f, s: Attribution(
                {"status": "failed", "error": {"code": "lost", "message": "gone"}},
                text="The code is 7306.",
            ),
            "(lost: gone)",
        ),
        (lambda f, s: attributed(s, top_k=3, tokens=False), "only 3 scores were returned"),
    ],
)
def test_a_run_without_a_share_fails_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ask: Any, reason: str
) -> None:
    code, out = run(tmp_path, ask)
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 1
    assert error.startswith("demo failed: ") and reason in error
    assert "fact share" not in out


@pytest.mark.parametrize("error", [ModelPreparationError("no wheel"), OSError("disk full")])
def test_a_model_that_cannot_be_prepared_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def prepare() -> Path:
        raise error

    code, out = run(tmp_path, None, prepare)
    assert (code, out) == (1, "")
    assert capsys.readouterr().err == f"demo failed: {error}\n"


def test_an_engine_that_refuses_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(folder: Path, scenario: Scenario) -> Attribution:
        raise TraceError("unsupported_model", "this model cannot be traced")

    code, _ = run(tmp_path, ask)
    assert code == 1
    assert "demo failed: this model cannot be traced" in capsys.readouterr().err


@given(st.integers(0, 40), st.floats(0.0, 1.0))
def test_the_span_is_the_fact_and_the_answer_occurs_nowhere_else(
    repeats: int, depth: float
) -> None:
    scenario = build_scenario(repeats, depth)
    content = scenario.messages[-1]["content"]
    assert content[scenario.fact_start : scenario.fact_end] == scenario.fact == FACT
    assert content.count(ANSWER) == 1 and ANSWER in FACT
    assert content.count(FILLER) == repeats
    assert content.endswith(QUESTION)


def test_depth_moves_the_fact() -> None:
    starts = [build_scenario(20, depth).fact_start for depth in (0.0, 0.5, 1.0)]
    assert starts == [0, 10 * (len(FILLER) + 1), 20 * (len(FILLER) + 1)]


@pytest.mark.parametrize(("repeats", "depth"), [(-1, 0.5), (3, -0.1), (3, 1.1)])
def test_impossible_places_are_refused(repeats: int, depth: float) -> None:
    with pytest.raises(ValueError, match="need repeats"):
        build_scenario(repeats, depth)


def test_the_fact_is_a_small_part_of_a_long_prompt(smollm2_folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2_folder / "tokenizer.json"))
    scenario = build_scenario()
    encoding = tokenizer.encode(scenario.messages[-1]["content"], add_special_tokens=False)
    in_fact = [s < scenario.fact_end and e > scenario.fact_start for s, e in encoding.offsets]
    assert len(in_fact) >= 300
    assert sum(in_fact) / len(in_fact) < 0.06
