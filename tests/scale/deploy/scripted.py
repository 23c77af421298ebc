"""A deployment's handle whose replicas run scripted applications; raises what Ray raises."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import ray.exceptions

from vllm_flashtrace.scale.deploy.exchange import Application, Message
from vllm_flashtrace.scale.deploy.served_replica import ServedApp


class ScriptedEngine:
    """Lives until it is told otherwise."""

    errored = False


def served(app: Application, name: str = "r") -> ServedApp:
    return ServedApp(app, ScriptedEngine(), None, name)


def as_raised(error: Exception) -> Exception:
    """What a caller sees of an exception that a replica raises."""
    return ray.exceptions.RayTaskError("forward", "traceback", error).as_instanceof_cause()


class Answer:
    """What a call gives: batches of messages, like Serve's response generator."""

    def __init__(self, batches: AsyncIterator[list[Message]], calls: list[str]) -> None:
        self._batches = batches
        self._calls = calls

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> list[Message]:
        return await anext(self._batches)

    def cancel(self) -> None:
        self._calls.append("cancelled")


class Handle:
    """Stands in the place of Serve's ``DeploymentHandle``: each request to the next attempt."""

    def __init__(self, *attempts: Callable[[Message, bytes], AsyncIterator[list[Message]]]) -> None:
        self._attempts = list(attempts)
        self.calls: list[str] = []
        self.pages: list[Any] = []

    def options(self, *, stream: bool) -> Handle:
        assert stream
        return self

    @property
    def forward(self) -> Handle:
        return self

    def remote(self, scope: Message, body: bytes) -> Answer:
        self.calls.append("asked")
        attempt = self._attempts.pop(0) if len(self._attempts) > 1 else self._attempts[0]
        return Answer(attempt(scope, body), self.calls)

    def broadcast(self, method: str) -> Handle:
        assert method == "metrics"
        return self

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        if isinstance(self.pages, Exception):
            raise self.pages
        return self.pages
