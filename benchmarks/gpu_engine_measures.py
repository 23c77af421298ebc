"""What is measured on one engine; runs in the engine's process.

Invariant: prompts are random and new each time, so the prefix cache holds only what a measurement
put there itself.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_engine_process import EngineSpec
from benchmarks.gpu_engine_steps import attention_backend, start_counting, take_counts
from benchmarks.trace_latency import Bench, Case
from tests.engine.harness import Engine, TraceJob
from vllm_flashtrace.core.hops import HopRecursion
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.trace.config import FlashTraceConfig

_FIRST_TOKEN = 600
"""Tokens below it are those with which `Bench.floor` fills its prompts."""


class RandomBench(Bench):
    """A case on random tokens, which need no tokenizer."""

    def __init__(self, engine: Engine, case: Case, token_ids: list[int]) -> None:
        self.engine, self.case, self.token_ids = engine, case, token_ids
        self._variant = 0


class Measures:
    """One engine with dummy weights."""

    def __init__(self, spec: EngineSpec) -> None:
        self._vocabulary = spec.vocabulary
        self._random = random.Random(0)
        self._engine = Engine(Path(spec.folder), **spec.arguments)

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
        bench = RandomBench(self._engine, case, self._tokens(case.context))
        self._engine.generate(bench.token_ids, 1)
        _, reports = bench.trace()  # Compiles kernels, as the floor may.
        bench.floor(reports)
        traces, floors, phases = [], [], []
        for _ in range(repeats):
            seconds, reports = bench.trace()
            traces.append(seconds)
            floors.append(bench.floor(reports))
            names = ("recording", "proximity")
            phases.append({name: sum(r.seconds[name] for r in reports) for name in names})
        seconds, floor = statistics.median(traces), statistics.median(floors)
        return {
            "context": case.context,
            "reasoning": case.reasoning,
            "output": case.output,
            "recomputed_tokens": sum(report.recomputed_tokens for report in reports),
            "seconds": seconds,
            "floor_seconds": floor,
            "ratio_to_floor": seconds / floor,
            "recording_seconds": statistics.median(p["recording"] for p in phases),
            "proximity_seconds": statistics.median(p["proximity"] for p in phases),
        }

    def batch(self, requests: int, prompt: int, new_tokens: int, traced: bool) -> float:
        """Requests per second of a batch of completions, with or without attributions."""
        prompts = [self._tokens(prompt) for _ in range(requests)]
        began = time.perf_counter()
        completions = self._complete(prompts, new_tokens)
        if traced:
            whole = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
            self._attribute(whole, prompt)
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

    def _attribute(self, texts: Sequence[list[int]], prompt: int) -> None:
        """One attribution of each: the last quarter of its completion through the rest of it."""
        recursions = []
        for text in texts:
            start = len(text) - max(1, (len(text) - prompt) // 4)
            mask = torch.zeros(len(text), dtype=torch.bool)
            mask[prompt:start] = True
            target = TargetWeights.from_spans([(start, len(text))])
            recursions.append(HopRecursion(target, prompt, len(text), mask, hops=1))
        places = FlashTraceConfig().max_concurrent_traces
        open_ones = list(zip(texts, recursions, strict=True))
        while open_ones:
            hops = [(t, r, w) for t, r in open_ones if (w := r.next_weights()) is not None]
            for first in range(0, len(hops), places):
                part = hops[first : first + places]
                jobs = [TraceJob(text[: weights.last + 1], weights) for text, _, weights in part]
                for (text, recursion, _), report in zip(
                    part, self._engine.trace_many(jobs), strict=True
                ):
                    scores = torch.zeros(len(text))
                    scores[: len(report.scores)] = report.scores
                    recursion.add(scores)
            open_ones = [(text, recursion) for text, recursion, _ in hops]
        for recursion in recursions:
            recursion.result()

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
