"""The pipelines on a real Ray, one for all of these tests, with a replica that needs no engine."""

from __future__ import annotations

import gc
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vllm_flashtrace
from tests.scale.batch.replicas import POISON, REFUSE, StandIn
from vllm_flashtrace.scale import ray_cluster
from vllm_flashtrace.scale.batch import dataset as pool
from vllm_flashtrace.scale.batch.inputs import Defaults
from vllm_flashtrace.scale.batch.results import Outcome, result_schema
from vllm_flashtrace.scale.batch.run_batch import BatchError, BatchOptions, answer_rows
from vllm_flashtrace.scale.batch.source import scan_input
from vllm_flashtrace.scale.batch.store import FinishedRows


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    with ray_cluster.connect(num_cpus=3, object_store_memory=200 << 20) as ray:
        yield ray
    gc.collect()  # Ray Data's pools, which would call Ray.
    assert not ray.is_initialized()


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch, ray: Any) -> None:
    monkeypatch.setattr(pool, "Replica", StandIn)
    monkeypatch.setattr(pool, "BATCH_RETRIES", 1)


def answered(tmp_path: Path, lines: list[str], model: str = "m") -> tuple[list[Any], str]:
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(lines))
    options = BatchOptions(path, tmp_path, model, (), (1, 1), 4, Defaults())
    scan = scan_input(path)
    finished, console = FinishedRows(tmp_path / "parts", scan.rows), io.StringIO()
    answer_rows(options, scan, finished, console)
    return [Outcome.from_json(record) for _, record in finished.records()], console.getvalue()


def test_every_row_comes_back_though_one_ends_its_replicas(tmp_path: Path) -> None:
    prompts = [POISON if i == 9 else "x" for i in range(40)]
    lines = [json.dumps({"custom_id": f"r{i}", "prompt": p}) for i, p in enumerate(prompts)]
    lines[20] = "{"
    outcomes, said = answered(tmp_path, lines)
    codes = {i: o.error["code"] for i, o in enumerate(outcomes) if o.error}
    assert codes == {9: "replica_lost", 20: "invalid_json_line"}
    assert [o.custom_id for o in outcomes] == [
        "in.jsonl:21" if i == 20 else f"r{i}" for i in range(40)
    ]
    assert said.splitlines()[-1].startswith("40/40 rows, 2 errors, ")


def test_an_engine_that_does_not_start_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(BatchError, match=r"^the engine did not start: no such model$"):
        answered(tmp_path, ['{"prompt": "x"}'], REFUSE)


def test_too_many_replicas_are_refused(ray: Any) -> None:
    with pytest.raises(ValueError, match="need 3 CPUs"):
        pool.Pool.plan("m", (), (3, 3), 4)


def test_dataset(ray: Any) -> None:
    import pyarrow as pa

    rows = [
        {"custom_id": "a", "prompt": "x", "completion": "y", "top": None},
        {"custom_id": None, "prompt": "x", "completion": None, "top": None},
        {"custom_id": "c", "prompt": None, "completion": "y", "top": None},
    ]
    dataset = ray.data.from_arrow(pa.Table.from_pylist(rows))
    results = vllm_flashtrace.flashtrace_dataset(dataset, model="m", flashtrace={"hops": 0})
    found = {row["custom_id"]: row for row in results.take_all()}
    assert len(found) == 3
    assert set(found["a"]) == set(result_schema().names)
    assert found["a"]["status"] == "completed"
    assert found["c"]["status"] == "error" and "messages" in found["c"]["error_message"]
    [unnamed] = found.keys() - {"a", "c"}
    assert unnamed.startswith("row-")
