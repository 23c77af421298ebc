"""A fixture for what a test measures for the tables of the support page; see `benchmarks.support`.

A value that was never recorded fails its test, and so does one that is grossly different. Where
values are recorded, under ``--record-support PATH``, those of tests that pass go into the file,
whichever process of the suite they ran in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import pytest

from benchmarks import support

_PROPERTY = "support"
_recorded: list[tuple[str, str, str, support.Value, str]] = []
COLLECTED = pytest.StashKey[set[str]]()
"""Ids of all tests of the files that were collected, also of those that are deselected."""


class Measured(Protocol):
    """Notes cells of one row."""

    def __call__(self, table: str, row: str, **cells: support.Value) -> None:
        """Prints cells and compares them with the committed ones, or records them.

        Args:
            table: A key of ``support.LAYOUTS``.
            row: Of which family, feature or break they are.
            cells: Numbers or words by the keys of the table's columns.
        """


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Measured:
    """Notes what the test measured."""

    def note(table: str, row: str, **cells: support.Value) -> None:
        unknown = cells.keys() - support.LAYOUTS[table].columns.keys()
        assert not unknown, f"benchmarks/support.py has no columns {unknown} in {table!r}"
        print(f"{table} | {row} | " + " | ".join(f"{k} {support.text(cells[k])}" for k in cells))
        if request.config.getoption("record_support") is not None:
            test = request.node.nodeid
            found = [(table, row, k, support.two_digits(v), test) for k, v in cells.items()]
            request.node.user_properties.append((_PROPERTY, found))
            return
        committed = support.read()
        wrong = [support.difference(committed, table, row, k, v) for k, v in cells.items()]
        problems = [problem for problem in wrong if problem is not None]
        assert not problems, "; ".join(problems) + ". See benchmarks/support.py for how to record"

    return note


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-support",
        type=Path,
        metavar="PATH",
        help="put what tests measure into this file, and compare it with nothing",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[COLLECTED] = {item.nodeid for item in items}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Also called for the tests of other processes, in the one that ends last."""
    if report.when == "call" and report.passed:
        for name, cells in report.user_properties:
            if name == _PROPERTY:
                _recorded.extend(tuple(cell) for cell in cells)  # type: ignore[attr-defined]


def pytest_sessionfinish(session: pytest.Session) -> None:
    path: Any = session.config.getoption("record_support")
    if path is not None and not hasattr(session.config, "workerinput"):
        support.merge(path, _recorded)
