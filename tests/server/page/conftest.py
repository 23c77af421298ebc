from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.api.chromium import Chromium
from tests.server.page.browser import ANSWER, rising
from tests.server.page_server import PAGE_ON, PageServer, served


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    executable = shutil.which("chromium") or shutil.which("chromium-browser")
    if executable is None:
        pytest.skip("there is no chromium to test pages in")
    browser = Chromium(executable, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page_server(plugins: None, model_path: str) -> Iterator[PageServer]:
    with served(model_path, PAGE_ON) as server:
        yield server


@pytest.fixture
def page(chromium: Chromium, page_server: PageServer) -> Chromium:
    page_server.reset()
    page_server.engine.answers = [ANSWER]
    page_server.engine.trace_scores = rising
    chromium.window(1280, 900)
    chromium.visit(f"{page_server.url}/flashtrace")
    chromium.wait_for("document.getElementById('model').value === 'm'")
    return chromium
