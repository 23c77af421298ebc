"""What a step asks of a GPU and of the host, counted over the host's real code by the benchmark."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_host, tables
from benchmarks.gpu_host import CASES, PARTS, Case
from tests.kernels.interpreter import kernel_modules

kernel_modules()  # What is first imported while a test interprets kernels stays interpreted.

LAYERS = (3, 6)
COUNTED = [CASES[0], CASES[3], CASES[5]]
MOST_KEPT = 1024
# Per step: the weights' number and its first note; the end of recording; of the proximities.
BEGINNING, FLUSH, PROXIMITY = 6, 7, 15
PER_TRACE_AT_THE_END = 6
"""Scores, their copies to the host, and those of proximities, of what column sums must come to, and
of the weights' number."""


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], dict[str, Any]]:
    """Counts of all cases, by the number of layers."""
    found = {}
    for layers in LAYERS:
        folder = tmp_path_factory.mktemp("model")
        with gpu_host.worker(folder, layers) as measured:
            for case in CASES:
                measured.step(case)
                found[layers, case.name] = measured.step(case, counted=True)
    return found


@pytest.mark.parametrize("case", COUNTED, ids=lambda case: case.name)
def test_what_a_step_asks_for(case: Case, counts: dict[tuple[int, str], dict[str, Any]]) -> None:
    few, many = (counts[layers, case.name] for layers in LAYERS)
    together = case.traces * case.rows <= MOST_KEPT
    assert few["waits"] == many["waits"] == case.hops  # For each hop's scores.
    assert few["launches_beginning"] == many["launches_beginning"] <= BEGINNING
    assert few["launches_layer"] == many["launches_layer"] <= (3 if together else 6)
    if together:
        assert few["allocations_layer"] == many["allocations_layer"] == 0
    if not case.hops:
        # Work of few layers is cut further, which takes launches that add up its parts.
        end = FLUSH + PROXIMITY + PER_TRACE_AT_THE_END * case.traces
        assert max(few["launches_end"], many["launches_end"]) <= end
        # One piece of page-locked memory for each set of tables.
        assert few["page_locked"] == many["page_locked"] <= 4


def test_it_measures_and_makes_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are in microseconds; with another tree there are ratios."""
    with gpu_host.worker(tmp_path, 2) as measured:
        row = measured.case(CASES[0], 2)
    assert set(row["microseconds"]) == set(PARTS)
    assert 0 < row["microseconds"]["other_layer"] < row["microseconds"]["step"]

    @contextlib.contextmanager
    def process(tree: Path, steps: int) -> Any:
        yield lambda: json.loads(json.dumps([row] * len(CASES)))

    monkeypatch.setattr(gpu_host, "_process", process)
    result = gpu_host.compare({"now": tmp_path, "before": tmp_path}, rounds=2, steps=1)
    table = tables.gpu_host(result)
    assert "no GPU" in table and table.count("| 1.00 |") >= len(CASES)


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    with gpu_host.worker(tmp_path, 2) as measured:
        measured.step(CASES[0])
    tensor = torch.empty(2, device="meta")
    assert tensor.is_meta and not tensor.is_cuda and tensor.device.type == "meta"
    assert not torch.distributed.is_initialized()
