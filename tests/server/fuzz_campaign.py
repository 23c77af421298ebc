"""Sends generated requests to one scripted application, and looks at what they leave behind."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any
from zlib import crc32

import httpx
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.server.fuzz_answers import check
from tests.server.fuzz_bodies import Sent
from tests.server.scripted_app import App
from vllm_flashtrace.trace.wire import EXTRA_ARGS_KEY, ScoreSpec, unseal

SECONDS = 20.0  # No answer takes longer; the slowest here takes well under one.
SCALE = float(os.environ.get("FLASHTRACE_FUZZ_SCALE", "1"))
SEED = int(os.environ.get("FLASHTRACE_FUZZ_SEED", "0"))


class Campaign:
    """One application, its event loop and the tally of what it answered.

    Attributes:
        app: The application.
        tally: Answers by outcome.
        bodies: Generated requests by the name they were generated under.
        slowest: Seconds of the slowest answer, and what it answered.
    """

    def __init__(self, app: App, runner: asyncio.Runner) -> None:
        self.app = app
        self.tally: Counter[str] = Counter()
        self.bodies: Counter[str] = Counter()
        self.slowest = (0.0, "")
        self._runner = runner

    @property
    def service(self) -> Any:
        return self.app.app.state.flashtrace

    def wait(self, answer: Coroutine[Any, Any, Any]) -> Any:
        """Runs the application until there is an answer."""
        return self._runner.run(answer)

    def run(
        self, name: str, examples: int, made: st.SearchStrategy[Any], send: Callable[[Any], Any]
    ) -> int:
        """Sends ``examples`` times `SCALE` generated requests, always the same ones.

        Returns:
            How many were sent.
        """
        count = 0

        @seed(crc32(f"{name} {SEED}".encode()))
        @settings(
            max_examples=max(1, round(examples * SCALE)),
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(made)
        def each(request: Any) -> None:
            nonlocal count
            count += 1
            self._runner.run(send(request))

        each()
        self.bodies[name] += count
        return count

    async def send(self, sent: Sent) -> None:
        """One request; its answer and its engine calls are checked."""
        engine = self.app.engine
        engine.reset()
        engine.answers = list(sent.answers)
        headers = {"content-type": "application/json", **sent.headers}
        encoded = {name: value.encode() for name, value in headers.items()}
        response = await self.request("POST", sent.route, content=sent.body, headers=encoded)
        outcome = check(sent, response)
        if outcome in ("plain", "refused"):
            assert not engine.traces
        self.tally[outcome] += 1
        if "queued" in outcome:
            await self.settled()
        for call in engine.calls:
            self._check_call(call)

    async def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        began = time.monotonic()
        try:
            response = await in_time(self.app.client.request(method, path, **options))
        except TimeoutError:
            sent = options.get("content", options.get("json"))
            raise AssertionError(
                f"no answer to {method} {path} within {SECONDS} s: {sent!r:.4000}"
            ) from None
        self.slowest = max(self.slowest, (time.monotonic() - began, f"{method} {path[:40]}"))
        return response

    async def settled(self) -> None:
        """Waits until no deferred attribution is left unfinished."""

        async def finished() -> None:
            while self.service.deferred.unfinished:
                await asyncio.sleep(0)

        await in_time(finished())

    async def leftovers(self) -> dict[str, Any]:
        """What is still there of requests that have all been answered."""
        await self.settled()
        stored = await asyncio.to_thread(self.service.deferred.store.counts)
        load = self.service.tracer.load
        names = [task.get_name() for task in asyncio.all_tasks() - {asyncio.current_task()}]
        return {
            "unfinished": stored.get("queued", 0) + stored.get("running", 0),
            "places": load["running"] + load["waiting"],
            "accumulator_bytes": load["accumulator_bytes"],
            "reports": len(self.app.engine._reports),
            # One task looks after the finished entries of the store.
            "tasks": [name for name in names if name != "flashtrace-deferred-tender"],
        }

    def _check_call(self, call: Any) -> None:
        """A generation has nothing under our key; a trace has what its worker would accept."""
        sealed = (call.params.extra_args or {}).get(EXTRA_ARGS_KEY)
        if sealed is None:
            return
        assert type(sealed) is bytes
        self.tally["traces"] += 1
        spec = unseal(sealed)
        if isinstance(spec, ScoreSpec):
            length = len(call.prompt["prompt_token_ids"])
            assert 0 <= spec.first_row < spec.length == length, (spec, length)
            return
        assert all(t.weights.weights.sum() > 0 for t in spec.traced_targets())


async def in_time(answer: Awaitable[Any]) -> Any:
    """The result, or TimeoutError: a request must never hang."""
    return await asyncio.wait_for(answer, SECONDS)
