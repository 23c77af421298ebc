"""Gaps between the tokens of untraced streams beside long prompts that are traced with everything.

One server of a tiny random model, some untraced streams that never end, and beside them, in turn:
nothing (`alone`), long prompts without the field (`untraced`), the same with a small attribution
(`top 20`), and with scores per layer and of every token (`all`). The rounds repeat in one run, so
that what else the machine does meets all of them. A chunk of a long prompt delays the next token
in vLLM itself: what the plugin adds is `all` against `untraced`, and what its large answers add is
`all` against `top 20`.

    python -m benchmarks.token_gap [--tokens 32768] [--rounds 3] [--json OUT]

More than an hour on 2 free CPU cores. Exits 1 if an attribution is not completed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from rich.progress import Progress

from benchmarks.load import MODEL, client, end_servers_on_signals, plugin_server
from benchmarks.tables import emit, plain
from tests.tiny_models import make_tiny_model

CONDITIONS: dict[str, Any] = {
    "alone": None,
    "untraced": None,
    "top 20": {"hops": 0},
    "all": {"hops": 0, "top_k": None, "include": ["layers"]},
}
_ROUTE = "/v1/completions"
# Of the tiny model's vocabulary of 512.
_PLAIN_TOKENS = range(16, 500)
_OUTPUT_TOKENS = 4
_COMPLETED = b'"status":"completed"'


class Streams:
    """Streams beside everything else, and when their tokens came.

    Attributes:
        gaps: Seconds between two parts of one stream, since `restart`.
    """

    def __init__(self) -> None:
        """Nothing runs yet."""
        self.gaps: list[float] = []

    def restart(self) -> None:
        """Forgets what was before."""
        self.gaps = []

    async def read(self, http: httpx.AsyncClient, body: dict[str, Any]) -> None:
        """Reads one stream after the other until cancelled."""
        while True:
            async with http.stream("POST", _ROUTE, json=body) as response:
                response.raise_for_status()
                last = None
                async for _ in response.aiter_bytes():
                    now = time.perf_counter()
                    if last is not None:
                        self.gaps.append(now - last)
                    last = now


@asynccontextmanager
async def running_streams(http: httpx.AsyncClient, count: int) -> AsyncIterator[Streams]:
    """So many streams, for as long as the block lasts."""
    streams = Streams()
    body = {
        "model": MODEL,
        "prompt": "The tide",
        "max_tokens": 1800,
        "ignore_eos": True,
        "stream": True,
    }
    tasks = [asyncio.create_task(streams.read(http, {**body, "seed": i})) for i in range(count)]
    try:
        yield streams
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def send_long(http: httpx.AsyncClient, content: bytes, traced: bool) -> float:
    """Sends one long prompt; seconds until its answer was there.

    Raises:
        RuntimeError: It was not answered, or its attribution is not completed.
    """
    began, completed, end = time.perf_counter(), False, b""
    headers = {"content-type": "application/json"}
    async with http.stream("POST", _ROUTE, content=content, headers=headers) as response:
        async for part in response.aiter_bytes():
            completed = completed or _COMPLETED in end + part
            end = part[-len(_COMPLETED) :]
    if response.status_code != 200 or completed != traced:
        raise RuntimeError(f"HTTP {response.status_code}, attribution completed: {completed}")
    return time.perf_counter() - began


async def measure(
    http: httpx.AsyncClient,
    condition: str,
    streams: Streams,
    options: argparse.Namespace,
    seed: str,
) -> dict[str, Any]:
    """One condition of one round."""
    source, field = random.Random(seed), CONDITIONS[condition]
    contents = []
    for _ in range(options.requests):
        body = {
            "model": MODEL,
            "prompt": source.choices(_PLAIN_TOKENS, k=options.tokens),
            "max_tokens": _OUTPUT_TOKENS,
            "ignore_eos": True,
        }
        contents.append(json.dumps(body | ({"flashtrace": field} if field else {})).encode())
    await asyncio.sleep(1.0)
    streams.restart()
    seconds: list[float] = []
    if condition == "alone":
        await asyncio.sleep(options.seconds)
    else:
        places = asyncio.Semaphore(options.concurrency)

        async def one(content: bytes) -> None:
            async with places:
                seconds.append(await send_long(http, content, field is not None))

        async with asyncio.TaskGroup() as group:
            for content in contents:
                group.create_task(one(content))
    gaps = sorted(streams.gaps)
    if len(gaps) < 2:
        raise RuntimeError("the streams stand still")
    return {
        "condition": condition,
        "gaps": len(gaps),
        "longest_ms": 1000 * gaps[-1],
        "p99_ms": 1000 * gaps[int(0.99 * (len(gaps) - 1))],
        "median_ms": 1000 * statistics.median(gaps),
        "answer_seconds": statistics.median(seconds) if seconds else None,
    }


async def rounds(url: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All conditions in turn, as often as asked for, after one round to warm up."""
    rows: list[dict[str, Any]] = []
    async with client(url, seconds=1800) as http:
        with Progress() as progress:
            task = progress.add_task("conditions", total=(options.rounds + 1) * len(CONDITIONS))
            async with running_streams(http, options.streams) as streams:
                for number in range(options.rounds + 1):
                    for condition in CONDITIONS:
                        seed = f"{options.seed}-{number}-{condition}"
                        row = await measure(http, condition, streams, options, seed)
                        if number:
                            rows.append({"round": number, **row})
                        progress.advance(task)
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per condition the medians over the rounds, and the ratios of each round's own figures."""
    found = []
    for condition in CONDITIONS:
        own = [row for row in rows if row["condition"] == condition]
        line: dict[str, Any] = {"beside": condition, "gaps": sum(row["gaps"] for row in own)}
        for key in ("longest_ms", "p99_ms", "median_ms"):
            line[key] = statistics.median(row[key] for row in own)
        for other in ("alone", "untraced", "top 20"):
            base = [row for row in rows if row["condition"] == other]
            for key, name in (("longest_ms", "longest"), ("p99_ms", "p99")):
                ratios = [a[key] / b[key] for a, b in zip(own, base, strict=True)]
                line[f"{name} to {other}"] = statistics.median(ratios)
        found.append(line)
    return found


def make_model(folder: Path, tokens: int) -> Path:
    """A tiny random model for so many positions."""
    make_tiny_model("llama", folder)
    for name, key in (
        ("config.json", "max_position_embeddings"),
        ("tokenizer_config.json", "model_max_length"),
    ):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), key: tokens}), "utf-8")
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=32768, help="of a long prompt")
    parser.add_argument("--requests", type=int, default=4, help="long prompts per condition")
    parser.add_argument("--concurrency", type=int, default=2, help="long prompts at once")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=20.0, help="of the streams alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of an engine's step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    end_servers_on_signals()
    length = max(options.tokens, 2048) + 64
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model", length)
        engine = [f"--max-model-len={length}", f"--max-num-batched-tokens={options.chunk}"]
        with plugin_server(model, Path(folder) / "server.log", engine) as server:
            rows = asyncio.run(rounds(server.url, options))
    settings = {key: value for key, value in vars(options).items() if key != "json"}
    medians = summary(rows)
    emit({"settings": settings, "summary": medians, "rows": rows}, plain(medians), options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
