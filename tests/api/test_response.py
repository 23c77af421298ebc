"""The description of the attribution object."""

from __future__ import annotations

import json

import pytest
from pydantic import BaseModel, ValidationError

from tests.api.samples import check_described
from vllm_flashtrace.api.response import OBJECT, AttributionObject, DeletedAttribution

ID = "ft-" + "0" * 32


@pytest.mark.parametrize("model", [AttributionObject, DeletedAttribution])
def test_every_key_is_described(model: type[BaseModel]) -> None:
    schema = model.model_json_schema()
    json.dumps(schema, allow_nan=False)
    for part in [schema, *schema.get("$defs", {}).values()]:
        assert part["description"], part["title"]
        for name, field in part["properties"].items():
            assert field["description"], (part["title"], name)
            assert "  " not in field["description"]


def test_status_alone_is_an_object() -> None:
    described = check_described({"id": ID, "object": OBJECT, "status": "queued"})
    assert described.status == "queued"
    assert described.scores is None


@pytest.mark.parametrize("change", [{"new": 1}, {"target": {"text": "a", "tokens": [], "new": 1}}])
def test_keys_of_a_newer_server_are_kept(change: dict[str, object]) -> None:
    data = {"id": ID, "object": OBJECT, "status": "completed", **change}
    assert AttributionObject.model_validate(data).model_dump(exclude_unset=True) == data
    with pytest.raises(AssertionError, match="does not describe"):
        check_described(data)


@pytest.mark.parametrize(
    "change", [{"id": "ft-1"}, {"object": "other"}, {"status": "done"}, {"scores": [{"index": 0}]}]
)
def test_what_is_no_attribution_is_not_taken_for_one(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        AttributionObject.model_validate({"id": ID, "object": OBJECT, "status": "queued"} | change)
