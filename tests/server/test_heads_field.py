"""The request field's ``heads`` over HTTP, on a scripted engine with and without the file."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch

from tests.api.samples import check_described
from tests.server.scripted_app import App, build
from vllm_flashtrace.trace.heads_file import HeadsFile, ModelFacts
from vllm_flashtrace.trace.wire import TraceSpec, unseal

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def weighted(
    plugins: None, model_path: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[App]:
    """A server with a file of weights of heads."""
    config = json.loads((Path(model_path) / "config.json").read_text("utf-8"))
    sizes = (config[name] for name in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    facts = ModelFacts("LlamaForCausalLM", *sizes)
    path = tmp_path_factory.mktemp("heads") / "heads.safetensors"
    HeadsFile(torch.ones(facts.layers, facts.heads), facts, examples=1, ablations=8).write(path)
    option = json.dumps({"flashtrace": {"heads": str(path)}})
    app = await build(model_path, "--additional-config", option)
    yield app
    await app.client.aclose()


def specs(app: App) -> list[Any]:
    return [unseal(call.params.extra_args["flashtrace"]) for call in app.engine.traces]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_scores_by_weights_of_heads(weighted: App, path: str) -> None:
    weighted.engine.reset()
    weighted.engine.answers = ["The code is 4821."]
    ask = weighted.chat if "chat" in path else weighted.complete
    for heads in (True, False):
        response = await ask(flashtrace={"heads": heads, "include": ["layers"]})
        assert response.status_code == 200
        data = response.json()["choices"][0]["flashtrace"]
        check_described(data)
        assert data["status"] == "completed"
        assert data.get("heads") is (True if heads else None)
    asked = specs(weighted)
    assert all(isinstance(spec, TraceSpec) for spec in asked)
    assert [spec.heads for spec in asked] == [True, False]


async def test_existing_text(weighted: App) -> None:
    weighted.engine.reset()
    body = {"prompt": "The code is 4821.", "completion": " 4821", "flashtrace": {"heads": True}}
    response = await weighted.post("/v1/attributions", **body)
    assert response.json()["heads"] is True


@pytest.mark.parametrize("name", ["citations", "guard"])
async def test_what_was_measured_on_proximities_does_not_go_with_it(
    weighted: App, name: str
) -> None:
    response = await weighted.chat(flashtrace={"heads": True, name: True})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "flashtrace.heads"


async def test_a_server_without_the_file_refuses(app: App) -> None:
    response = await app.chat(flashtrace={"heads": True})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "flashtrace.heads"
    assert "option heads" in error["message"]
    assert not app.engine.calls
