"""Results of a model that is traced through some of its layers say so, in every form."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.api.samples import check_described
from vllm_flashtrace.api.attribution import Attribution

pytestmark = pytest.mark.asyncio(loop_scope="module")

COVERAGE = {"layers": [0, 2], "model_layers": 4, "layer_share": 0.5}


@pytest.fixture
def partial(app: Any) -> Any:
    app.engine.layers, app.engine.traced = 4, (0, 2)
    return app


async def test_answers(partial):
    for field in (True, {"hops": 2}, {"targets": "sentences"}, {"verify": 1}):
        data = (await partial.chat(flashtrace=field)).json()["choices"][0]["flashtrace"]
        check_described(data)
        assert data["status"] == "completed" and data["coverage"] == COVERAGE
        assert all(part["change_share"] == 0.25 for part in data.get("targets", [data]))
        for part in Attribution(data).targets:
            assert part.coverage == COVERAGE
            assert "through 2 of 4 layers only, 25% of what mixing tokens changes" in str(part)


async def test_streams_and_existing_text(partial):
    text = (await partial.chat(stream=True, flashtrace=True)).text
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if "flashtrace" in line]
    [choice] = json.loads(events[-1])["choices"]
    assert choice["delta"]["flashtrace"]["coverage"] == COVERAGE
    response = await partial.post("/v1/attributions", prompt="Who?", completion="It was Ann.")
    assert response.json()["coverage"] == COVERAGE


async def test_what_is_said_of_layers_that_were_not_traced(partial):
    field = {"include": ["layers"], "hops": 0, "top_k": None}
    data = (await partial.chat(flashtrace=field)).json()["choices"][0]["flashtrace"]
    check_described(data)
    assert [any(scores) for scores in data["layers"]] == [True, False, True, False]
    for score in data["scores"]:
        assert sum(layer[score["index"]] for layer in data["layers"]) == pytest.approx(
            score["score"], rel=1e-5
        )


async def test_a_model_that_is_traced_whole_has_no_coverage(app):
    data = (await app.chat(flashtrace=True)).json()["choices"][0]["flashtrace"]
    assert "coverage" not in data and "change_share" not in data
    assert Attribution(data).coverage is None and "layers" not in str(Attribution(data))
