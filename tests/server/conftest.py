from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.server.live_server import (
    OURS,
    PLAIN_REQUESTS,
    STOCK,
    STOCK_ENV,
    Server,
    ask,
    metric_names,
    openapi,
    serve,
)
from tests.server.scripted_app import App, build
from vllm_flashtrace.models.smollm2 import prepare_smollm2


@pytest.fixture(scope="session")
def model_path() -> str:
    return str(prepare_smollm2())


@pytest.fixture(scope="module")
def plugins() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_PLUGINS", "flashtrace")
        yield


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def module_app(plugins: None, model_path: str) -> AsyncIterator[App]:
    # Without it attributions do not say what was cached; `test_live` has a server without it.
    app = await build(model_path, "--enable-prompt-tokens-details")
    yield app
    await app.client.aclose()


@pytest.fixture
def app(module_app: App) -> App:
    module_app.engine.reset()
    return module_app


@pytest.fixture(scope="session")
def stock_surface(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What vLLM without the plugin answers, measures and describes."""
    log = tmp_path_factory.mktemp("stock") / "server.log"
    with serve(STOCK, model_path, log, **STOCK_ENV) as stock:
        return {
            "answers": [ask(stock, path, body) for path, body in PLAIN_REQUESTS],
            "metrics": metric_names(stock),
            "openapi": openapi(stock),
        }


@pytest.fixture(scope="session")
def stock_answers(stock_surface: dict[str, Any]) -> list[Any]:
    """What vLLM without the plugin answers to ``live_server.PLAIN_REQUESTS``."""
    answers: list[Any] = stock_surface["answers"]
    return answers


@pytest.fixture(scope="session")
def server(
    stock_answers: list[Any], model_path: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """One server with the plugin for the whole session; the stock one has stopped by then."""
    log = tmp_path_factory.mktemp("ours") / "server.log"
    faults = "--worker-extension-cls=tests.faults.WorkerFaults"
    env = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    with serve(OURS, model_path, log, faults, worker_process=True, **env) as running:
        yield running
