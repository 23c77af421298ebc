"""``/flashtrace``: which files it serves, with which headers, and to whom."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio

from tests.server.page_server import PAGE_ON, served
from tests.server.scripted_app import App, build
from vllm_flashtrace.server import page

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def files() -> list[str]:
    return [route.path for route in page.page_router().routes]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def page_app(plugins: None, model_path: str) -> AsyncIterator[App]:
    built = await build(model_path, PAGE_ON)
    yield built
    await built.client.aclose()


async def test_off_unless_asked_for(app, files):
    unknown = await app.client.get("/no-such-page")
    for path in files:
        answer = await app.client.get(path)
        assert (answer.status_code, answer.text) == (404, unknown.text)


async def test_head_answers_like_get_without_the_body(plugins, model_path, files):
    with served(model_path, PAGE_ON) as server:
        for path in files:
            whole = httpx.get(f"{server.url}{path}")
            head = httpx.head(f"{server.url}{path}")
            assert (whole.status_code, head.status_code, head.content) == (200, 200, b"")
            assert int(head.headers["content-length"]) == len(whole.content)
            for answer in (whole, head):
                del answer.headers["date"]
            assert head.headers == whole.headers


async def test_page_and_every_file_it_names(page_app, files):
    app = page_app
    document = (await app.client.get("/flashtrace")).text
    named = set(re.findall(r'(?:href|src)="([^"]+)"', document)) - {"data:,"}
    for path in [path for path in files if path.endswith(".js")]:
        script = (await app.client.get(path)).text
        named |= {f"flashtrace/{name}" for name in re.findall(r'from "\./([a-z]+\.js)"', script)}
    assert {f"/{name}" for name in named} == set(files) - {"/flashtrace"}
    for path in files:
        answer = await app.client.get(path)
        kind = path.rpartition(".")[2] if "." in path else "html"
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(
            {"html": "text/html", "css": "text/css", "js": "text/javascript"}[kind]
        )
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert (await app.client.post("/flashtrace")).status_code == 405
    assert "/flashtrace" not in (await app.client.get("/openapi.json")).json()["paths"]


@pytest.mark.parametrize(
    "path",
    ["/flashtrace/page.py", "/flashtrace/../plugin.py", "/flashtrace/%2e%2e/plugin.py"],
)
async def test_nothing_else_is_served(page_app, path):
    assert (await page_app.client.get(path)).status_code == 404


async def test_the_key_guards_the_data_and_not_the_page(plugins, model_path, files):
    app = await build(model_path, PAGE_ON, "--api-key=secret")
    for path in files:
        assert (await app.client.get(path)).status_code == 200
    for method, path in (
        ("GET", "/v1/models"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/attributions"),
    ):
        assert (await app.client.request(method, path)).status_code == 401
    await app.client.aclose()
