"""``vllm-flashtrace fit-heads`` without an engine: its data, its work file, and what it fits."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.commands.test_cli import only_error_line, run
from tests.core.test_head_weights import example
from vllm_flashtrace.commands import fit_heads
from vllm_flashtrace.commands.fit_heads import FitOptions, Line, Work, draw_ablations, read_lines
from vllm_flashtrace.trace.heads_file import HeadsFile, ModelFacts

FACTS = ModelFacts("LlamaForCausalLM", 3, 4, 64)


def written(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def test_lines_are_read_once_each(tmp_path: Path) -> None:
    first = {"prompt": "A cat. A dog.", "response": "A cat", "task": "animals"}
    chat = {"messages": [{"role": "user", "content": "Hello. Who?"}]}
    path = written(tmp_path / "data", first, "", chat, first)
    one, two = read_lines(path)
    assert (one.prompt, one.response, one.task) == tuple(first.values())
    assert (two.prompt, two.response, two.task) == (chat["messages"], None, None)
    assert read_lines(path, 1) == [one]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "data:2 is not JSON"),
        ("[1]", "data:2 is no object"),
        ({"prompt": "a", "messages": [{"role": "user"}]}, "either messages or a prompt"),
        ({"response": "a"}, "either messages or a prompt"),
        ({"prompt": "a", "answer": "b"}, "unknown keys: answer"),
        ({"messages": []}, "a list of objects with a role"),
        ({"messages": [{"content": "a"}]}, "a list of objects with a role"),
        ({"prompt": 3}, "prompt must be a text"),
        ({"prompt": "a", "response": ""}, "response must be a text"),
        ({"prompt": "a", "task": 1}, "task must be a text"),
    ],
)
def test_a_malformed_line_is_named(
    tmp_path: Path, row: Any, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "data", {"prompt": "good"}, row)
    code = run("fit-heads", "--model", "m", "--data", str(path), "--out", str(tmp_path / "out"))
    assert code == 2
    assert reason in only_error_line(capsys)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--ridge", "0"], "--ridge must be above 0"),
        (["--ablations", "1"], "ablations"),
        (["--out", "/no/such/folder/heads"], "/no/such/folder does not exist"),
        (["--data", "/no/such/file"], "No such file"),
        (["--model", "./no-such-folder"], "does not exist"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, options: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = written(tmp_path / "data", {"prompt": "good"})
    given = {"--model": "m", "--data": str(data), "--out": str(tmp_path / "out")}
    given |= dict([options])
    assert run("fit-heads", *(word for pair in given.items() for word in pair)) == 2
    assert reason in only_error_line(capsys)


def test_the_file_is_no_part_of_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """vLLM loads every safetensors file in the model's folder."""
    data, out = written(tmp_path / "data", {"prompt": "good"}), str(tmp_path / "heads.safetensors")
    assert run("fit-heads", "--model", str(tmp_path), "--data", str(data), "--out", out) == 2
    assert "as weights of the model" in only_error_line(capsys)


def test_a_work_file_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "work"
    facts = {"model": "m", "seed": 0}
    Work(path, facts).add("a", {"skipped": "too long"})
    Work(path, facts).add("b", {"skipped": "refused"})
    path.write_bytes(path.read_bytes()[:-3])  # A kill.
    again = Work(path, facts)
    assert set(again.rows) == {"a"}
    again.add("b", {"skipped": "refused"})
    assert set(Work(path, facts).rows) == {"a", "b"}
    with pytest.raises(ValueError, match="of another run \\(other seed\\)"):
        Work(path, {**facts, "seed": 1})
    with pytest.raises(ValueError, match="no work file"):
        Work(written(tmp_path / "other", {"line": "a"}), facts)
    assert Work(None, facts).rows == {}


def test_ablations_follow_from_the_seed_and_keep_something() -> None:
    drawn = draw_ablations(3, 400, "0:a")
    assert drawn == draw_ablations(3, 400, "0:a") != draw_ablations(3, 400, "1:a")
    assert all(any(mask) for mask in drawn)
    assert len({tuple(mask) for mask in drawn}) == 7
    shares = torch.tensor(drawn, dtype=torch.float64).mean(0)
    assert bool(((shares - 4 / 7).abs() < 0.1).all())


def lines_and_rows(count: int, tasks: int | None = None) -> tuple[list[Line], dict[str, Any]]:
    """Lines of answers that lose what one head reads, and what was measured of them."""
    truth = torch.zeros(3, 4, dtype=torch.float64)
    truth[1, 2] = 2.0
    lines, rows = [], {}
    for number in range(count):
        one = example(number, truth, ablations=8, noise=0.05)
        key = f"line{number}"
        lines.append(Line(key, "p", None, None if tasks is None else f"t{number % tasks}"))
        rows[key] = {
            "attention": fit_heads._encoded(one.attention),
            "shape": list(one.attention.shape),
            "kept": ["".join(str(int(k)) for k in mask) for mask in one.kept],
            "logprobs": one.logprobs.tolist(),
            "default": torch.ones(6).tolist(),
        }
    return lines, rows


def options(tmp_path: Path, **changes: Any) -> FitOptions:
    return FitOptions("m", tmp_path / "heads.safetensors", **{"ridge": 0.001, **changes})


def test_weights_are_fitted_on_all_and_tested_on_what_is_held_out(tmp_path: Path) -> None:
    lines, rows = lines_and_rows(40)
    lines.append(Line("gone", "p", None, None))
    rows["gone"] = {"skipped": "too long"}
    report = fit_heads.fit(lines, rows, FACTS, options(tmp_path))
    held_out = report["held_out"]
    assert (report["examples"], report["ablations"]) == (40, 320)
    assert report["skipped"] == {"too long": 1}
    assert (held_out["training"], held_out["examples"]) == (32, 8)
    assert held_out["learned"] > 0.9 > held_out["equal"] > held_out["default"]
    file = HeadsFile.read(tmp_path / "heads.safetensors")
    assert file.model == FACTS and (file.examples, file.ablations) == (40, 320)
    assert file.held_out == pytest.approx(held_out["learned"], abs=1e-4)
    assert int(file.weights.argmax()) == 6
    text = io.StringIO()
    fit_heads.show({**report, "seconds": 12.0}, Console(file=text, width=80))
    shown = text.getvalue()
    assert "40 of 41 lines, 320 ablations; 12.0 s" in shown
    assert "1 skipped: too long" in shown
    assert f"learned weights of heads │             {held_out['learned']:.2f}" in shown


def test_whole_tasks_are_held_out(tmp_path: Path) -> None:
    lines, rows = lines_and_rows(12, tasks=4)
    held_out = fit_heads.fit(lines, rows, FACTS, options(tmp_path))["held_out"]
    assert (held_out["training"], held_out["examples"]) == (9, 3)
    lines, rows = lines_and_rows(12, tasks=1)
    report = fit_heads.fit(lines, rows, FACTS, options(tmp_path))
    assert report["held_out"] is None
    assert HeadsFile.read(tmp_path / "heads.safetensors").held_out is None


def test_without_a_usable_line_nothing_is_written(tmp_path: Path) -> None:
    lines, rows = lines_and_rows(2)
    rows = {key: {"skipped": "too long"} for key in rows}
    with pytest.raises(ValueError, match="none of 2 lines can be used: 2 too long"):
        fit_heads.fit(lines, rows, FACTS, options(tmp_path))
    assert not (tmp_path / "heads.safetensors").exists()
