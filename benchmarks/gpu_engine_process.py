"""An engine in a process of its own, and what is measured on it.

Every answer has a time limit, and whatever happens, the process and all it started are gone when
the ``with`` block of its engine ends. Prompts are random and new each time, so the prefix cache
holds only what a measurement put there itself.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.hops import measure as measure_hops
from benchmarks.trace_latency import Bench, Case, attribute_together
from tests.engine.harness import Engine, TraceJob
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.trace.config import FlashTraceConfig

_STOP_SECONDS = 30.0


class EngineFailedError(RuntimeError):
    """An engine did not start, did not answer in time, or raised."""


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What engine to start.

    Attributes:
        folder: Model folder.
        vocabulary: Number of token ids.
        plugin: Whether the plugin loads.
        runner: ``v1``, ``v2`` or None for vLLM's choice.
        arguments: Of ``vllm.LLM``, over those of the test harness.
    """

    folder: str
    vocabulary: int
    plugin: bool
    runner: str | None
    arguments: dict[str, Any]


class RemoteEngine:
    """The near end: calls methods of `gpu_engine_measures.Measures` in the process."""

    def __init__(self, connection: Connection, deadline: float) -> None:
        self._connection = connection
        self._deadline = deadline

    def ask(self, method: str, *arguments: Any) -> Any:
        """Calls a method and waits for its result.

        Raises:
            EngineFailedError: It raised, or the time is up.
        """
        try:
            self._connection.send((method, arguments))
        except OSError:
            raise EngineFailedError("the engine's process ended") from None
        return self.answer()

    def answer(self) -> Any:
        """Waits for the next result; see `ask`."""
        try:
            if not self._connection.poll(max(0.0, self._deadline - time.monotonic())):
                raise EngineFailedError("the time is up")
            result, problem = self._connection.recv()
        except (EOFError, OSError):
            raise EngineFailedError("the engine's process ended") from None
        if problem:
            raise EngineFailedError(problem)
        return result

    def stop(self) -> None:
        """Asks the engine to end."""
        self._connection.send(None)


@contextmanager
def running(spec: EngineSpec, deadline: float) -> Iterator[RemoteEngine]:
    """An engine that is ready.

    Args:
        spec: What to start.
        deadline: By `time.monotonic`, when every answer must be there.

    Raises:
        EngineFailedError: It does not start.
    """
    context = multiprocessing.get_context("spawn")
    near, far = context.Pipe()
    process = context.Process(target=_serve, args=(far, spec))
    process.start()
    far.close()
    engine = RemoteEngine(near, deadline)
    try:
        engine.answer()
        yield engine
        with contextlib.suppress(OSError):
            engine.stop()
        process.join(_STOP_SECONDS)
    finally:
        # The process leads a group, in which the engine's own processes are.
        if process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()


def _serve(connection: Connection, spec: EngineSpec) -> None:
    """The far end."""
    os.setsid()
    os.environ["VLLM_FLASHTRACE_DISABLE"] = "0" if spec.plugin else "1"
    if spec.runner is not None:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(spec.runner == "v2"))
    try:
        measures = Measures(spec)
    except BaseException:
        connection.send((None, traceback.format_exc()))
        return
    connection.send((None, ""))
    while (request := connection.recv()) is not None:
        method, arguments = request
        try:
            connection.send((getattr(measures, method)(*arguments), ""))
        except Exception:
            connection.send((None, traceback.format_exc()))
    measures.close()


_FIRST_TOKEN = 600
"""Tokens below it are those with which `Bench.floor` fills its prompts."""


class Measures:
    """One engine with dummy weights."""

    def __init__(self, spec: EngineSpec) -> None:
        self._vocabulary = spec.vocabulary
        self._random = random.Random(0)

        self._engine = Engine(
            Path(spec.folder), "a benchmark", worker_process=True, **spec.arguments
        )

    def close(self) -> None:
        """Ends the engine."""
        self._engine.close()

    def facts(self) -> dict[str, Any]:
        """Of the engine: its attention backend, and why it refuses traces, if it does."""
        backend = self._engine.on_worker(attention_backend)
        return {"attention_backend": backend, "refusal": self._engine.status()["refusal"]}

    def decode(self, requests: int, prompt: int, new_tokens: int) -> float:
        """Generated tokens per second of so many requests at once, prefill included."""
        prompts = [self._tokens(prompt) for _ in range(requests)]
        began = time.perf_counter()
        self._complete(prompts, new_tokens)
        return requests * new_tokens / (time.perf_counter() - began)

    def latency(self, text: str, repeats: int) -> dict[str, Any]:
        """Seconds of an attribution and of the same prefill without it, in turn.

        Args:
            text: A case of `benchmarks.trace_latency`.
            repeats: Pairs of an attribution and a floor.
        """
        case = Case.parse(text)
        row = Bench(self._engine, case, self._tokens(case.context)).row(repeats)
        kept = ("extra_mb", "prefill_seconds", "transport_seconds")
        return {name: value for name, value in row.items() if name not in kept}

    def hops(self, text: str, repeats: int) -> list[dict[str, Any]]:
        """What further hops cost, see `benchmarks.hops`.

        Args:
            text: A case of `benchmarks.trace_latency`.
            repeats: Rounds.
        """
        case = Case.parse(text)
        return measure_hops(Bench(self._engine, case, self._tokens(case.context)), repeats)

    def batch(self, requests: int, prompt: int, new_tokens: int, traced: bool) -> float:
        """Requests per second of a batch of completions, with or without attributions."""
        prompts = [self._tokens(prompt) for _ in range(requests)]
        began = time.perf_counter()
        completions = self._complete(prompts, new_tokens)
        if traced:
            output = max(1, new_tokens // 4)
            case = Case(prompt + new_tokens, new_tokens - output, output)
            whole = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
            at_once = FlashTraceConfig().concurrent_traces(self._engine.llm.llm_engine.vllm_config)
            attribute_together(self._engine, case, whole, at_once)
        return requests / (time.perf_counter() - began)

    def graph_modes(self, requests: int, context: int, rows: int) -> dict[str, Any]:
        """CUDA graph modes of steps while requests decode alone and beside a trace."""
        runner = self._engine.on_worker(start_counting)
        new_tokens = 128
        self._complete([self._tokens(32) for _ in range(requests)], new_tokens)
        alone = self._engine.on_worker(take_counts)
        target = TargetWeights.from_spans([(context - rows, context)])
        job = TraceJob(self._tokens(context), target)
        decoding = [self._tokens(32) for _ in range(requests)]
        self._engine.trace_many([job], decoding, new_tokens)
        beside = self._engine.on_worker(take_counts)
        return {"runner": runner, "alone": alone, "beside a trace": beside}

    def _complete(self, prompts: Sequence[list[int]], new_tokens: int) -> list[list[int]]:
        from vllm import SamplingParams

        parameters = SamplingParams(
            max_tokens=new_tokens, temperature=0.0, ignore_eos=True, detokenize=False
        )
        outputs = self._engine.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    def _tokens(self, count: int) -> list[int]:
        return self._random.choices(range(_FIRST_TOKEN, self._vocabulary), k=count)


_V2_MODULE = "vllm.v1.worker.gpu.model_runner"
_V2_DISPATCH = "dispatch_cg_and_sync_dp"
_V1_DISPATCH = "_determine_batch_execution_and_padding"

_modes: Counter[str] = Counter()


EAGER_DECODE = "decode without trace, NONE"
"""Steps that should have replayed a CUDA graph."""


def attention_backend(worker: Any) -> str:
    """Runs in the worker: name of the first layer's attention backend."""
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    backend = next(layer.attn_backend for layer in layers if hasattr(layer, "attn_backend"))
    return str(backend.get_name())


def start_counting(worker: Any) -> str:
    """Runs in the worker: wraps the choice of a CUDA graph; returns which runner it is."""
    runner = worker.model_runner
    if type(runner).__module__ == _V2_MODULE:
        module = sys.modules[_V2_MODULE]
        stock = getattr(module, _V2_DISPATCH)
        setattr(module, _V2_DISPATCH, _counting(stock, runner, lambda chosen: chosen[0].cg_mode))
        return "v2"
    # On the object, in front of the plugin's wrapper, which sits on the class.
    stock = getattr(runner, _V1_DISPATCH)
    setattr(runner, _V1_DISPATCH, _counting(stock, runner, lambda chosen: chosen[0]))
    return "v1"


def take_counts(worker: Any) -> dict[str, int]:
    """Runs in the worker: steps since the last call, as ``{"decode with trace, NONE": steps}``.

    A step in which every request has one token is a decode; others are prefills.
    """
    counts = dict(_modes)
    _modes.clear()
    return counts


def _counting(stock: Any, runner: Any, mode_of: Any) -> Any:
    from vllm_flashtrace.worker.runner import existing_capture

    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def dispatch(*args: Any, **kwargs: Any) -> Any:
        chosen = stock(*args, **kwargs)
        capture = existing_capture(runner)
        traced = capture is not None and capture.records_step
        given = signature.bind(*args, **kwargs).arguments
        kind = "decode" if given["num_tokens"] == given["num_reqs"] else "prefill"
        _modes[f"{kind} {'with' if traced else 'without'} trace, {mode_of(chosen).name}"] += 1
        return chosen

    return dispatch
