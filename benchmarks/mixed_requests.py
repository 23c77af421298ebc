"""The requests of `mixed_load`, and what each answer must hold.

Invariant: what a request is depends on its index and the seed alone.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

ABORTED, TRACED, STREAMED, DEFERRED = 0.2, 0.7, 0.5, 0.1
LONGEST_STAY_SECONDS = 4.0
_WORDS = ("river", "stone", "seven", "lamp", "north", "apple", "code", "4821", "green", "house")
_PATHS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
    "attributions": "/v1/attributions",
}
_FINAL = ("completed", "failed", "skipped")


@dataclass(slots=True)
class MixedRequest:
    """One request and what came of it.

    Attributes:
        route: Short name of the route.
        body: Its JSON body.
        attributions: Attribution objects that the answer must hold.
        deferred: Whether they are to be fetched later.
        stay_seconds: When the client leaves; None for one that waits.
        status: HTTP status, None if there was no answer.
        found: Attribution objects by id.
        fault: What was wrong with the answer, empty if nothing.
    """

    route: str
    body: dict[str, Any]
    attributions: int
    deferred: bool
    stay_seconds: float | None
    status: int | None = None
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    fault: str = ""

    @property
    def path(self) -> str:
        """Path of the route."""
        return _PATHS[self.route]

    @property
    def kind(self) -> str:
        """Route and form, for the tally."""
        streamed = " streamed" if self.body.get("stream") else ""
        traced = " traced" if self.attributions else ""
        return f"{self.route}{streamed}{traced}{' deferred' if self.deferred else ''}"

    def take(self, status: int, text: str) -> None:
        """Checks a whole answer."""
        self.status = status
        if status != 200:
            self.fault = f"HTTP {status}: {text[:200]}"
            return
        events = list(_events(text)) if self.body.get("stream") else [json.loads(text)]
        for event in events:
            for attribution in _attributions(event):
                self.found[attribution["id"]] = attribution
        statuses = Counter(attribution["status"] for attribution in self.found.values())
        expected = ("queued", "running", *_FINAL) if self.deferred else _FINAL
        if len(self.found) != self.attributions:
            self.fault = f"{len(self.found)} attributions for {self.attributions}"
        elif not statuses.keys() <= set(expected):
            self.fault = f"statuses {dict(statuses)}"
        elif not _is_whole(self.route, events, self.body):
            self.fault = "the answer is not whole"


def make_request(index: int, seed: int) -> MixedRequest:
    """The request of an index."""
    source = random.Random(f"{seed}-{index}")
    route = source.choices(list(_PATHS), weights=[4, 3, 1, 1, 1])[0]
    traced = route == "attributions" or source.random() < TRACED
    deferred = traced and source.random() < DEFERRED
    stay = source.uniform(0, LONGEST_STAY_SECONDS) if source.random() < ABORTED else None
    prompt = " ".join(source.choices(_WORDS, k=source.randint(10, 80)))
    body, choices = _body(route, prompt, source)
    if route != "attributions" and source.random() < STREAMED:
        body["stream"] = True
    if traced:
        body["flashtrace"] = {"hops": source.choice([0, 1, "auto"]), "top_k": 5}
        if deferred:
            body["flashtrace"]["mode"] = "deferred"
    return MixedRequest(route, body, choices if traced else 0, deferred, stay)


def _body(route: str, prompt: str, source: random.Random) -> tuple[dict[str, Any], int]:
    """A body and its number of choices."""
    tokens, choices = source.randint(4, 20), source.randint(1, 3)
    message = [{"role": "user", "content": prompt}]
    body: dict[str, Any] = {"model": "m"}
    if route == "chat":
        return body | {"messages": message, "max_tokens": tokens, "n": choices}, choices
    if route == "completions":
        return body | {"prompt": prompt, "max_tokens": tokens, "n": choices}, choices
    if route == "responses":
        return body | {"input": prompt, "max_output_tokens": tokens}, 1
    if route == "messages":
        return body | {"messages": message, "max_tokens": tokens}, 1
    answer = {"role": "assistant", "content": " ".join(source.choices(_WORDS, k=tokens))}
    return body | {"messages": [*message, answer]}, 1


def _events(text: str) -> Iterator[Any]:
    """The JSON payloads of a stream."""
    for line in text.splitlines():
        data = line.removeprefix("data:").strip()
        if data != line.strip() and data != "[DONE]":
            yield json.loads(data)


def _attributions(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        if node.get("object") == "flashtrace.attribution":
            yield node
        else:
            for value in node.values():
                yield from _attributions(value)
    elif isinstance(node, list):
        for value in node:
            yield from _attributions(value)


def _is_whole(route: str, events: list[Any], body: dict[str, Any]) -> bool:
    """Whether the completion itself came to its end."""
    if route == "attributions":
        return True
    if route in ("chat", "completions"):
        ended = {
            choice["index"]
            for event in events
            for choice in event.get("choices", ())
            if choice.get("finish_reason")
        }
        return ended == set(range(body["n"]))
    if body.get("stream"):
        last = "response.completed" if route == "responses" else "message_stop"
        # An answer cut short by its length ends as incomplete.
        ends = {last, "response.incomplete"}
        return any(event.get("type") in ends for event in events)
    return bool(events[0].get("output") or events[0].get("content"))
