"""Whole runs with methods and a scorer that need no model: results, failures, going on."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from benchmarks.faithfulness import report, simple
from benchmarks.faithfulness.__main__ import run
from benchmarks.faithfulness.cases import examples_of
from benchmarks.faithfulness.example import Prepared
from benchmarks.faithfulness.figures import draw, pareto
from benchmarks.faithfulness.method import MethodFailed, Scores
from benchmarks.faithfulness.options import Options, parse
from benchmarks.faithfulness.registry import FAMILIES, METHODS, entries_of
from benchmarks.faithfulness.resources import Resources
from benchmarks.faithfulness.summary import behind
from benchmarks.faithfulness.tasks import variant_of
from tests.benchmarks.faithfulness.fake_scorer import HashScorer

PAD = 2  # SmolLM2's


def options(folder: Path, *more: str) -> Options:
    return parse(
        [
            *("--tasks", "variables,agent", "--examples", "4", "--lengths", "256,4096"),
            *("--methods", "random,recency,overlap", "--perturbation-examples", "2"),
            *("--perturbation-methods", "random,overlap", "--long-examples", "1"),
            *("--json", str(folder / "out.json"), *more),
        ]
    )


@pytest.fixture
def scorer() -> HashScorer:
    return HashScorer(PAD)


@pytest.fixture
def resources(smollm2_folder: Path, scorer: HashScorer) -> Resources:
    return Resources(smollm2_folder, response_scorer=scorer)


@pytest.fixture
def explained(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """Counts what methods are asked to explain."""
    counts: Counter[tuple[str, str]] = Counter()
    stock = simple.SimpleFamily.attribute

    def counted(self: Any, prepared: Prepared, names: Collection[str]) -> dict[str, Scores]:
        counts.update((prepared.example.id, name) for name in names)
        return stock(self, prepared, names)

    monkeypatch.setattr(simple.SimpleFamily, "attribute", counted)
    return counts


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def without_times(result: dict[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in result.items() if k not in ("wall_seconds", "environment")}
    kept = json.loads(json.dumps(kept))
    del kept["perturbation_cost"]["seconds"]
    for group in kept["groups"]:
        for row in group["methods"].values():
            row.pop("seconds", None)
    return kept


def test_a_run_counts_every_example_and_method(tmp_path: Path, resources: Resources) -> None:
    result = run(options(tmp_path), resources, quiet())
    assert json.loads((tmp_path / "out.json").read_text()) == result
    groups = {(group["task"], group["length"]): group for group in result["groups"]}
    assert set(groups) == {
        *(("all", length) for length in (256, 4096)),
        *((task, length) for task in ("variables", "agent") for length in (256, 4096)),
    }
    assert groups["all", 256]["methods"]["random"]["n"] == 8
    assert behind(groups["agent", 256]["methods"]["recency"], "recovery") == 4
    assert groups["agent", 4096]["methods"]["overlap"]["n"] == 1
    perturbed = {m for m, row in groups["agent", 256]["methods"].items() if "rise" in row}
    assert perturbed == {"random", "overlap"}
    assert behind(groups["agent", 256]["methods"]["overlap"], "rise") == 2
    assert "rise" not in groups["agent", 4096]["methods"]["random"]
    assert result["perturbation_cost"]["evaluated"] > 0


def test_a_second_run_does_nothing_again(
    tmp_path: Path,
    resources: Resources,
    scorer: HashScorer,
    explained: Counter[tuple[str, str]],
) -> None:
    first = run(options(tmp_path), resources, quiet())
    work, sequences = explained.copy(), len(scorer.sequences)
    second = run(options(tmp_path), resources, quiet())
    assert explained == work and len(scorer.sequences) == sequences
    assert without_times(second) == without_times(first)


@pytest.mark.parametrize("cut", [0, 40])
def test_a_killed_run_goes_on(
    tmp_path: Path,
    smollm2_folder: Path,
    explained: Counter[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    cut: int,
) -> None:
    monkeypatch.setattr("benchmarks.faithfulness.runner._EXAMPLES_AT_ONCE", 1)
    whole_scorer, scorer = HashScorer(PAD), HashScorer(PAD)
    whole = run(
        options(tmp_path / "whole"),
        Resources(smollm2_folder, response_scorer=whole_scorer),
        quiet(),
    )
    explained.clear()
    resources = Resources(smollm2_folder, response_scorer=scorer)
    scorer.fail_after = len(whole_scorer.sequences) // 2
    with pytest.raises(KeyboardInterrupt):
        run(options(tmp_path), resources, quiet())
    assert not (tmp_path / "out.json").exists()
    work = tmp_path / "out.work.jsonl"
    if cut:  # the kill came in the middle of a row
        work.write_bytes(work.read_bytes()[:-cut])
    scorer.fail_after = None
    interrupted = run(options(tmp_path), resources, quiet())

    assert max(explained.values()) == 1
    ours, theirs = without_times(interrupted), without_times(whole)
    if cut:  # the cost of the chunk whose row was cut is lost, its results are not
        del ours["perturbation_cost"], theirs["perturbation_cost"]
    assert ours == theirs
    keys = [
        tuple(row[part] for part in ("kind", "example", "method", "protocol") if part in row)
        for row in map(json.loads, work.read_text().splitlines())
        if row["kind"] in ("scores", "perturbation")
    ]
    assert len(keys) == len(set(keys))


def test_failures_are_counted_with_their_reasons(
    tmp_path: Path, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = simple.SimpleFamily.attribute

    def failing(self: Any, prepared: Prepared, names: Collection[str]) -> dict[str, Scores]:
        if variant_of(prepared.example.id) == "pay":
            raise MethodFailed("no coins")
        found = stock(self, prepared, names)
        found.pop("overlap", None)
        return found

    monkeypatch.setattr(simple.SimpleFamily, "attribute", failing)
    result = run(options(tmp_path, "--tasks", "agent"), resources, quiet())
    rows = result["groups"][0]["methods"]
    assert (rows["random"]["n"], rows["random"]["failed"]) == (3, 1)
    assert rows["random"]["reasons"] == {"no coins": 1}
    assert (rows["overlap"]["n"], rows["overlap"]["failed"]) == (0, 4)
    assert rows["overlap"]["reasons"] == {"no coins": 1, "the family gave no scores": 3}
    console = quiet()
    report.printed(result, console)
    assert "random failed on 1: no coins" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_bug_is_reported_and_tried_again(
    tmp_path: Path, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> dict[str, Scores]:
        raise ZeroDivisionError("oh")

    more = ("--tasks", "agent", "--lengths", "256", "--perturbation-methods", "none")
    with monkeypatch.context() as patch:
        patch.setattr(simple.SimpleFamily, "attribute", broken)
        console = quiet()
        result = run(options(tmp_path, *more), resources, console)
        assert result["groups"][0]["methods"]["random"]["reasons"] == {"ZeroDivisionError: oh": 4}
        assert "ZeroDivisionError: oh" in console.file.getvalue()  # type: ignore[attr-defined]
    result = run(options(tmp_path, *more), resources, quiet())
    assert result["groups"][0]["methods"]["random"]["failed"] == 0


def test_scores_that_are_not_finite_are_a_failure(
    tmp_path: Path, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        simple.SimpleFamily,
        "_random",
        lambda self, prepared: simple._recency(prepared) / 0.0 * float("nan"),
        raising=True,
    )
    more = ("--tasks", "agent", "--lengths", "256", "--methods", "random")
    with pytest.warns(RuntimeWarning):
        result = run(options(tmp_path, *more), resources, quiet())
    assert result["groups"][0]["methods"]["random"]["reasons"] == {"scores are not finite": 4}


def test_another_runs_work_file_is_refused(tmp_path: Path, resources: Resources) -> None:
    more = ("--perturbation-methods", "none", "--lengths", "256")
    run(options(tmp_path, *more), resources, quiet())
    with pytest.raises(ValueError, match="remove it or write to another file"):
        run(options(tmp_path, *more, "--seed", "1"), resources, quiet())


def test_both_protocols_and_files(tmp_path: Path, resources: Resources) -> None:
    path = tmp_path / "mine.jsonl"
    row = {"prompt": "The code, I think, is 17. Right.", "output": " 17", "gold": [[23, 25]]}
    path.write_text(json.dumps(row))
    more = ("--tasks", f"file:{path}", "--both-protocols")
    result = run(options(tmp_path, *more), resources, quiet())
    [group] = result["groups"]
    assert (group["task"], group["length"], group["examples"]) == ("mine", 0, 1)
    overlap = group["methods"]["overlap"]
    assert {"rise", "rise_skip", "recovery", "recovery_skip", "recovery_sentence"} <= set(overlap)


def test_tables_and_figures(tmp_path: Path, resources: Resources) -> None:
    result = run(options(tmp_path, "--figures", str(tmp_path / "figures")), resources, quiet())
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == [
        "quality-cost.png",
        "reasoning-mass.png",
        "recovery.png",
    ]
    assert "| overlap | 8 |" in report.quality(result)
    assert "failed" not in report.quality(result)
    assert "agent 256" in report.by_task(result)
    assert "agent 4096" not in report.by_task(result)
    assert "4,096 tokens (n = 2)" in report.by_length(result)
    assert report.perturbation(result).count("\n") == 3
    draw(json.loads((tmp_path / "out.json").read_text()), tmp_path / "again")


def test_the_front_holds_what_nothing_beats() -> None:
    points = [(1.0, 0.2), (2.0, 0.1), (3.0, 0.5), (3.0, 0.4), (9.0, 0.5)]
    assert pareto(points) == [(1.0, 0.2), (3.0, 0.5)]


def test_every_registered_method_is_offered_by_its_family() -> None:
    assert len(set(METHODS)) == len(METHODS)
    for entry in FAMILIES:
        module, _, name = entry.target.partition(":")
        family = getattr(pytest.importorskip(module), name)
        assert set(family.labels) == set(entry.names)
    with pytest.raises(ValueError, match="unknown methods"):
        entries_of(["magic"])


@pytest.mark.parametrize(
    "arguments",
    [["--methods", "magic"], ["--tasks", "sums"], ["--examples", "0"], ["--lengths", "x"]],
)
def test_options_that_make_no_sense_are_refused(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        options(tmp_path, *arguments)
    assert "error:" in capsys.readouterr().err


def test_own_responses_are_kept_where_they_hold_the_answer(
    tmp_path: Path, resources: Resources, explained: Counter[tuple[str, str]]
) -> None:
    chosen = options(tmp_path, "--tasks", "variables", "--generated")
    asked: list[str] = []

    def generate(prompts: Sequence[str]) -> list[str]:
        asked.extend(prompts)
        written = {e.prompt: e for e in examples_of(chosen, resources.tokenizer)}
        return [
            f"Well. It is{written[p].output}." if i % 2 else "No idea."
            for i, p in enumerate(prompts)
        ]

    class Engine:
        ft = SimpleNamespace(llm=None)
        scorer = resources.scorer

        def close(self) -> None: ...

    resources._engine = Engine()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.faithfulness.__main__.engine_generate", lambda llm: generate)
        result = run(chosen, resources, quiet())
        again = run(chosen, resources, quiet())
    assert result["generated"] == {"variables": {"asked": 4, "kept": 2}}
    groups = {(group["task"], group["length"]): group for group in result["groups"]}
    assert groups["variables-generated", 256]["methods"]["overlap"]["n"] == 2
    assert len(asked) == 4 and without_times(again) == without_times(result)
    assert max(explained.values()) == 1


def test_expensive_methods_run_on_few_examples_and_on_those_that_test_them(tmp_path: Path) -> None:
    methods = "flashtrace-k1,contextcite,loo-token,attn-lrp"
    arguments = ["--methods", methods, "--perturbation-methods", "contextcite"]
    numbers = ["--examples", "50", "--perturbation-examples", "8", "--expensive-examples", "3"]
    chosen = parse([*arguments, *numbers, "--long-examples", "2", "--json", str(tmp_path / "o")])
    found = [chosen.limit(method, 256) for method in chosen.methods]
    assert found == [50, 8, 3, 50]
    assert chosen.methods_at(4096) == ("flashtrace-k1",)
    assert chosen.limit("flashtrace-k1", 1024) == 50
    assert chosen.limit("flashtrace-k1", 4096) == 2
    assert chosen.perturbed_at(256) == ("contextcite",) and chosen.perturbed_at(1024) == ()
