"""Host time of a step with target rows on a GPU, without a GPU.

The whole host code of a GPU worker runs, from the scheduler's output to the scores' way to the
host, over a model of the shape of Qwen3-8B whose tensors have no memory (`absent_gpu`). What the
device would do takes no time, and the launch itself, CUDA's and Triton's code in C++, is left out.
So these are microseconds of a thread's CPU time, nearly all of it Python's: their ratios say what a
change brings, and times on a GPU machine are others.

    python -m benchmarks.gpu_host [--against FOLDER] [--rounds N] [--json OUT]

`--against` measures another checkout of this repository as well, round by round in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from benchmarks import tables
from benchmarks.absent_gpu import DEVICE, absent_gpu, cheap_operations, count_of

ROOT = Path(__file__).parents[1]
SHAPE = {"layers": 36, "heads": 32, "kv_heads": 8, "head_dim": 128, "hidden_size": 4096}
BLOCK_SIZE = 16
_WARM_UP = 3

_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": SHAPE["hidden_size"],
    "num_attention_heads": SHAPE["heads"],
    "num_key_value_heads": SHAPE["kv_heads"],
    "head_dim": SHAPE["head_dim"],
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "attention_bias": False,
}


@dataclass(frozen=True)
class Case:
    """Traces whose rows are all in one step.

    Attributes:
        traces: How many.
        rows: Target rows of each.
        context: Tokens of each, targets included.
        hops: Further hops, for which rows are kept.
    """

    traces: int
    rows: int
    context: int
    hops: int = 0

    @property
    def name(self) -> str:
        """As the table has it."""
        name = f"{self.traces} x {self.rows:,} rows of {self.context:,} tokens"
        return f"{name}, kept for {self.hops} hops" if self.hops else name


CASES = (
    Case(1, 256, 2048),
    Case(1, 1024, 8192),
    Case(1, 4096, 32768),
    Case(8, 128, 1024),
    Case(64, 32, 512),
    Case(1, 256, 2048, hops=2),
)
PARTS = ("new_requests", "beginning", "first_layer", "other_layer", "flush", "end", "step")
"""Microseconds, in the order in which they pass: `end` includes `flush`, `other_layer` is the
median of all layers but the first, and `step` is everything."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures this checkout, and another beside it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", type=Path, metavar="FOLDER")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5, help="of each case in a round")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        return serve(options.serve.resolve(), options.steps)
    trees = {"now": ROOT} | ({"before": options.against} if options.against else {})
    result = compare(trees, options.rounds, options.steps)
    tables.emit(result, tables.gpu_host(result), options.json)
    return 0


def compare(trees: dict[str, Path], rounds: int, steps: int) -> dict[str, Any]:
    """Medians over rounds, in which every tree has its turn."""
    with contextlib.ExitStack() as stack:
        measured = {
            name: stack.enter_context(_process(tree.resolve(), steps))
            for name, tree in trees.items()
        }
        seen: dict[str, list[Any]] = {name: [] for name in trees}
        for _ in range(rounds):
            for name, measure in measured.items():
                seen[name].append(measure())
    rows = []
    for index, case in enumerate(CASES):
        row: dict[str, Any] = {"case": case.name, **vars(case)}
        for name, results in seen.items():
            own = [result[index]["microseconds"] for result in results]
            row[name] = {part: round(_median(own, part), 1) for part in PARTS}
            row[name] |= results[0][index]["counts"]
        rows.append(row)
    return {"shape": SHAPE, "date": time.strftime("%Y-%m-%d"), "cpu": _cpu(), "rows": rows}


def _median(results: list[dict[str, float]], part: str) -> float:
    return statistics.median(result[part] for result in results)


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "unknown"


@contextlib.contextmanager
def _process(tree: Path, steps: int) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """A process that measures a tree; the function measures one round."""
    environment = {
        **os.environ,
        "VLLM_TARGET_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    command = [sys.executable, "-m", __spec__.name, "--serve", str(tree), "--steps", str(steps)]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        source, sink = process.stdout, process.stdin

        def measure() -> list[dict[str, Any]]:
            sink.write("\n")
            sink.flush()
            while line := source.readline():
                if line.startswith("["):
                    result: list[dict[str, Any]] = json.loads(line)
                    return result
            raise RuntimeError(f"measuring {tree} has failed")

        try:
            yield measure
        finally:
            sink.close()


def serve(tree: Path, steps: int) -> int:
    """Measures a round of all cases for every line of the standard input."""
    import_from(tree)
    with tempfile.TemporaryDirectory() as folder, worker(Path(folder)) as measured:
        for case in CASES:
            for _ in range(_WARM_UP):
                measured.step(case)
        for _ in sys.stdin:
            print(json.dumps([measured.case(case, steps) for case in CASES]), flush=True)
    return 0


def import_from(tree: Path) -> None:
    """Takes the package from a checkout, before anything else of it is imported."""
    sys.path.insert(0, str(tree))
    import vllm_flashtrace

    if not (tree / "vllm_flashtrace" / "patches").exists():  # An installation has it there.
        vllm_flashtrace.__path__.append(str(tree))
    if not Path(str(vllm_flashtrace.__file__)).is_relative_to(tree):
        raise RuntimeError(f"{vllm_flashtrace.__file__} does not belong to {tree}")


@contextlib.contextmanager
def worker(folder: Path, layers: int = SHAPE["layers"]) -> Iterator[Worker]:
    """A worker that has nothing but the layers' shapes, on a GPU that is not there.

    Args:
        folder: An empty one, for the model's configuration.
        layers: How many the model has.
    """
    import torch
    from vllm.distributed import cleanup_dist_env_and_memory

    torch.set_num_threads(1)
    try:
        runner = _runner(folder, layers)
        with absent_gpu() as counts, torch.inference_mode():
            made = Worker(runner, counts)
            gc.collect()
            gc.freeze()  # As vLLM does.
            with cheap_operations():
                yield made
    finally:
        gc.unfreeze()
        cleanup_dist_env_and_memory()


def _runner(folder: Path, layers: int) -> Any:
    """What the capture reads of vLLM's V2 runner."""
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.platforms.cpu import CpuPlatform
    from vllm.utils.torch_utils import set_default_torch_dtype
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from vllm_flashtrace.worker.taps import place_taps

    (folder / "config.json").write_text(json.dumps(_CONFIG | {"num_hidden_layers": layers}))
    config = EngineArgs(
        model=str(folder),
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=40960,
        max_num_batched_tokens=8192,
        skip_tokenizer_init=True,
        block_size=BLOCK_SIZE,
        max_num_seqs=256,
    ).create_engine_config()
    backend = "vllm_flashtrace.patches.attention_backends.RecordingTritonAttentionBackend"
    path = classmethod(lambda *_, **__: backend)
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
        initialize_model_parallel(1, 1)
    meta = torch.device("meta")
    with (
        patch.object(CpuPlatform, "get_attn_backend_cls", path),
        set_current_vllm_config(config),
        set_default_torch_dtype(torch.bfloat16),
        meta,
    ):
        model = get_model_loader(config.load_config).create_model(config, config.model_config)
    place_taps(model, config)
    attentions = config.compilation_config.static_forward_context
    groups, dim = SHAPE["kv_heads"], SHAPE["head_dim"]
    for attention in attentions.values():
        blocks = torch.empty(
            1 << 14, BLOCK_SIZE, groups, 2 * dim, dtype=torch.bfloat16, device=meta
        )
        attention.kv_cache = blocks.transpose(1, 2)
    spec = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=groups, head_size=dim, dtype=torch.bfloat16
    )
    names = list(attentions)
    return SimpleNamespace(
        vllm_config=config,
        kv_cache_config=SimpleNamespace(
            kv_cache_groups=[SimpleNamespace(layer_names=names, kv_cache_spec=spec)],
            num_blocks=1 << 14,
        ),
        attn_groups=[[SimpleNamespace(layer_names=names, kernel_block_size=None)]],
        pcp_manager=None,
        device=DEVICE,
        model=model,
        get_model=lambda: model,
    )


class Worker:
    """Runs steps of traces on a worker's capture, and times their parts."""

    def __init__(self, runner: Any, counts: Counter[str]) -> None:
        """Makes the capture, and takes its memory as a worker does."""
        from vllm_flashtrace.worker.runner import RunnerCapture

        self._runner, self._counts = runner, counts
        self._capture = RunnerCapture(runner)
        if self._capture.refusal is not None:
            raise RuntimeError(self._capture.refusal)
        self._capture.settle_budget()
        self._names = sorted(
            runner.vllm_config.compilation_config.static_forward_context, key=_layer_number
        )

    def case(self, case: Case, steps: int) -> dict[str, Any]:
        """Medians of some steps, and the counts of one more."""
        timed = [self.step(case) for _ in range(steps)]
        counts = self.step(case, counted=True)
        return {"microseconds": {part: _median(timed, part) for part in PARTS}, "counts": counts}

    def step(self, case: Case, counted: bool = False) -> dict[str, Any]:
        """One step with new traces that end in it.

        Returns:
            Microseconds, see `PARTS`; or what `count_of` counts, by part.
        """
        batch, output = self._batch(case)
        query, stream = self._activations(case)
        capture, times, found = self._capture, {}, {}

        def part(name: str, call: Callable[[], Any]) -> Any:
            results: list[Any] = []
            if counted:
                found[name] = count_of(lambda: results.append(call()), self._counts)
            else:
                began = time.thread_time_ns()
                results.append(call())
                times[name] = (time.thread_time_ns() - began) / 1000
            return results[0]

        gc.collect()
        gc.disable()
        try:
            with _hops_that_follow(case, self._counts):
                part("new_requests", lambda: capture.observe(output))
                observer = part("beginning", lambda: capture.begin_forward(batch))
                if observer is None:
                    raise RuntimeError("the step has no target rows")
                layers = []
                for index, name in enumerate(self._names):

                    def layer(name: str = name) -> None:
                        observer.on_attention(name, query, query)
                        observer.on_update(stream, stream)

                    part(f"layer {index}", layer)
                    layers.append(f"layer {index}")
                flush = observer.step.flush
                observer.step.flush = lambda: part("flush", flush)
                # Counting within what is counted would count twice.
                if counted:
                    observer.step.flush = flush
                part("end", lambda: capture.end_forward(observer))
        finally:
            gc.enable()
        self._check(case, output)
        if counted:
            return _counts_of_step(found, layers)
        others = [times.pop(name) for name in layers]
        times["step"] = sum(others) + sum(times[n] for n in ("new_requests", "beginning", "end"))
        return times | {"first_layer": others[0], "other_layer": statistics.median(others[1:])}

    def _batch(self, case: Case) -> tuple[Any, Any]:
        """The step's requests, each with all of its target rows, and the scheduler's output."""
        import numpy as np
        import torch
        from vllm.sampling_params import SamplingParams
        from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

        from vllm_flashtrace.core.hops import FurtherHops, TracedTarget
        from vllm_flashtrace.core.weights import TargetWeights
        from vllm_flashtrace.trace.wire import EXTRA_ARGS_KEY, TraceSpec, seal
        from vllm_flashtrace.worker.runner import batch_rows_v2

        first = case.context - case.rows
        positions = torch.arange(first, case.context)
        target = TracedTarget(TargetWeights(positions, torch.ones(case.rows)))
        if case.hops:
            middle = case.rows // 2
            target = TracedTarget(
                TargetWeights(positions[middle:], torch.ones(case.rows - middle)),
                FurtherHops(positions[:middle], case.hops),
            )
        output = SchedulerOutput.make_empty()
        tokens, ids = [0] * (case.context + 1), list(range(1, -(-case.context // BLOCK_SIZE) + 1))
        for _ in range(case.traces):
            spec = TraceSpec.create([target], len(tokens), exact_fraction=1.0)
            req_id = spec.nonce
            output.scheduled_new_reqs.append(
                NewRequestData(
                    req_id=req_id,
                    prompt_token_ids=tokens,
                    mm_features=[],
                    sampling_params=SamplingParams(
                        max_tokens=1, extra_args={EXTRA_ARGS_KEY: seal(spec)}
                    ),
                    pooling_params=None,
                    block_ids=(ids,),
                    num_computed_tokens=first,
                    lora_request=None,
                    prefill_token_ids=tokens,
                )
            )
            output.num_scheduled_tokens[req_id] = case.rows + 1
        output.total_num_scheduled_tokens = case.traces * (case.rows + 1)
        starts = np.arange(case.traces + 1) * (case.rows + 1)
        input_batch = SimpleNamespace(
            query_start_loc_np=starts,
            num_computed_tokens_np=np.full(case.traces, first),
            num_scheduled_tokens=np.diff(starts),
            req_ids=list(output.num_scheduled_tokens),
        )
        table = torch.empty(256, 1 << 12, dtype=torch.int32, device="meta")
        return lambda groups: batch_rows_v2(self._runner, input_batch, [table], groups), output

    def _activations(self, case: Case) -> tuple[Any, Any]:
        import torch

        tokens = case.traces * (case.rows + 1)
        empty = functools.partial(torch.empty, dtype=torch.bfloat16, device="meta")
        query = empty(tokens, SHAPE["heads"], SHAPE["head_dim"])
        return query, empty(tokens, SHAPE["hidden_size"])

    def _check(self, case: Case, output: Any) -> None:
        """Every trace must have ended well; its result is thrown away."""
        recorder = self._capture.recorder
        for new in output.scheduled_new_reqs:
            handed = recorder.hand_out([new.req_id])
            stored = None if handed is None else handed._results[new.req_id][1].result
            if not hasattr(stored, "copied"):
                raise RuntimeError(f"{case.name}: {stored}")
            recorder.buffers.give_back(stored.copied)
        recorder.drop([new.req_id for new in output.scheduled_new_reqs])


def _layer_number(name: str) -> int:
    return int(name.split("layers.")[1].partition(".")[0])


@contextlib.contextmanager
def _hops_that_follow(case: Case, counts: Counter[str]) -> Iterator[None]:
    """A hop's scores, which nobody has computed, stand for those that the host waits for."""
    import torch

    from vllm_flashtrace.core.hops import FurtherHops

    scores, stock = torch.ones(case.context + 1), FurtherHops.after

    def after(further: Any, _: Any, mass: float) -> Any:
        counts["wait"] += 1
        return stock(further, scores, mass)

    with patch.object(FurtherHops, "after", after):
        yield


def _counts_of_step(found: dict[str, dict[str, Any]], layers: Sequence[str]) -> dict[str, Any]:
    """Counts by part: of a layer that is not the first, the largest."""

    def launches(name: str) -> int:
        return sum(found[name]["launches"].values())

    def total(what: str, *names: str) -> int:
        return sum(found[name][what] for name in names)

    of_step = ("beginning", *layers, "end")
    return {
        "launches_beginning": launches("beginning"),
        "launches_first_layer": launches(layers[0]),
        "launches_layer": max(map(launches, layers[1:])),
        "launches_end": launches("end"),
        "launches": sum(map(launches, of_step)),
        "allocations": total("allocations", *of_step),
        "allocations_layer": max(found[name]["allocations"] for name in layers[1:]),
        "page_locked": total("page_locked", *of_step),
        "events": total("events", *of_step),
        "waits": total("waits", "new_requests", *of_step),
        "by_name": {name: found[name]["launches"] for name in ("beginning", layers[0], "end")},
    }


if __name__ == "__main__":
    sys.exit(main())
