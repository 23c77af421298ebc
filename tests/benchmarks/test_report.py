"""The documentation shows the committed results, and stale or misplaced tables are found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import memory, report, tables


@pytest.fixture
def pages(tmp_path: Path) -> list[str]:
    """Copies of the documentation's pages."""
    copies = [tmp_path / page.name for page in report.PAGES]
    for copy, page in zip(copies, report.PAGES, strict=True):
        copy.write_text(page.read_text("utf-8"), "utf-8")
    return [str(copy) for copy in copies]


def test_the_pages_show_the_committed_results() -> None:
    assert report.main(["--check"]) == 0


def test_a_stale_page_is_found_and_rewritten(pages: list[str], tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    (results / "parity.json").write_text(json.dumps({"rows": [{"tokens": 77, "engine": 1e-6}]}))
    arguments = [*pages, "--results", str(results)]
    before = [Path(page).read_text("utf-8") for page in pages]
    assert report.main([*arguments, "--check"]) == 1
    assert [Path(page).read_text("utf-8") for page in pages] == before
    assert report.main(arguments) == 0
    assert sum("| 77 | 1.0e-06 |" in Path(page).read_text("utf-8") for page in pages) == 1
    assert report.main([*arguments, "--check"]) == 0


@pytest.mark.parametrize("found", ["<!-- table:parity -->", "<!-- /table:parity -->"])
@pytest.mark.parametrize("times", [0, 2])
def test_a_table_without_exactly_one_place_is_refused(
    pages: list[str], found: str, times: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for page in pages:
        path = Path(page)
        path.write_text(path.read_text("utf-8").replace(found, found * times), "utf-8")
    assert report.main(pages) == 2
    assert "table:parity" in capsys.readouterr().err


def test_replacing_touches_nothing_else() -> None:
    one, other = Path("one"), Path("other")
    pages = {one: "a\n<!-- table:parity -->\nold\n<!-- /table:parity -->\nb\n", other: "c"}
    new = report.replace_table(pages, "parity", r"new \1")
    assert new == {one: pages[one].replace("old", r"new \1"), other: "c"}
    assert report.replace_table(new, "parity", "")[one] == pages[one].replace("old\n", "")


def test_columns_without_values_are_left_out() -> None:
    columns = [tables.Column(name, name, tables.count) for name in ("a", "b", "c")]
    table = tables.markdown(columns, [{"a": 1200, "b": None}, {"a": 0, "c": 3.6}])
    assert table == "| a | c |\n| ---: | ---: |\n| 1,200 |  |\n| 0 | 4 |"


def test_memory_counts_as_the_budget_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "memory.json"
    assert memory.main(["--contexts", "100", "--json", str(output)]) == 0
    row = json.loads(output.read_text())["rows"][0]
    assert row["trace_bytes"] == {"100": 4 * 32 * (32 * 100 + 2 * 4096)}
    assert "Llama-3.1-8B" in capsys.readouterr().out
