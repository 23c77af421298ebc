"""What tests measure is recorded, compared with what is committed, and still measured by a test."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import support
from tests.measured import COLLECTED

ROOT = Path(__file__).parents[2]
CELLS = [
    (name, row, column, value, test)
    for name, rows in support.read().items()
    for row, columns in rows.items()
    for column, (value, test) in columns.items()
]


def test_every_committed_value_has_its_test(request: pytest.FixtureRequest) -> None:
    """By its parameters too, where all tests of its file were collected."""
    asked = request.config.args
    collected = request.config.stash[COLLECTED] if not any("::" in arg for arg in asked) else set()
    files = {test.partition("::")[0] for test in collected}
    assert CELLS
    for test in sorted({cell[4] for cell in CELLS}):
        file, _, name = test.partition("::")
        if file in files:
            assert test in collected, f"no test {test} any more: remove its values"
        function = re.escape(name.partition("[")[0])
        text = (ROOT / file).read_text("utf-8")
        assert re.search(rf"^(async )?def {function}\(", text, re.MULTILINE), test


def test_the_file_is_as_it_is_written(tmp_path: Path) -> None:
    copy = tmp_path / "support.json"
    support.merge(copy, CELLS)
    assert copy.read_text("utf-8") == support.RESULTS.read_text("utf-8")
    assert all(support.two_digits(cell[3]) == cell[3] for cell in CELLS)


@pytest.mark.parametrize(
    ("measured", "alike"),
    [
        (2.4e-3, True),
        (1.9e-2, True),
        (2.1e-2, False),
        (1.9e-4, False),
        (1e-9, False),
        ("refused", False),
    ],
)
def test_what_differs_grossly(measured: support.Value, alike: bool) -> None:
    committed: support.Tables = {"breaks_gpt_oss": {"sinks": {"scores": (2e-3, "a test")}}}
    found = support.difference(committed, "breaks_gpt_oss", "sinks", "scores", measured)
    assert (found is None) is alike
    missing = support.difference(committed, "breaks_gpt_oss", "sinks", "error", measured)
    assert missing is not None and "never recorded" in missing


def test_rounding_is_alike() -> None:
    committed: support.Tables = {"breaks_gpt_oss": {"sinks": {"scores": (4e-7, "a test")}}}
    place = (committed, "breaks_gpt_oss", "sinks", "scores")
    assert support.difference(*place, 0.0) is support.difference(*place, 9e-5) is None
    assert support.difference(*place, 2e-4) is not None


def test_how_numbers_are_written() -> None:
    written = [support.text(value) for value in (0.0, 0.51, 0.01, 4.1e-5, 1.2, 100.0, "refused")]
    assert written == ["0", "0.51", "0.01", "4.1e-5", "1.2", "1e+02", "refused"]


_TESTS = """
import pytest

@pytest.mark.parametrize("scores", [1.23456e-3, 2.0])
def test_{name}(measured, scores):
    measured("breaks_gpt_oss", f"{name} {{scores:g}}", measure="attention", scores=scores)
    assert scores < 1
"""


def test_values_of_several_processes_are_recorded(tmp_path: Path) -> None:
    """Those of tests that pass, and beside what the file has."""
    path = tmp_path / "support.json"
    support.merge(path, [("breaks_gpt_oss", "an older one", "error", 0.5, "older")])
    for name in ("first", "second"):
        (tmp_path / f"test_{name}.py").write_text(_TESTS.format(name=name))

    def run(*options: str) -> str:
        command = ["-m", "pytest", "-p", "tests.measured", "-p", "no:cacheprovider", *options]
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done.stdout + done.stderr

    said = run("-n", "2", "--dist", "loadfile", "--record-support", str(path))
    assert "2 failed, 2 passed" in said, said
    found = json.loads(path.read_text("utf-8"))["breaks_gpt_oss"]
    assert found.keys() == {"an older one", "first 0.00123456", "second 0.00123456"}
    test = "test_first.py::test_first[0.00123456]"
    assert found["first 0.00123456"] == {"measure": ["attention", test], "scores": [1.2e-3, test]}
    # Compared, they are none of those that are committed.
    assert "'scores' of the table 'breaks_gpt_oss' was measured (0.00123456) and never" in run()
