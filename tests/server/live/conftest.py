"""Whole servers, ours and vLLM's own, with SmolLM2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

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
    env = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    with serve(OURS, model_path, log, faults, worker_process=True, **env) as running:
        yield running
