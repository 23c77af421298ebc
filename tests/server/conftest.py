from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

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
    # Without it attributions do not say what was cached; `live` has a server without it.
    app = await build(model_path, "--enable-prompt-tokens-details")
    yield app
    await app.client.aclose()


@pytest.fixture
def app(module_app: App) -> App:
    module_app.engine.reset()
    return module_app
