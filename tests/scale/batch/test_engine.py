"""The command on a real engine, killed and run again, against a run that nothing interrupts.

Three engines start: that of the run that is killed and of the one that goes on from there, each in
a run of the command that has a Ray of its own, which is what a kill ends; and the one that answers
the same rows in one process, without Ray.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from benchmarks.batch_runs import (
    ENGINE_OPTIONS,
    Batch,
    difference,
    malformed,
    requests,
    results,
    write_lines,
)
from tests import engine_starts
from tests.cores import MULTIPROCESSING
from tests.forked import run_forked
from tests.tiny_models import make_tiny_model

pytestmark = pytest.mark.timeout(1800)
ROWS = 40
BAD = 10
SECONDS = 800.0


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    folder = tmp_path_factory.mktemp("batch")
    lines = [json.dumps(request) for request in requests(ROWS - 5, tokens=48)]
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
def killed(batch: Batch) -> int:
    """Kills a run of the command; how many rows are on disk then."""
    engine_starts.note("a batch that is killed")
    run = batch.start()
    run.wait_for_rows(8, SECONDS)
    engines = run.kill()
    assert engines
    assert psutil.wait_procs(engines, timeout=120)[1] == []
    return run.rows()


@pytest.fixture(scope="module")
def finished(batch: Batch, killed: int) -> dict[str, dict[str, Any]]:
    """What the command gives that goes on from there.

    Its engine is in the replica's own process, which starts in a third of the time.
    """
    engine_starts.note("a batch that goes on after a kill")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MULTIPROCESSING, "0")
        run = batch.start()
    try:
        run.finish(SECONDS)
    finally:
        if run.process.poll() is None:
            run.kill()
    return results(batch.output)


def test_every_row_is_answered_or_refused(
    batch: Batch, finished: dict[str, dict[str, Any]]
) -> None:
    assert len(finished) == ROWS + BAD
    errors = [record for record in finished.values() if record["error"] is not None]
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


def test_a_killed_run_ends_as_one_that_nothing_interrupts(
    batch: Batch, killed: int, finished: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    assert 8 <= killed < ROWS + BAD
    engine_starts.note("a batch that nothing interrupts, without Ray")
    paths = map(str, (batch.input, tmp_path / "out", batch.model))
    command = ["-m", "tests.scale.batch.without_ray", *paths, str(batch.batch_size), "--"]
    status, output = run_forked([*command, *ENGINE_OPTIONS], tmp_path / "log", SECONDS)
    assert status == 0, output
    unequal, distance = difference(results(tmp_path / "out"), finished)
    assert unequal == 0
    assert distance < 1e-3
