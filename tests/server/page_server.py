"""vLLM's own application on a scripted engine, served over HTTP for a browser."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from tests.server.live_server import free_port
from tests.server.scripted_app import build

PAGE_ON = """--additional-config={"flashtrace": {"page": true}}"""


@dataclass(frozen=True)
class PageServer:
    """A running application.

    Attributes:
        url: Its base address.
        engine: The scripted engine, which lives in the thread of ``loop``.
        loop: The server's event loop.
    """

    url: str
    engine: Any
    loop: asyncio.AbstractEventLoop

    def reset(self) -> None:
        """Gives the engine its defaults back."""

        async def reset() -> None:
            self.engine.reset()

        asyncio.run_coroutine_threadsafe(reset(), self.loop).result(30)


@contextmanager
def served(model_path: str, *options: str) -> Iterator[PageServer]:
    """Serves the scripted app on 127.0.0.1 until the block ends."""
    port = free_port()
    started: list[tuple[Any, uvicorn.Server, asyncio.AbstractEventLoop]] = []
    failure: list[BaseException] = []
    ready = threading.Event()

    async def run() -> None:
        app = await build(model_path, *options)
        config = uvicorn.Config(
            app.app, host="127.0.0.1", port=port, lifespan="off", log_level="warning"
        )
        server = uvicorn.Server(config)
        started.append((app.engine, server, asyncio.get_running_loop()))
        serving = asyncio.create_task(server.serve())
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        ready.set()
        await serving

    def thread() -> None:
        try:
            asyncio.run(run())
        except BaseException as error:
            failure.append(error)
        finally:
            ready.set()

    worker = threading.Thread(target=thread, daemon=True)
    worker.start()
    ready.wait(120)
    if failure or not started:
        raise RuntimeError("the application did not start") from (failure or [None])[0]
    engine, server, loop = started[0]
    try:
        yield PageServer(f"http://127.0.0.1:{port}", engine, loop)
    finally:
        server.should_exit = True
        worker.join(30)
