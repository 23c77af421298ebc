"""The end of an API server process, for what outlives its requests.

Invariant: deferred attributions are stopped after the last request and before the engine.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI


def close_service_with(app: FastAPI) -> None:
    """Closes the attribution service when ``app`` shuts down."""
    stock = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[Any]:
        async with stock(app) as state:
            try:
                yield state
            finally:
                service = getattr(app.state, "flashtrace", None)
                if service is not None:
                    await service.close()

    app.router.lifespan_context = lifespan
