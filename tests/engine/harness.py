"""A real vLLM engine with helpers to trace token ids and to mix traces with other work."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.same_bits import ENGINE_OPTIONS
from tests import engine_starts, heap
from tests.cores import BIND, worker_in_engine
from tests.forked import processes_are_forked
from tests.oracle import oracle_attention
from tests.tiny_models import make_tiny_model
from vllm_flashtrace.base.records import ScoredText, ScoreReport, TraceReport
from vllm_flashtrace.core.hops import FurtherHops, HopRecursion, HopResult, TracedTarget
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.trace.heads_file import HeadsFile, ModelFacts
from vllm_flashtrace.trace.wire import EXTRA_ARGS_KEY, TraceSpec, seal

SMALL = {
    "dtype": "float32",
    "max_model_len": 2304,
    # Twenty thousand tokens of a tiny model; what is not touched costs no time.
    "kv_cache_memory_bytes": 32 << 20,
    "enforce_eager": True,
    "disable_log_stats": True,
}
SMOLLM2_KV_BYTES = 256 << 20
"""What 5,600 tokens of SmolLM2 need in float32."""

WAYS: dict[str, dict[str, Any]] = {
    "compiled": ENGINE_OPTIONS,
    "ranks": {"tensor_parallel_size": 2, "max_model_len": 1024},
}
"""Other ways to run a model than eagerly in one process, as arguments of an engine."""

TOKENS = torch.randint(5, 500, (400,), generator=torch.Generator().manual_seed(1)).tolist()
"""A prompt for any tiny model."""
TARGET = TargetWeights.from_mapping({i: 1.0 + i % 3 for i in range(150, 400)})
"""A target of more rows than a chunk has, see the fixture `expected`."""


@dataclass(frozen=True)
class TraceJob:
    """One trace request: tokens, targets, exactness, LoRA adapter, further hops, images, heads."""

    token_ids: Sequence[int]
    weights: TargetWeights
    exact_fraction: float = 1.0
    layers: bool = False
    attention: bool = False
    heads: bool = False
    lora_request: Any = None
    further: FurtherHops | None = None
    others: Sequence[TracedTarget] = ()
    images: Any = None


class Engine:
    """A ``vllm.LLM`` (kept as ``llm``) that can run trace requests directly."""

    _ids = itertools.count()

    def __init__(
        self,
        model: Path,
        reason: str,
        *,
        in_process: bool = False,
        worker_process: bool = False,
        **overrides: Any,
    ) -> None:
        """Starts the engine.

        Args:
            model: Its folder.
            reason: Why no other engine will do; see :mod:`tests.engine_starts`.
            in_process: Runs engine core and worker in this process, which starts in a quarter of
                the time. There is one such engine at a time.
            worker_process: Starts all processes as vLLM does.
            overrides: Arguments of ``vllm.LLM`` besides ``SMALL``. A single worker is in the
                process of its engine unless they name a ``distributed_executor_backend``.
        """
        from vllm_flashtrace.base.process import prepare_environment

        engine_starts.note(f"{reason}{' (in this process)' if in_process else ''}")
        # Tests send functions to the worker to cause faults there.
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
        prepare_environment()
        from vllm import LLM

        self._in_process = in_process
        self._nonces: dict[str, str] = {}
        self._outputs: dict[str, Any] = {}
        with pytest.MonkeyPatch.context() as patch:
            if in_process:
                heap.leave_out_what_is_there()
                overrides["distributed_executor_backend"] = "uni"
                patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
                # The other tests of this process keep its cores.
                patch.setenv(BIND, "nobind")
                self.llm = LLM(model=str(model), **{**SMALL, **overrides})
                return
            if worker_process:
                self.llm = LLM(model=str(model), **{**SMALL, **overrides})
                return
            of_their_own = overrides.keys() & {
                "tensor_parallel_size", "pipeline_parallel_size", "distributed_executor_backend"
            }  # fmt: skip
            with processes_are_forked(), nullcontext() if of_their_own else worker_in_engine():
                if not of_their_own:
                    overrides["distributed_executor_backend"] = "uni"
                self.llm = LLM(model=str(model), **{**SMALL, **overrides})

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        if self._in_process:
            from vllm.distributed import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()

    @contextmanager
    def held(self) -> Iterator[None]:
        """The engine starts no step, so what it computes together is what was sent meanwhile."""
        self.llm.sleep(level=0)
        yield
        self.llm.wake_up(tags=["scheduling"])

    def trace(self, job: TraceJob) -> TraceReport:
        return self.trace_many([job])[0]

    def trace_many(
        self, jobs: Sequence[TraceJob], decoding: Sequence[Sequence[int]] = (), new_tokens: int = 32
    ) -> list[TraceReport]:
        """Runs traces in one batch; ``decoding`` prompts, which come first, generate beside them.

        Beside such prompts the engine is :meth:`held` until it has all.
        """
        specs = [self._spec(job) for job in jobs]
        engine = self.llm.llm_engine
        with self.held() if decoding else nullcontext():
            for prompt in decoding:
                engine.add_request(self._id(), self._prompt(prompt), self._generate(new_tokens))
            for job, spec in zip(jobs, specs, strict=True):
                request_id = self._id()
                self._nonces[request_id] = spec.nonce
                engine.add_request(
                    request_id,
                    self._prompt(job.token_ids, job.images),
                    self._record(spec),
                    lora_request=job.lora_request,
                )
        self.run()
        return [self.collect(spec.nonce) for spec in specs]

    def generate(self, token_ids: Sequence[int], new_tokens: int) -> list[int]:
        """Greedy continuation, as token ids."""
        [output] = self.llm.generate(
            [self._prompt(token_ids)], self._generate(new_tokens), use_tqdm=False
        )
        return list(output.outputs[0].token_ids)

    def run(self) -> None:
        while self.llm.llm_engine.has_unfinished_requests():
            self.step()

    def step(self) -> list[Any]:
        """One step of the engine, in whose outputs those of traces are noted."""
        outputs: list[Any] = self.llm.llm_engine.step()
        for output in outputs:
            if nonce := self._nonces.pop(output.request_id, None):
                self._outputs[nonce] = output
        return outputs

    def step_until(self, condition: Callable[[], bool]) -> None:
        """The engine core steps by itself; this waits, draining its outputs."""
        deadline = time.monotonic() + 300
        while not condition():
            if time.monotonic() > deadline or not self.llm.llm_engine.has_unfinished_requests():
                raise AssertionError("the engine finished before the condition held")

    def collect(self, nonce: str) -> TraceReport:
        from vllm_flashtrace.offline.jobs import pick_up_now

        return pick_up_now(self.llm, nonce, self._outputs.pop(nonce, None))

    def score_many(self, texts: Sequence[ScoredText], lora: Any = None) -> list[ScoreReport]:
        """Scores tokens of texts, all in one batch."""
        from vllm_flashtrace.trace.hop import EngineContext
        from vllm_flashtrace.trace.pickup import carried_answer, pick_up_score_now
        from vllm_flashtrace.trace.scoring import checked, score_call

        calls = [score_call(text, EngineContext()) for text in texts]
        outputs = self.llm.generate(
            [call.prompt for call in calls],
            [call.params for call in calls],
            use_tqdm=False,
            lora_request=lora,
        )
        return [
            checked(pick_up_score_now(call.spec.nonce, self._call, carried_answer(output)), text)
            for text, call, output in zip(texts, calls, outputs, strict=True)
        ]

    def _call(self, method: str, args: tuple[Any, ...]) -> Sequence[Any]:
        replies: Sequence[Any] = self.llm.collective_rpc(method, args=args)
        return replies

    def status(self) -> dict[str, Any]:
        from vllm_flashtrace.trace.pickup import decode_status

        return decode_status(self.llm.collective_rpc("flashtrace_status"))

    def on_worker(self, function: Callable[..., Any], *args: Any) -> Any:
        """Calls ``function(worker, *args)`` in the worker process."""
        return self.llm.collective_rpc(function, args=args)[0]

    def submit(self, job: TraceJob, extra_args: dict[str, Any] | None = None) -> tuple[str, str]:
        """Queues a trace request without running it; returns (request id, nonce)."""
        spec = self._spec(job)
        params = self._record(spec)
        if extra_args is not None:
            params.extra_args = extra_args
        request_id = self._id()
        self._nonces[request_id] = spec.nonce
        self.llm.llm_engine.add_request(
            request_id, self._prompt(job.token_ids), params, lora_request=job.lora_request
        )
        return request_id, spec.nonce

    def submit_completion(self, token_ids: Sequence[int], new_tokens: int) -> str:
        """Queues a greedy continuation without running it; returns the request's id."""
        request_id = self._id()
        self.llm.llm_engine.add_request(
            request_id, self._prompt(token_ids), self._generate(new_tokens)
        )
        return request_id

    def _spec(self, job: TraceJob) -> TraceSpec:
        return TraceSpec.create(
            [TracedTarget(job.weights, job.further), *job.others],
            len(job.token_ids),
            exact_fraction=job.exact_fraction,
            layers=job.layers,
            attention=job.attention,
            heads=job.heads,
        )

    @staticmethod
    def _record(spec: TraceSpec) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            max_tokens=1, temperature=0.0, detokenize=False, extra_args={EXTRA_ARGS_KEY: seal(spec)}
        )

    @staticmethod
    def _generate(new_tokens: int) -> Any:
        from vllm import SamplingParams

        return SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)

    @staticmethod
    def _prompt(token_ids: Sequence[int], images: Any = None) -> Any:
        if images is not None:
            return images.prompt(list(token_ids))
        return {"prompt_token_ids": list(token_ids)}

    @classmethod
    def _id(cls) -> str:
        return f"test-{next(cls._ids)}"


def leaves_transformers_classes_alone(patch: pytest.MonkeyPatch) -> None:
    """For an eager engine in the process of a reference.

    vLLM readies a model that it runs in Transformers' code for compilation by changing its class,
    which is that of the reference.
    """
    from vllm.model_executor.models.transformers.base import Base

    patch.setattr(Base, "_decorate_for_torch_compile", lambda _: None)


def random_heads(folder: Path) -> tuple[torch.Tensor, dict[str, Any]]:
    """Weights for the heads of a tiny model, a third of them 0, and the option that names them."""
    config = json.loads((folder / "config.json").read_text())
    facts = ModelFacts(
        config["architectures"][0],
        config["num_hidden_layers"],
        config["num_attention_heads"],
        config["hidden_size"],
    )
    generator = torch.Generator().manual_seed(7)
    weights = (torch.rand(facts.layers, facts.heads, generator=generator) * 1.5 - 0.5).clamp_(min=0)
    path = folder.with_name(f"{folder.name}-heads.safetensors")  # vLLM loads all in the folder.
    HeadsFile(weights, facts, examples=1, ablations=1).write(path)
    return weights, {"additional_config": {"flashtrace": {"heads": str(path)}}}


def oracle_head_scores(
    model: Any, token_ids: Sequence[int], target: TargetWeights, weights: torch.Tensor
) -> torch.Tensor:
    """Each layer's scores by weights of heads, float64 ``[L, N]``, from dense attention."""
    sums = oracle_attention(model, token_ids, target.positions, target.weights)
    return torch.einsum("lh,lhn->ln", weights.double(), sums)


def structure(proof: dict[str, Any]) -> dict[str, str]:
    """What a worker has found in a model, in words for the table of families.

    Args:
        proof: The worker's report of its proof at the start.
    """
    found = proof["found"]
    windows = any(found["windows"])
    attention = [
        *(["latents"] if found["latent_attention"] else []),
        *(["full"] if None in found["windows"] and not found["latent_attention"] else []),
        *(["windows"] if windows else []),
        *(["chunks"] if any(found["chunks"]) else []),
        *(["sinks"] if found["sinks"] else []),
        *(["soft caps"] if found["soft_caps"] else []),
        *(["ALiBi"] if found["alibi"] else []),
        *(["q and k normed"] if found["query_key_norms"] else []),
    ]
    block = [
        *(["gate"] if found["output_gates"] else []),
        *(["bias"] if found["output_bias"] else []),
        *(["normed"] if found["block_norms"] else []),
        *(["multiplier"] if set(found["residual_multipliers"]) != {1.0} else []),
    ]
    return {"attention": ", ".join(attention), "block": ", ".join(block) or "plain"}


def relative_l1(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """L1 distance of two score vectors after each is normalised to sum 1."""
    ours, reference = ours.double(), reference.double()
    return float((ours / ours.sum() - reference / reference.sum()).abs().sum())


def attention_error(report: TraceReport, model: Any, job: TraceJob) -> float:
    """Largest difference of the sums of attention from the oracle's.

    Args:
        report: Of a trace that asked for them.
        model: The Hugging Face model.
        job: The trace.
    """
    sums = report.attention
    assert sums is not None and sums.dtype == torch.float16
    weights = job.weights
    expected = oracle_attention(model, job.token_ids, weights.positions, weights.weights)
    assert sums.shape == expected[..., : weights.last + 1].shape
    assert not expected[..., weights.last + 1 :].any()
    return float((sums.double() - expected[..., : weights.last + 1]).abs().max())


def tiny_folder(*families: str) -> Any:
    """A fixture: the folder of a tiny model, of several families one after the other."""
    if len(families) > 1:

        @pytest.fixture(scope="module", params=families)
        def folder(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Path:
            return make_tiny_model(request.param, tmp_path_factory.mktemp("tiny") / request.param)
    else:

        @pytest.fixture(scope="module")
        def folder(tmp_path_factory: Any) -> Path:
            return make_tiny_model(families[0], tmp_path_factory.mktemp("tiny") / families[0])

    return folder


def top_overlap(ours: torch.Tensor, reference: torch.Tensor, k: int = 10) -> int:
    """How many of the ``k`` best positions agree."""
    return len(set(ours.topk(k).indices.tolist()) & set(reference.topk(k).indices.tolist()))


def run_hops(
    engine: Engine,
    token_ids: Sequence[int],
    prompt_length: int,
    output: tuple[int, int],
    reasoning: tuple[int, int],
    hops: int,
    exact_fraction: float = 1.0,
    *,
    at_once: bool = False,
    heads: bool = False,
) -> HopResult:
    """The recursion output -> reasoning -> input through the engine.

    Hop by hop, or ``at_once`` from one prefill.
    """
    mask = torch.zeros(len(token_ids), dtype=torch.bool)
    mask[slice(*reasoning)] = True
    recursion = HopRecursion(
        TargetWeights.from_spans([output]), prompt_length, len(token_ids), mask, hops=hops
    )
    while (weights := recursion.next_weights()) is not None:
        further = recursion.further_hops() if at_once else None
        report = engine.trace(
            TraceJob(token_ids, weights, exact_fraction, further=further, heads=heads)
        )
        for scores in (report.scores, *report.later_scores):
            recursion.add(scores)
    return recursion.result()


def assert_hops_agree(
    engine: Engine, tokens: Sequence[int], reasoning_end: int, limit: float = 1e-5
) -> None:
    """Two further hops from one prefill are those hop by hop.

    Args:
        engine: The engine.
        tokens: Prompt, reasoning and output.
        reasoning_end: Where followed reasoning ends, which begins at token 110.
        limit: Of the relative L1 distance of each hop's scores.
    """
    output = len(tokens) - 20, len(tokens) - 3
    arguments = engine, tokens, 100, output, (110, reasoning_end), 2
    one_by_one, at_once = run_hops(*arguments), run_hops(*arguments, at_once=True)
    assert len(at_once.per_hop_scores) == len(one_by_one.per_hop_scores) == 3
    for ours, alone in zip(at_once.per_hop_scores, one_by_one.per_hop_scores, strict=True):
        assert relative_l1(ours, alone) <= limit
