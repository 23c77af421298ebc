"""Manifest, final files and table, without an engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from openai.types.chat import ChatCompletion

from tests.scale.batch.replicas import ATTRIBUTION, chat
from vllm_flashtrace.api.response import AttributionObject, HopMass, TokenScore
from vllm_flashtrace.scale.batch.results import Outcome, make_table, result_schema, table_rows
from vllm_flashtrace.scale.batch.store import (
    ERRORS,
    OUTPUT,
    PARTS,
    RESULTS,
    FinishedRows,
    Manifest,
    OutputFolderError,
    PartsWriter,
    claim,
    drop_store,
    finish,
    locked,
)

FACTS = {"input": [["a.jsonl", "0" * 64]], "model": "m"}
FAILED = {
    "id": "ft-2",
    "object": "flashtrace.attribution",
    "status": "failed",
    "error": {"code": "target_not_found", "message": "no such text"},
}

OUTCOMES = [
    Outcome.answered("a", "a.jsonl", 1, 200, chat(ATTRIBUTION, FAILED, None)),
    Outcome("b", "a.jsonl", 2, error={"code": "invalid_row", "message": "stream has no place"}),
    Outcome.answered("c", "a.jsonl", 3, 200, ATTRIBUTION),
    Outcome.answered(
        "d",
        "a.jsonl",
        4,
        400,
        {"error": {"message": "bad", "type": "BadRequestError", "param": "seed", "code": 400}},
    ),
]


def stored(folder: Path) -> FinishedRows:
    finished = FinishedRows(folder / PARTS, len(OUTCOMES))
    with PartsWriter(finished) as writer:
        for row in (2, 0, 3, 1):  # Replicas finish out of order.
            writer.add([(row, OUTCOMES[row].to_json().encode())])
    return finished


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_final_files(tmp_path: Path) -> None:
    manifest = claim(tmp_path, FACTS)
    totals = finish(tmp_path, manifest, stored(tmp_path))
    assert (totals.rows, totals.errors, totals.failed_traces) == (4, 2, 1)
    output, errors = lines(tmp_path / OUTPUT), lines(tmp_path / ERRORS)
    assert [row["custom_id"] for row in output] == ["a", "c"]
    assert [row["custom_id"] for row in errors] == ["b", "d"]
    assert output[0].keys() == {"id", "custom_id", "response", "error"}
    assert output[0]["response"]["status_code"] == 200 and output[0]["error"] is None
    answer = ChatCompletion.model_validate(output[0]["response"]["body"])
    assert answer.choices[0].flashtrace["status"] == "completed"  # type: ignore[attr-defined]
    assert errors[0]["response"] is None and errors[0]["error"]["code"] == "invalid_row"
    assert errors[1]["response"]["status_code"] == 400
    assert errors[1]["error"] == {"code": "BadRequestError", "message": "seed: bad"}
    assert len({row["id"] for row in [*output, *errors]}) == 4
    assert not (tmp_path / PARTS).exists()
    assert claim(tmp_path, FACTS).finished


def test_table(tmp_path: Path) -> None:
    finish(tmp_path, claim(tmp_path, FACTS), stored(tmp_path))
    table = pq.read_table(tmp_path / RESULTS)
    assert table.schema.equals(result_schema(), check_metadata=False)
    assert all(b"description" in field.metadata for field in table.schema)
    rows = table.to_pylist()
    assert [(row["custom_id"], row["choice"], row["status"]) for row in rows] == [
        ("a", 0, "completed"),
        ("a", 1, "failed"),
        ("a", 2, "untraced"),
        ("b", None, "error"),
        ("c", 0, "completed"),
        ("d", None, "error"),
    ]
    first = rows[0]
    assert (first["indices"], first["scores"]) == ([1, 4], [0.5, 0.25])
    assert (first["message"], first["start"], first["end"]) == ([0, None], [0, None], [1, None])
    assert first["tokens"] == ["a?", "<|im_end|>"]
    assert first["hops"][0]["reasoning_mass"] == 0.1
    assert (first["part"], first["auto_stopped"]) == ([None, None], None)
    assert rows[1]["text"] == "no 1" and rows[1]["error_code"] == "target_not_found"
    assert rows[3]["error_message"] == "stream has no place"
    assert first["covered_layers"] is None and first["model_layers"] is None


def test_a_row_of_a_model_that_is_traced_in_part_says_so() -> None:
    coverage = {"layers": [0, 2], "model_layers": 4, "layer_share": 0.5}
    body = {**ATTRIBUTION, "coverage": coverage, "change_share": 0.25}
    [row] = make_table(table_rows(Outcome.answered("a", "a.jsonl", 1, 200, body))).to_pylist()
    assert (row["covered_layers"], row["model_layers"]) == ([0, 2], 4)
    assert row["change_share"] == 0.25


def test_sentences_have_a_column() -> None:
    sentence = {"message": 0, "start": 3, "end": 9, "text": "A cat.", "tokens": 2}
    body = {**ATTRIBUTION, "sentences": [{**sentence, "score": 0.5, "mean": 0.25}]}
    [row] = make_table(table_rows(Outcome.answered("a", "a.jsonl", 1, 200, body))).to_pylist()
    assert row["sentences"] == [{**sentence, "part": None, "score": 0.5, "mean": 0.25}]


def test_every_field_of_a_score_and_of_a_hop_has_a_column() -> None:
    names = result_schema().names
    lists = {"index": "indices", "score": "scores", "token_id": "token_ids", "token": "tokens"}
    assert {lists.get(name, name) for name in TokenScore.model_fields} <= set(names)
    hop = result_schema().field("hops").type.value_type
    parts = {hop.field(i).name for i in range(hop.num_fields)}
    assert parts == {*HopMass.model_fields} - {"scores"}
    masses = [name for name in AttributionObject.model_fields if name.endswith("_mass")]
    assert len(masses) == 5 and set(masses) <= set(names)


def test_finishing_again_gives_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for name in ("x", "y"):
        folder = tmp_path / name
        folder.mkdir()
        finish(folder, claim(folder, FACTS), stored(folder))
        contents.append([(folder / n).read_bytes() for n in (OUTPUT, ERRORS, RESULTS)])
    assert contents[0] == contents[1]


def test_a_kill_while_finishing_leaves_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = stored(tmp_path)
    manifest = claim_with_store(tmp_path)

    def killed(self: Manifest, folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Manifest, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            finish(tmp_path, manifest, finished)
    again = FinishedRows(tmp_path / PARTS, len(OUTCOMES))
    assert again.count == len(OUTCOMES)
    assert not claim(tmp_path, FACTS).finished
    assert finish(tmp_path, claim(tmp_path, FACTS), again).rows == 4


def claim_with_store(folder: Path) -> Manifest:
    Manifest(FACTS).write(folder)
    return claim(folder, FACTS)


def test_another_run_is_refused_by_what_differs(tmp_path: Path) -> None:
    claim(tmp_path, FACTS)
    stored(tmp_path)
    with pytest.raises(OutputFolderError, match=r"other input, model"):
        claim(tmp_path, {"input": [], "model": "n"})
    assert not claim(tmp_path, FACTS).finished


def test_a_run_that_came_to_nothing_gives_way(tmp_path: Path) -> None:
    claim(tmp_path, FACTS)
    other = {**FACTS, "model": "n"}
    assert claim(tmp_path, other).facts == other
    with pytest.raises(OutputFolderError, match="model"):
        stored(tmp_path)
        claim(tmp_path, FACTS)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"run": {}, "finished": 0, "format": 99}'])
def test_a_damaged_manifest_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(OutputFolderError):
        claim(tmp_path, FACTS)


def test_files_of_others_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / OUTPUT).write_text("mine")
    with pytest.raises(OutputFolderError, match=OUTPUT):
        claim(tmp_path, FACTS)


def test_a_lost_result_is_noticed(tmp_path: Path) -> None:
    finish(tmp_path, claim(tmp_path, FACTS), stored(tmp_path))
    drop_store(tmp_path)
    (tmp_path / OUTPUT).unlink()
    with pytest.raises(OutputFolderError, match="gone"):
        drop_store(tmp_path)


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "out"),
        pytest.raises(OutputFolderError, match="another run"),
        locked(tmp_path / "out"),
    ):
        pass
    with locked(tmp_path / "out"):
        pass


def test_outcomes_come_back_as_they_were() -> None:
    for outcome in OUTCOMES:
        assert Outcome.from_json(outcome.to_json()) == outcome
        assert table_rows(outcome)
