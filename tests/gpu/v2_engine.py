"""The V2 runner on CPU tensors with what is needed to send it traces and to check their scores."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.model_executor.layers.attention import MLAAttention
from vllm.plugins import load_general_plugins
from vllm.sampling_params import SamplingParams
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.gpu import model_runner
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from tests.engine.harness import relative_l1
from tests.gpu.latent_backends import LATENT_BACKENDS, latent_backend
from tests.gpu.standin import (
    CPU,
    backend_class,
    bind_cache,
    flashinfer_names,
    load_model,
    use_torch_kernels,
)
from tests.gpu.standin_runner import StandInRunner, graph_manager
from tests.oracle import oracle_scores
from vllm_flashtrace.base.records import Span, TraceReport
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.patches import mla_attention, model_runner_v2
from vllm_flashtrace.trace.wire import EXTRA_ARGS_KEY, TraceSpec, decode_wire, seal
from vllm_flashtrace.worker import runner as adapter
from vllm_flashtrace.worker import start_proof
from vllm_flashtrace.worker.gpu_model import GPUTracedModel
from vllm_flashtrace.worker.runner import RunnerCapture
from vllm_flashtrace.worker.taps import place_taps

LIMIT = 1e-4
"""Relative L1 distance between float32 scores and the oracle."""


@dataclass(frozen=True)
class Traced:
    """A trace request: its tokens, its target, and the spec that a server would send."""

    token_ids: list[int]
    weights: TargetWeights
    spec: TraceSpec

    @property
    def new(self) -> tuple[list[int], bytes]:
        """As `StepMaker.step` takes new requests."""
        return self.token_ids, seal(self.spec)

    def oracle(self, model: Any) -> torch.Tensor:
        """Float64 scores ``[N]`` of a Hugging Face model."""
        weights = self.weights.normalised()
        return oracle_scores(model, self.token_ids, weights.positions, weights.weights)


def token_ids(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 512, (length,), generator=generator).tolist()


def traced(length: int, *spans: Span, seed: int = 0) -> Traced:
    """A trace of random tokens whose target is given by spans, with uneven weights."""
    spanned = TargetWeights.from_spans(spans)
    weights = TargetWeights(spanned.positions, 1 + (spanned.positions % 5).float())
    return Traced(
        token_ids(length, seed), weights, TraceSpec.create(weights, length, exact_fraction=1.0)
    )


def untraced(length: int, seed: int) -> tuple[list[int], None]:
    return token_ids(length, seed), None


@dataclass
class StepMaker:
    """Makes the scheduler's outputs for requests that are prefilled in chunks of any size."""

    block_size: int
    next_block: int = 3
    computed: dict[str, int] = field(default_factory=dict)
    blocks: dict[str, list[int]] = field(default_factory=dict)

    def step(
        self,
        scheduled: dict[str, int],
        new: dict[str, tuple[Sequence[int], bytes | None]] | None = None,
        finished: Sequence[str] = (),
        preempted: Sequence[str] = (),
        hits: dict[str, int] | None = None,
    ) -> SchedulerOutput:
        """One step.

        Args:
            scheduled: Tokens of each request in the step.
            new: Token ids and sealed trace spec of requests seen for the first time, or again after
                a preemption.
            finished: Requests that are over.
            preempted: Requests that lose their blocks.
            hits: Tokens, in whole blocks, that a request which comes back finds in its old blocks.
        """
        output = SchedulerOutput.make_empty()
        output.finished_req_ids, output.preempted_req_ids = set(finished), set(preempted)
        for req_id, (token_ids, sealed) in (new or {}).items():
            hit = (hits or {}).get(req_id, 0)
            output.scheduled_new_reqs.append(self._new(req_id, token_ids, sealed, hit))
        cached = [req_id for req_id in scheduled if req_id not in (new or {})]
        output.scheduled_cached_reqs = CachedRequestData(
            req_ids=cached,
            resumed_req_ids=set(),
            new_token_ids=[],
            all_token_ids={},
            new_block_ids=[None] * len(cached),
            num_computed_tokens=[self.computed[req_id] for req_id in cached],
            num_output_tokens=[0] * len(cached),
        )
        output.num_scheduled_tokens = dict(scheduled)
        output.total_num_scheduled_tokens = sum(scheduled.values())
        for req_id, count in scheduled.items():
            self.computed[req_id] += count
        return output

    def _new(
        self, req_id: str, token_ids: Sequence[int], sealed: bytes | None, hit: int
    ) -> NewRequestData:
        self.computed[req_id] = hit
        kept = self.blocks.get(req_id, [])[: hit // self.block_size]
        count = -(-len(token_ids) // self.block_size) - len(kept)
        # Every second block, in descending order: no run of ids, no order to rely on.
        blocks = list(range(self.next_block, self.next_block + 2 * count, 2))[::-1]
        blocks = self.blocks[req_id] = kept + blocks
        self.next_block += 2 * count
        extra = {EXTRA_ARGS_KEY: sealed} if sealed is not None else None
        return NewRequestData(
            req_id=req_id,
            prompt_token_ids=list(token_ids),
            mm_features=[],
            sampling_params=SamplingParams(max_tokens=1, extra_args=extra),
            pooling_params=None,
            block_ids=(blocks,),
            num_computed_tokens=hit,
            lora_request=None,
            prefill_token_ids=list(token_ids),
        )


class V2Engine:
    """One runner and the requests it is given."""

    def __init__(self, model: Any, config: Any, layout: KVCacheLayout) -> None:
        self.model, self.config, self.layout = model, config, layout
        # With latents every layer's cache is as large as those of 18 key/value heads of 32 numbers.
        self.cache = bind_cache(config, layout, 32 if config.model_config.use_mla else 4)
        self.runner = StandInRunner(model, config, self.cache)
        self.steps = StepMaker(self.runner.block_tables.block_size)
        with pytest.MonkeyPatch.context() as patch:
            self.use_graphs(CUDAGraphMode.NONE, [8], patch)

    def use_graphs(
        self, mode: CUDAGraphMode, sizes: Sequence[int], monkeypatch: pytest.MonkeyPatch
    ) -> Any:
        manager = graph_manager(self.config, mode, sizes, monkeypatch)
        self.runner.cudagraph_manager = manager
        return manager

    def step(self, scheduled: dict[str, int], **arguments: Any) -> torch.Tensor:
        """Runs one step; arguments as `StepMaker.step`. Returns hidden states ``[tokens, D]``."""
        output = self.steps.step(scheduled, **arguments)
        assert self.runner.execute_model(output, None) is None
        capture = adapter.existing_capture(self.runner)
        if capture is not None:
            # As the patch of `sample_tokens` does, which needs a GPU.
            capture.take_log_probs(self.runner)
        state, self.runner.execute_model_state = self.runner.execute_model_state, None
        hidden: torch.Tensor = state.hidden_states[: output.total_num_scheduled_tokens]
        return hidden

    @property
    def capture(self) -> RunnerCapture:
        capture = adapter.existing_capture(self.runner)
        assert capture is not None and capture.refusal is None, capture and capture.refusal
        return capture

    def report(self, trace: Traced) -> TraceReport:
        """The report; raises TraceError if the trace failed or is not known."""
        return decode_wire(self.capture.recorder.collect(trace.spec.nonce)).to_report()


@contextlib.contextmanager
def v2_engine(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    backend: str = "FLASH_ATTN",
    layout: KVCacheLayout = KVCacheLayout.LBNHC,
    **arguments: Any,
) -> Iterator[V2Engine]:
    """An engine whose model was loaded on a backend; the runner's class is not patched yet."""
    with contextlib.ExitStack() as stack:
        if backend in LATENT_BACKENDS:
            recording = stack.enter_context(latent_backend(backend, monkeypatch))
            arguments = {"attention_backend": "CPU_MLA", **arguments}  # And not that of AMX.
        else:
            recording = stack.enter_context(_recording(backend, monkeypatch))
        model, config = load_model(folder, recording, monkeypatch, **arguments)
        place_taps(model, config)
        for module in (adapter, start_proof):
            monkeypatch.setattr(
                module, "runner_model", lambda r: GPUTracedModel(r.get_model(), r.vllm_config, CPU)
            )
        yield V2Engine(model, config, layout)


@contextlib.contextmanager
def _recording(backend: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[type]:
    """A recording backend that runs here."""
    with flashinfer_names() if backend == "FLASHINFER" else contextlib.nullcontext():
        recording = backend_class(backend)
        if backend == "FLASHINFER":
            # Its own builder plans kernels; block sizes stay those of the FlashInfer backend.
            builder = staticmethod(TritonAttentionBackend.get_builder_cls)
            monkeypatch.setattr(recording.__base__, "get_builder_cls", builder)
        use_torch_kernels(recording.__base__.get_impl_cls(), monkeypatch)
        yield recording


def apply_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Applies the patches of the V2 runner and of latent attention until the test ends."""
    load_general_plugins()  # Which would apply the second later.
    stock = inspect.unwrap(MLAAttention.forward_impl)
    monkeypatch.setattr(MLAAttention, "forward_impl", stock)
    mla_attention.check()
    mla_attention.apply()
    for name in ("execute_model", "prepare_attn"):
        monkeypatch.setattr(GPUModelRunner, name, getattr(GPUModelRunner, name))
    dispatch = "dispatch_cg_and_sync_dp"
    monkeypatch.setattr(model_runner, dispatch, getattr(model_runner, dispatch))
    model_runner_v2.check()
    model_runner_v2.apply()


def assert_exact(engine: V2Engine, trace: Traced, model: Any) -> TraceReport:
    """The trace's report, after comparing it with the oracle of a Hugging Face model."""
    report = engine.report(trace)
    assert relative_l1(report.scores, trace.oracle(model)) < LIMIT
    return report


def exact_error(engine: V2Engine, trace: Traced, model: Any) -> float:
    """Relative L1 distance of the trace's scores to the oracle's, which is below the limit."""
    error = relative_l1(engine.report(trace).scores, trace.oracle(model))
    assert error < LIMIT
    return error
