"""The field and our routes in ``/openapi.json``, and that responses are what it says."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from tests.api.samples import check_described
from tests.server.scripted_app import build

pytestmark = pytest.mark.asyncio(loop_scope="module")

BODIES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8},
    "/v1/attributions": {"prompt": "Hi", "completion": "there"},
}


def body_schema(schema: dict[str, Any], route: str) -> dict[str, Any]:
    reference = schema["paths"][route]["post"]["requestBody"]["content"]["application/json"]
    name = reference["schema"]["$ref"].rpartition("/")[2]
    found: dict[str, Any] = schema["components"]["schemas"][name]
    return found


@pytest.fixture
async def schema(app: Any) -> dict[str, Any]:
    response = await app.client.get("/openapi.json")
    assert response.status_code == 200
    found: dict[str, Any] = response.json()
    return found


@pytest.mark.parametrize("route", BODIES)
async def test_the_field_is_described_on_every_route(app, route):
    schema = (await app.client.get("/openapi.json")).json()
    field = body_schema(schema, route)["properties"]["flashtrace"]
    validator = jsonschema.Draft202012Validator(
        {**field, "components": schema["components"]},
    )
    for good in (True, None, {"hops": 2}, {"target": {"text": "a"}, "mode": "deferred"}):
        validator.validate(good)
    for bad in ("yes", 3, {"hops": -1}, {"unknown": 1}, {"target": {"text": ""}}):
        assert not validator.is_valid(bad), bad


async def test_every_reference_resolves(app):
    schema = (await app.client.get("/openapi.json")).json()
    names = schema["components"]["schemas"]

    def check(node: Any) -> None:
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                assert node["$ref"].rpartition("/")[2] in names
            for value in node.values():
                check(value)
        elif isinstance(node, list):
            for value in node:
                check(value)

    check(schema)


async def test_only_the_field_is_new(plugins, model_path, app, monkeypatch):
    ours = (await app.client.get("/openapi.json")).json()
    monkeypatch.setenv("VLLM_FLASHTRACE_DISABLE", "1")
    stock_app = await build(model_path)
    stock = (await stock_app.client.get("/openapi.json")).json()
    for path, operations in stock["paths"].items():
        assert ours["paths"][path] == operations
    changed = []
    for name, component in stock["components"]["schemas"].items():
        mine = ours["components"]["schemas"][name]
        if mine != component:
            assert mine["properties"].pop("flashtrace")
            assert mine == component
            changed.append(name)
    assert sorted(changed) == sorted(
        body["title"] for body in (body_schema(stock, route) for route in list(BODIES)[:4])
    )


async def test_our_routes_are_described(app):
    paths = (await app.client.get("/openapi.json")).json()["paths"]
    assert set(paths["/v1/attributions"]) == {"post"}
    one = "/v1/attributions/{attribution_id}"
    assert set(paths[one]) == {"get", "delete"}
    assert set(paths[f"{one}/attention"]) == {"get"}
    for operation in [*paths[one].values(), paths[f"{one}/attention"]["get"]]:
        assert "404" in operation["responses"]
    file = paths[f"{one}/attention"]["get"]["responses"]["200"]
    assert list(file["content"]) == ["application/octet-stream"]


async def test_attributions_are_what_the_schema_says(app):
    everything = ["hops", "generated", "segments", "sentences", "layers", "attention", "tokens"]
    field = {"include": everything, "top_k": None, "hops": "auto"}
    found = (await app.chat(flashtrace=field)).json()["choices"][0]["flashtrace"]
    assert found["status"] == "completed"
    described = check_described(found)
    assert described.auto_stopped is not None
    assert all(getattr(described, name) for name in everything)
