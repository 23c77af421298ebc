"""The command on a real engine, killed and run again.

Three engines start, each in a run of the command that has a Ray of its own, which is what a kill
ends: the uninterrupted run that the others are compared with, the run that is killed, and the one
that goes on from there.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from benchmarks.batch_runs import Batch, difference, malformed, requests, results, write_lines
from tests import engine_starts
from tests.cores import MULTIPROCESSING
from tests.tiny_models import make_tiny_model

pytestmark = pytest.mark.timeout(1800)
ROWS = 40
BAD = 10
SECONDS = 800.0


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    folder = tmp_path_factory.mktemp("batch")
    lines = [json.dumps(request) for request in requests(ROWS - 5, tokens=16)]
    greedy = {"prompt": "The key", "max_tokens": 4, "temperature": 0}
    plain: list[dict[str, Any]] = [
        {"prompt": "The train leaves at seven", "max_tokens": 4, "n": 2, "seed": 1},
        {"prompt": "The train leaves at seven", "completion": " and arrives at nine"},
        {"messages": [{"role": "user", "content": "Hi"}], "completion": "Good day"},
        {**greedy, "flashtrace": {"target": {"text": "nowhere"}}},
        {**greedy, "flashtrace": False},
    ]
    lines += [json.dumps(row) for row in plain]
    lines += [malformed(number) for number in range(BAD)]
    model = make_tiny_model("llama", folder / "model")
    write_lines(folder / "input.jsonl", lines)
    return Batch(folder / "input.jsonl", folder / "out", model, batch_size=4)


@pytest.fixture(scope="module")
def whole(batch: Batch) -> dict[str, dict[str, Any]]:
    """What an uninterrupted run gives."""
    run_to_the_end(batch, "a batch that nothing interrupts")
    return results(batch.output)


def run_to_the_end(batch: Batch, reason: str) -> None:
    """Its engine is in the replica's own process, which starts in a third of the time."""
    engine_starts.note(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MULTIPROCESSING, "0")
        run = batch.start()
    try:
        run.finish(SECONDS)
    finally:
        if run.process.poll() is None:
            run.kill()


def test_every_row_is_answered_or_refused(batch: Batch, whole: dict[str, dict[str, Any]]) -> None:
    assert len(whole) == ROWS + BAD
    errors = [record for record in whole.values() if record["error"] is not None]
    assert len(errors) == BAD
    rows = pq.read_table(batch.output / "results.parquet").to_pylist()
    assert len(rows) == ROWS + BAD + 1  # One row has two choices.
    by_line = {(row["line"], row["choice"]): row for row in rows}
    chat = by_line[1, 0]
    assert chat["status"] == "completed"
    assert chat["indices"] == list(range(chat["prompt_tokens"]))
    assert sum(chat["scores"]) == pytest.approx(chat["input_mass"], abs=1e-4)
    assert by_line[ROWS - 4, 1]["text"]
    assert by_line[ROWS - 3, 0]["target"] == " and arrives at nine"
    assert by_line[ROWS - 2, 0]["target"] == "Good day"
    assert by_line[ROWS - 1, 0]["status"] == "failed" and by_line[ROWS - 1, 0]["text"]
    assert by_line[ROWS, 0]["status"] == "untraced"
    assert not (batch.output / "parts").exists()


def test_killed_runs_end_as_an_uninterrupted_one(
    batch: Batch, whole: dict[str, dict[str, Any]]
) -> None:
    killed = replace(batch, output=batch.output.with_name("killed"))
    engine_starts.note("a batch that is killed")
    run = killed.start()
    run.wait_for_rows(8, SECONDS)
    engines = run.kill()
    assert engines
    assert psutil.wait_procs(engines, timeout=120)[1] == []
    before = run.rows()
    assert 8 <= before < ROWS + BAD
    run_to_the_end(killed, "a batch that goes on after a kill")
    unequal, distance = difference(whole, results(killed.output))
    assert unequal == 0
    assert distance < 1e-3
