"""The README shows the benchmark results that are kept with the code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import report, tables

README = Path(__file__).parents[2] / "README.md"


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def rows_of(table: str) -> list[list[str]]:
    """Cells of the heading and of every row."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [cells(line) for line in (lines[0], *lines[2:])]


def test_readme_shows_committed_results() -> None:
    assert report.main([str(README), "--check"]) == 0


def test_every_table_has_its_place_in_the_readme() -> None:
    text = README.read_text(encoding="utf-8")
    for kind in report.KINDS.values():
        for name in kind.tables:
            assert report.replace_table(text, name, "anything") != text


def test_stale_readme_is_found_and_rewritten(tmp_path: Path) -> None:
    readme, result = tmp_path / "README.md", tmp_path / "parity.json"
    result.write_text(json.dumps({"rows": [{"tokens": 77, "engine": 1e-6}]}))
    before = README.read_text(encoding="utf-8")
    readme.write_text(before, encoding="utf-8")
    arguments = [str(readme), "--parity", str(result)]
    assert report.main([*arguments, "--check"]) == 1
    assert readme.read_text(encoding="utf-8") == before
    assert report.main(arguments) == 0
    assert "| 77 | 1.0e-06 |" in readme.read_text(encoding="utf-8")
    assert report.main([*arguments, "--check"]) == 0


@pytest.mark.parametrize(
    "text",
    [
        "no markers",
        "<!-- table:parity --> only one",
        "<!-- /table:parity --> turned <!-- table:parity -->",
        "<!-- table:parity --><!-- /table:parity -->" * 2,
    ],
)
def test_bad_markers(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(report.MarkerError):
        report.replace_table(text, "parity", "x")
    readme = tmp_path / "README.md"
    readme.write_text(text)
    assert report.main([str(readme)]) == 2
    assert "the README needs" in capsys.readouterr().err


def test_replacing_touches_nothing_else() -> None:
    text = "a\n<!-- table:parity -->\nold\n<!-- /table:parity -->\nb\n"
    new = report.replace_table(text, "parity", r"new \1")
    assert new == "a\n<!-- table:parity -->\nnew \\1\n<!-- /table:parity -->\nb\n"
    assert report.replace_table(new, "parity", "") == text.replace("old\n", "")


def test_missing_results_leave_tables_alone() -> None:
    text = "<!-- table:serving -->\nold\n<!-- /table:serving -->"
    assert report.render(text, {"serving": [], "parity": []}) == text


def test_columns_without_values_are_left_out() -> None:
    columns = [tables.Column(name, name, tables.count) for name in ("a", "b", "c")]
    table = tables.markdown(columns, [{"a": 1200, "b": None}, {"a": 0, "c": 3.6}])
    assert table == "| a | c |\n| ---: | ---: |\n| 1,200 |  |\n| 0 | 4 |"


def test_trace_latency_tells_engines_apart() -> None:
    row = {"context": 2000, "reasoning": 40, "output": 40, "seconds": 1.234, "extra_mb": 12.6}
    compiled = {"engine": "compiled", "rows": [row]}
    eager = {"engine": "eager", "rows": [row]}
    assert rows_of(tables.trace_latency(compiled)) == [
        ["context", "reasoning", "output", "seconds", "extra MiB"],
        ["2,000", "40", "40", "1.23", "13"],
    ]
    both = rows_of(tables.trace_latency(compiled, eager))
    assert [line[0] for line in both] == ["engine", "compiled", "eager"]


def vs_reference_result() -> dict:
    case = {"context": 2000, "reasoning": 1000, "output": 20, "seconds": 2.0, "extra_mb": 99.0}
    measured = {
        "reference_seconds": 50.04,
        "speedup": 25.02,
        "relative_l1": 2.8e-4,
        "top10_overlap": 10,
        "reference_extra_mb": 5000.0,
        "reference_mode": "stored",
        "reference_note": "",
    }
    failed = {"reference_mode": "failed", "reference_note": "stored attentions need 99 GiB"}
    return {
        "settings": {"package": "flashtrace 0.1.1", "threads": 1},
        "rows": [case | measured, case | failed],
        "per_token": None,
    }


def test_vs_reference() -> None:
    table = tables.vs_reference(vs_reference_result())
    heading, measured, failed = rows_of(table)
    assert dict(zip(heading, measured, strict=True)) == {
        "context": "2,000",
        "reasoning": "1,000",
        "output": "20",
        "seconds": "2.00",
        "package, seconds": "50.0",
        "speed-up": "25.0x",
        "relative L1": "2.8e-04",
        "same of top 10": "10",
        "extra MiB": "99",
        "package, extra MiB": "5,000",
        "package's attentions": "stored",
    }
    assert failed[4:8] == ["", "", "", ""]
    assert "stored attentions need 99 GiB." in table
    assert "as many threads (1)" in table


def test_per_token() -> None:
    result = vs_reference_result()
    assert tables.per_token(result) == ""
    result["per_token"] = {"output": 1000, "seconds": 3.0, "reference_note": "out of memory"}
    assert tables.per_token(result) == ""
    agreement = {"relative_l1": 0.098, "cosine": 0.9934, "top10_overlap": 8}
    result["per_token"] = {
        "prompt": 100,
        "output": 1000,
        "seconds": 3.0,
        "reference_seconds": 390.0,
        "reference_span_seconds": 12.0,
        "speedup": 130.0,
        "extrapolated_from": 128,
        "single_tokens": [{"relative_l1": 1e-5}, {"relative_l1": 4e-5}],
        "against_sum_of_tokens": {"context": agreement, "input": agreement},
    }
    heading, row = rows_of(tables.per_token(result))
    assert "extrapolated from 128 tokens" in heading[4]
    assert row == ["100", "1,000", "3.00", "12.0", "390.0", "130x", "4.0e-05", "0.993", "9.8e-02"]
    result["per_token"]["extrapolated_from"] = None
    assert "extrapolated" not in tables.per_token(result)


def test_scaling() -> None:
    def sweep(variable: str, fitted: dict[str, float]) -> dict:
        rows = [{variable: 1, "seconds": 0.5}, {variable: 8, "seconds": 4.0}]
        return {"variable": variable, "rows": rows, "exponents": fitted}

    context = {"seconds": 0.8, "recording_seconds": 1.0, "uncached_prefill_seconds": 1.2}
    result = {
        "context": sweep("context", context),
        "reasoning": sweep("reasoning", {"seconds": 1.1}),
        "concurrency": sweep("traces", {"seconds": 1.0}),
    }
    heading, first, _, last = rows_of(tables.scaling(result))
    assert heading[2:] == ["exponent", "recording", "prefill of the context"]
    assert first == ["tokens of context, 1 to 8", "0.50 to 4.00", "0.80", "1.00", "1.20"]
    assert last == ["attributions at once, 1 to 8", "0.50 to 4.00", "1.00", "", ""]


def test_serving() -> None:
    milliseconds = {"p50": 10.4, "p95": 20.0, "p99": 1234.0}
    row = {
        "variant": "stock",
        "throughput_rps": 1.234,
        "output_tokens_per_second": 40.0,
        "ttft_ms": milliseconds,
        "itl_ms": milliseconds,
        "e2e_ms": {"p50": 5.0},
        "untraced_itl_ms": None,
        "traced_e2e_ms": None,
        "ratio_to_stock": 1.0,
    }
    traced = row | {"variant": "traced 10 %", "traced_e2e_ms": milliseconds}
    heading, stock, other = rows_of(tables.serving({"settings": {}, "rows": [row, traced]}))
    assert "the same, untraced requests" not in heading
    assert stock[:3] == ["stock", "1.23", "1.000"]
    assert stock[4] == "10 / 20 / 1,234"
    assert stock[-2:] == ["5 / - / -", ""]
    assert other[-1] == "10 / 20 / 1,234"
