"""Prints what an application shows, as one JSON object; run in a process of its own."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from typing import Any

from tests.server.scripted_app import build

REQUESTS: list[tuple[str, str, dict[str, Any] | None]] = [
    ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "n": 2}),
    ("POST", "/v1/completions", {"prompt": "Hi", "echo": True}),
    ("POST", "/v1/completions", {"prompt": "Hi", "stream": True}),
    ("POST", "/v1/completions", {"prompt": "Hi", "flashtrace": {"hops": -1}}),
    ("POST", "/v1/completions", {"prompt": "Hi", "vllm_xargs": {"flashtrace": "x"}}),
    ("POST", "/v1/attributions", {"prompt": "a", "completion": "b"}),
    ("GET", "/v1/attributions/status", None),
    ("GET", "/flashtrace", None),
    ("GET", "/openapi.json", None),
]


def masked(text: str) -> str:
    text = re.sub(r"(chatcmpl|cmpl)-[0-9a-f]{8,}", r"\1-ID", text)
    return re.sub(r'"created":[0-9]+', '"created":0', text)


async def surface(model: str) -> dict[str, Any]:
    app = await build(model, "--fail-on-environ-validation")
    answers = []
    for method, path, body in REQUESTS:
        content = None if body is None else {"model": "m", **body}
        response = await app.client.request(method, path, json=content)
        kind = response.headers.get("content-type")
        answers.append([path, response.status_code, kind, masked(response.text)])
    metrics = (await app.client.get("/metrics")).text
    routes = [
        [getattr(route, "path", None), sorted(getattr(route, "methods", None) or [])]
        for route in app.app.routes
    ]
    await app.client.aclose()
    names = [line for line in metrics.splitlines() if line.startswith("# TYPE")]
    handlers = {
        name: type(value).__module__
        for name, value in app.app.state._state.items()
        if name.startswith(("openai_", "anthropic_"))
    }
    return {"answers": answers, "metrics": names, "routes": routes, "handlers": handlers}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(surface(sys.argv[1]))))
