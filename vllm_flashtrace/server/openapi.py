"""The ``flashtrace`` field in the server's OpenAPI schema.

Invariant: only the description changes. The request models that validate bodies stay vLLM's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI

from vllm_flashtrace.api.request import FIELD, FlashTraceRequest

_REF = "#/components/schemas/"
_COMPONENT = FlashTraceRequest.__name__
_ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")

# One description for the routes of vLLM and for ours.
FIELD_SCHEMA: dict[str, Any] = {
    "anyOf": [{"$ref": _REF + _COMPONENT}, {"type": "boolean"}, {"type": "null"}],
    "title": "FlashTrace",
    "description": "Asks which prompt tokens the completion came from; true means all defaults.",
}


def describe_field(app: FastAPI) -> None:
    """Adds the field to the schema that ``app`` generates for ``/openapi.json``."""
    stock = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = stock()
            schemas = schema.setdefault("components", {}).setdefault("schemas", {})
            schemas.update(_components())
            for model in _body_models(schema):
                schemas[model]["properties"].setdefault(FIELD, FIELD_SCHEMA)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _components() -> dict[str, Any]:
    """The field's model and the models it is made of, by component name."""
    field = FlashTraceRequest.model_json_schema(ref_template=_REF + "{model}")
    return {**field.pop("$defs", {}), _COMPONENT: field}


def _body_models(schema: dict[str, Any]) -> Iterator[str]:
    """Component names of the request bodies of the routes that take the field."""
    for route in _ROUTES:
        content = schema["paths"].get(route, {}).get("post", {}).get("requestBody", {})
        body = content.get("content", {}).get("application/json", {}).get("schema", {})
        if "$ref" in body:
            yield body["$ref"].removeprefix(_REF)
