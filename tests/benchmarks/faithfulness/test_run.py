"""A whole run with methods and a scorer that need no model, killed, and its tables."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.faithfulness import report
from benchmarks.faithfulness.__main__ import run
from benchmarks.faithfulness.baselines import SimpleFamily
from benchmarks.faithfulness.example import MethodFailed
from benchmarks.faithfulness.run import EXPENSIVE, Resources, parse
from benchmarks.report import RESULTS
from tests.benchmarks.faithfulness.fakes import HashScorer


class FakeResources(Resources):
    scorer = HashScorer(pad=2)  # SmolLM2's pad token.


ARGUMENTS = [
    *("--tasks", "variables,agent", "--examples", "4", "--lengths", "256,4096"),
    *("--methods", "random,recency,overlap", "--perturbation-methods", "random,overlap"),
    *("--perturbation-examples", "2", "--long-examples", "1", "--both-protocols"),
]


def start(folder: Path, model: Path, *more: str) -> tuple[dict[str, Any], str]:
    """The result of a run, and what it said."""
    options = parse([*ARGUMENTS, "--json", str(folder / "out.json"), *more])
    console = Console(file=io.StringIO(), width=200)
    result = run(options, FakeResources(model), console)
    report.printed(result, console)
    return result, console.file.getvalue()  # type: ignore[attr-defined]


def test_a_killed_run_goes_on_and_gives_what_a_whole_one_does(
    tmp_path: Path, smollm2_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []
    stock = SimpleFamily.attribute

    def attribute(self: Any, prepared: Any, names: Any) -> Any:
        if len(asked) == 12:
            asked.append(("killed", ""))
            raise KeyboardInterrupt
        if "/pay/" in prepared.example.id:
            raise MethodFailed("no coins")
        asked.extend((prepared.example.id, name) for name in names)
        return stock(self, prepared, names)

    monkeypatch.setattr(SimpleFamily, "attribute", attribute)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, smollm2_folder)
    work = tmp_path / "out.work.jsonl"
    work.write_bytes(work.read_bytes()[:-40])  # The kill came in the middle of a row.
    result, said = start(tmp_path, smollm2_folder, "--figures", str(tmp_path / "figures"))
    assert json.loads((tmp_path / "out.json").read_text()) == result
    assert len(asked) - len(set(asked)) == 1  # The row that was cut, and nothing else, was redone.
    assert start(tmp_path, smollm2_folder)[0]["groups"] == result["groups"]
    groups = {(group["task"], group["length"]): group for group in result["groups"]}
    assert set(groups) == {(t, n) for t in ("all", "variables", "agent") for n in (256, 4096)}
    rows = groups["agent", 256]["methods"]
    assert (rows["random"]["n"], rows["random"]["reasons"]) == (3, {"no coins": 1})
    assert "random failed on 1: no coins" in said
    assert {"rise", "rise_skip", "recovery_skip", "recovery_sentence"} <= set(rows["overlap"])
    assert "rise" not in rows["recency"] and "rise" not in groups["all", 4096]["methods"]["random"]
    assert result["perturbation_cost"]["evaluated"] > 0
    assert "| overlap | 7 |" in report.quality(result)
    assert "agent 256" in report.by_task(result) and "4096" not in report.by_task(result)
    assert len(list((tmp_path / "figures").iterdir())) == 3
    with pytest.raises(ValueError, match="remove it or write to another file"):
        start(tmp_path, smollm2_folder, "--seed", "1")


def test_tables_and_figures_of_the_committed_results(tmp_path: Path) -> None:
    result = json.loads((RESULTS / "faithfulness.json").read_text())
    assert "| flashtrace-k1 | 200 |" in report.quality(result)
    assert report.perturbation(result).count("\n") == 7
    report.draw(result, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_expensive_methods_run_on_few_examples(tmp_path: Path) -> None:
    options = parse(["--preset", "quick", "--methods", "all", "--json", str(tmp_path / "out")])
    assert {options.limit(name, 256) for name in EXPENSIVE} == {1, 6}
    assert options.limit("flashtrace-k1", 256) == 6
    assert (options.limit("attn-lrp", 1024), options.limit("flashtrace-k1", 4096)) == (0, 1)


@pytest.mark.parametrize(
    "wrong", ["--methods=magic", "--tasks=sums", "--examples=0", "--lengths=x"]
)
def test_options_that_make_no_sense_are_refused(
    wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(["--json", "out", wrong])
    assert "error:" in capsys.readouterr().err
