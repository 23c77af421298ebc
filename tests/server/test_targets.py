"""Several targets of one answer over HTTP: one result for each, in the order of the answer."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.samples import check_described

pytestmark = pytest.mark.asyncio(loop_scope="module")

ANSWER = "The code is 4821. It was set by Ann.\n- It is new."


async def explained(app: Any, **field: Any) -> dict[str, Any]:
    app.engine.answers = [ANSWER]
    response = await app.chat(flashtrace={"hops": 0, **field})
    data: dict[str, Any] = response.json()["choices"][0]["flashtrace"]
    check_described(data)
    return data


@pytest.mark.parametrize(
    ("targets", "texts"),
    [
        ("sentences", ["The code is 4821.", "It was set by Ann.", "- It is new."]),
        ("lines", ["The code is 4821. It was set by Ann.", "- It is new."]),
        ("claims", ["The code is 4821.", "It was set by Ann.", "It is new."]),
        ([{"text": "Ann"}, "generated", {"regex": "[0-9]+"}], ["Ann", ANSWER, "4821"]),
    ],
)
async def test_each_target_has_a_result(app, targets, texts):
    data = await explained(app, targets=targets, include=["segments", "sentences", "hops"])
    assert data["status"] == "completed" and "scores" not in data
    assert [found["target"]["text"] for found in data["targets"]] == texts
    for found in data["targets"]:
        masses = (found[f"{part}_mass"] for part in ("input", "remaining", "target", "skipped"))
        assert sum(masses) == pytest.approx(1)
        assert found["scores"] and found["segments"] and found["sentences"]
        assert len(found["hops"]) == 1 and found["hops"][0]["scores"]
    assert data["prompt_tokens"] and data["usage"]


async def test_a_list_of_one_target_has_a_list_of_one_result(app):
    several = await explained(app, targets=["output"])
    alone = await explained(app)
    [found] = several["targets"]
    assert found == {key: alone[key] for key in found}


async def test_a_target_that_is_not_there_is_named_with_its_place(app):
    data = await explained(app, targets=["output", {"text": "Bob"}])
    assert data["error"]["code"] == "target_not_found"
    assert data["error"]["message"].startswith('flashtrace.targets[1].text "Bob"')
    response = await app.post(
        "/v1/attributions",
        prompt="Who?",
        completion=ANSWER,
        flashtrace={"targets": [{"text": "Bob"}]},
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "flashtrace.target"


async def test_an_answer_of_too_many_parts_is_refused(app):
    app.engine.answers = ["\n".join(str(i) for i in range(65))]
    response = await app.chat(flashtrace={"targets": "lines"})
    error = response.json()["choices"][0]["flashtrace"]["error"]
    assert error["code"] == "too_many_targets"
    assert "has 65; the server explains at most 64" in error["message"]


async def test_parts_that_are_skipped_have_no_result(app):
    app.engine.answers = ["The code.\n...\nIs 4821."]
    field = {"targets": "lines", "skip_tokens": "punctuation", "hops": 0}
    data = (await app.chat(flashtrace=field)).json()["choices"][0]["flashtrace"]
    assert [found["target"]["text"] for found in data["targets"]] == ["The code.", "Is 4821."]


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ({"targets": "words"}, "flashtrace.targets"),
        ({"targets": []}, "flashtrace.targets"),
        ({"targets": ["output"] * 65}, "flashtrace.targets"),
        ({"targets": ["output", {"text": ""}]}, "flashtrace.targets[1].text"),
        ({"targets": [{"tokens": [[0, 5000]]}]}, "flashtrace.targets[0].tokens[0]"),
        ({"targets": "lines", "target": "output"}, "flashtrace.target"),
        ({"targets": "lines", "include": ["layers"]}, "flashtrace.include"),
        ({"targets": "lines", "include": ["attention"]}, "flashtrace.include"),
    ],
)
async def test_bad_targets_are_named_before_anything_is_generated(app, field, param):
    response = await app.chat(flashtrace=field)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert not app.engine.calls
