"""A whole engine with dummy weights of Qwen3-8B's shape: what attributions and the plugin cost.

    python -m benchmarks.gpu_engine --json OUT [--runner v1|v2] [--attention-backend NAME]

An engine with the plugin is measured first; then one with ``VLLM_FLASHTRACE_DISABLE=1`` starts
beside it on the same GPU of 80 GB, and both are measured in turn. Medians are compared. The JSON
file is written after every measurement, and one that fails leaves those before it.

- latency: seconds of a K = 1 attribution over those of prefilling as many tokens behind the same
  cached prefix without a trace;
- hops: attributions of 0, 1 and 4 hops, each with a prefill of its own and all from one;
- graphs: the CUDA graph mode of every step while requests decode, alone and beside a trace. Steps
  that hold target rows of a trace must be the only ones without a graph;
- batch: requests per second of a batch that is attributed over one that is not;
- decoding: generated tokens per second of both engines, with no trace anywhere.

Takes about 12 minutes on an H100, half of it for the two starts; ``--limit-seconds`` ends it.
``--small`` takes a tiny shape and few tokens, and runs on a CPU too, in one to two minutes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_engine_process import (
    EAGER_DECODE,
    EngineFailedError,
    EngineSpec,
    RemoteEngine,
    running,
)
from benchmarks.tables import plain

_GIB = 1 << 30
_SETTLE_SECONDS = 1.0
"""Before a measurement: threads of the other engine spin for a while after their last step."""


QWEN3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}

SMALL: dict[str, Any] = {
    **QWEN3_8B,
    "head_dim": 64,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
}


def write_model(folder: Path, *, small: bool, layers: int | None) -> dict[str, Any]:
    """Writes ``config.json`` and returns it.

    Args:
        folder: An existing folder.
        small: A tiny shape instead of Qwen3-8B's.
        layers: Number of layers; the shape's own if None.
    """
    config = dict(SMALL if small else QWEN3_8B)
    if layers is not None:
        config["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return config


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured.

    Attributes:
        cases: Contexts, reasoning and output tokens of attributions.
        hops: The case that is attributed with several hops.
        decoding: Requests at once, prompt tokens, new tokens.
        batch: The same, of the batch that is attributed or not.
        graphs: Requests that decode, context and target rows of the trace beside them.
        max_model_len: Longest text.
    """

    cases: tuple[str, ...]
    hops: str
    decoding: tuple[tuple[int, int, int], ...]
    batch: tuple[int, int, int]
    graphs: tuple[int, int, int]
    max_model_len: int


FULL = Sizes(
    cases=("2048,256,128", "8192,1024,256", "32768,1024,512", "32768,16384,512"),
    hops="8192,1024,256",
    decoding=((1, 32, 256), (64, 32, 256)),
    batch=(64, 512, 256),
    graphs=(16, 8192, 512),
    max_model_len=33024,
)
TINY = Sizes(
    cases=("300,60,20",),
    hops="300,60,20",
    decoding=((2, 16, 16),),
    batch=(3, 64, 24),
    graphs=(2, 400, 40),
    max_model_len=512,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints.

    Returns:
        1 if an engine failed, the time was up or decode steps lost their graphs; 2 without a GPU.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--runner", choices=("v1", "v2"))
    parser.add_argument("--attention-backend")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of every measurement")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--trace-graphs", action="store_true", help="with that option on")
    parser.add_argument("--limit-seconds", type=float, default=1200.0)
    options = parser.parse_args(arguments)
    import torch

    on_gpu = torch.cuda.is_available()
    if not on_gpu and not options.small:
        print("no CUDA device; --small runs a tiny model on the CPU", file=sys.stderr)
        return 2
    deadline = time.monotonic() + options.limit_seconds
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
    }
    problem = ""

    def save() -> None:
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as folder:
        try:
            _measure(options, Path(folder), on_gpu, deadline, result, save)
        except EngineFailedError as error:
            problem = str(error)
    save()
    show(result)
    if problem:
        print(problem, file=sys.stderr)
    return int(bool(problem))


def _measure(
    options: argparse.Namespace,
    folder: Path,
    on_gpu: bool,
    deadline: float,
    result: dict[str, Any],
    save: Callable[[], None],
) -> None:
    """Fills in what could be measured until the time was up."""
    sizes = TINY if options.small else FULL
    config = write_model(folder, small=options.small, layers=options.layers)
    result["layers"], result["hidden_size"] = config["num_hidden_layers"], config["hidden_size"]
    engine_arguments = _engine_arguments(options, sizes, on_gpu)

    def spec(plugin: bool) -> EngineSpec:
        return EngineSpec(
            str(folder), config["vocab_size"], plugin, options.runner, engine_arguments
        )

    with running(spec(plugin=True), deadline) as ours:
        facts = ours.ask("facts")
        result["attention_backend"] = facts["attention_backend"]
        if facts["refusal"] is not None:
            raise EngineFailedError(f"the engine cannot trace: {facts['refusal']}")
        result["latency"] = []
        for case in sizes.cases:
            result["latency"].append(ours.ask("latency", case, options.repeats))
            save()
        result["hops"] = ours.ask("hops", sizes.hops, options.repeats)
        save()
        result["graphs"] = ours.ask("graph_modes", *sizes.graphs)
        result["batch"] = _batch(ours, sizes, options.repeats)
        save()
        with running(spec(plugin=False), deadline) as stock:
            result["decoding"] = _decoding(ours, stock, sizes, options.repeats)
    eager = result["graphs"]["beside a trace"].get(EAGER_DECODE, 0)
    if on_gpu and eager:
        raise EngineFailedError(f"{eager} decode steps without target rows replayed no CUDA graph")


def _engine_arguments(options: argparse.Namespace, sizes: Sizes, on_gpu: bool) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": sizes.max_model_len,
        "enforce_eager": not on_gpu,
    }
    if options.attention_backend:
        arguments["attention_backend"] = options.attention_backend
    if options.trace_graphs:
        arguments["additional_config"] = {"flashtrace": {"trace_graphs": True}}
    if on_gpu:
        # Two engines share the GPU. A token of Qwen3-8B takes 144 KiB of cache.
        arguments |= {"dtype": "bfloat16", "gpu_memory_utilization": 0.45}
        arguments["kv_cache_memory_bytes"] = 1 * _GIB if options.small else 12 * _GIB
    else:
        arguments["kv_cache_memory_bytes"] = _GIB // 4
    return arguments


def _decoding(
    ours: RemoteEngine, stock: RemoteEngine, sizes: Sizes, repeats: int
) -> list[dict[str, Any]]:
    """Rounds in turn; every second one begins with the other engine."""
    rows = []
    for load in sizes.decoding:
        rates: dict[str, list[float]] = {"plugin": [], "stock": []}
        for number in range(repeats + 1):
            pair = [("plugin", ours), ("stock", stock)]
            for name, engine in pair[:: 1 if number % 2 else -1]:
                time.sleep(_SETTLE_SECONDS)
                rate = engine.ask("decode", *load)
                if number:  # The first round warms up.
                    rates[name].append(rate)
        ratios = [a / b for a, b in zip(rates["plugin"], rates["stock"], strict=True)]
        rows.append(
            {
                "requests": load[0],
                "new_tokens": load[2],
                "plugin_tokens_per_second": statistics.median(rates["plugin"]),
                "stock_tokens_per_second": statistics.median(rates["stock"]),
                "ratio": statistics.median(ratios),
                "ratios": ratios,
            }
        )
    return rows


def _batch(ours: RemoteEngine, sizes: Sizes, repeats: int) -> dict[str, Any]:
    rates: dict[bool, list[float]] = {True: [], False: []}
    for number in range(repeats + 1):
        for traced in (True, False) if number % 2 else (False, True):
            rate = ours.ask("batch", *sizes.batch, traced)
            if number:
                rates[traced].append(rate)
    requests, prompt, new_tokens = sizes.batch
    traced, untraced = (statistics.median(rates[key]) for key in (True, False))
    return {
        "requests": requests,
        "prompt": prompt,
        "new_tokens": new_tokens,
        "traced_rps": traced,
        "untraced_rps": untraced,
        "ratio": statistics.median(a / b for a, b in zip(rates[True], rates[False], strict=True)),
    }


def show(result: dict[str, Any]) -> None:
    """Prints whatever was measured before the end."""
    backend, layers = result.get("attention_backend"), result.get("layers")
    print(f"{result['device']}, {backend}, {layers} layers, torch {result['torch']}")
    single = [result["batch"]] if "batch" in result else []
    for title, rows in (
        ("K = 1 attribution to its floor", result.get("latency")),
        ("Further hops, each with a prefill or all from one", result.get("hops")),
        ("Batch, attributed to not", single),
        ("Decoding without traces, plugin to stock", result.get("decoding")),
    ):
        if rows:
            print(f"\n{title}:\n\n{plain(rows)}")
    if graphs := result.get("graphs"):
        for when in ("alone", "beside a trace"):
            counts = ", ".join(f"{n} steps {mode}" for mode, n in sorted(graphs[when].items()))
            print(f"\ndecoding {when} (runner {graphs['runner']}): {counts}")


if __name__ == "__main__":
    sys.exit(main())
