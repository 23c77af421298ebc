"""Attributions of existing texts, one after another, beside a load of completions.

Invariant: every text is new to the server, so each attribution prefills all of it, and every one
that was begun is finished.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.load_client import MODEL, RequestFailedError, random_prompts


@dataclass(slots=True)
class ExistingTexts:
    """A client that asks for attributions while others stream.

    Attributes:
        prompt_length: Tokens of each prompt.
        completion_length: Tokens of each completion.
        flashtrace: The field of each request.
        seed: Of the texts.
        pause_seconds: From the end of an attribution to the next request.
        seconds: How long each attribution took.
    """

    prompt_length: int
    completion_length: int
    flashtrace: dict[str, Any]
    seed: object
    pause_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)

    async def attribute_until(self, over: asyncio.Event, client: httpx.AsyncClient) -> None:
        """Sends one request after another until ``over``.

        Raises:
            RequestFailedError: A text was not attributed.
        """
        for body in self._bodies():
            if over.is_set():
                return
            began = time.perf_counter()
            response = await client.post("/v1/attributions", json=body)
            if response.status_code != 200 or response.json()["status"] != "completed":
                raise RequestFailedError(f"no attribution: {response.text[:500]}")
            self.seconds.append(time.perf_counter() - began)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), self.pause_seconds)

    def _bodies(self) -> Iterator[dict[str, Any]]:
        length = self.prompt_length + self.completion_length
        source = random.Random(str(self.seed))
        for number in itertools.count():
            [tokens] = random_prompts((number, source.random()), 1, length)
            yield {
                "model": MODEL,
                "prompt": tokens[: self.prompt_length],
                "completion": tokens[self.prompt_length :],
                "flashtrace": self.flashtrace,
            }
