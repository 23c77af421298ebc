"""Connects a model runner, V1 or V2, with the recorder.

The patches call this module around each step: `observe_step` before it, and around its forward pass
`RunnerCapture.begin_forward` and `end_forward`. Nothing here raises into the runner, and a step
without target rows has no observer.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from vllm import envs
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from vllm_flashtrace.base.errors import FlashTraceError, TraceError, UnsupportedModelError
from vllm_flashtrace.base.logs import log_unexpected, logger
from vllm_flashtrace.base.process import lineage
from vllm_flashtrace.trace.budget import AccumulatorBudget
from vllm_flashtrace.trace.config import FlashTraceConfig
from vllm_flashtrace.trace.heads_file import served_heads
from vllm_flashtrace.trace.wire import ScoreSpec, sealed_spec, verified_spec
from vllm_flashtrace.worker.cache_groups import CacheGroups, cache_groups, keeps_blocks
from vllm_flashtrace.worker.config_checks import check_architecture
from vllm_flashtrace.worker.cpu_model import CPUTracedModel
from vllm_flashtrace.worker.host_buffers import RESERVED_BYTES, host_bytes
from vllm_flashtrace.worker.log_probs import LogProbRecorder
from vllm_flashtrace.worker.output_projections import adapter_slot
from vllm_flashtrace.worker.rank_agreement import TargetSteps, TotalsExchange
from vllm_flashtrace.worker.recorder import HandOut, Recorder
from vllm_flashtrace.worker.step import StepRecorder
from vllm_flashtrace.worker.step_rows import BatchRow
from vllm_flashtrace.worker.traced_model import TracedModel

_ATTRIBUTE = "_flashtrace_capture"
RESULTS_ATTRIBUTE = "flashtrace_results"
"""Encoded results by request id, on a step's ``ModelRunnerOutput``."""

KERNELS_ATTRIBUTE = "_flashtrace_kernels"
"""What `warm_up.warm_up_kernels` did, on the runner."""

PROOF_ATTRIBUTE = "_flashtrace_proof"
"""What `start_proof.prove` found, on the runner: what the status report shows of it."""


def capture_of(runner: Any) -> RunnerCapture:
    """The runner's capture, made at first use (the model must be loaded)."""
    capture = existing_capture(runner)
    if capture is None:
        capture = RunnerCapture(runner)
        setattr(runner, _ATTRIBUTE, capture)
    return capture


def existing_capture(runner: Any) -> RunnerCapture | None:
    """The runner's capture, if one was made."""
    return getattr(runner, _ATTRIBUTE, None)


@contextmanager
def capturing(runner: Any, capture: Any) -> Iterator[None]:
    """Lets another capture watch the runner's steps within the block.

    Args:
        runner: A V1 or V2 model runner.
        capture: Has what the patches of the runners use of a `RunnerCapture`.
    """
    before = existing_capture(runner)
    setattr(runner, _ATTRIBUTE, capture)
    try:
        yield
    finally:
        setattr(runner, _ATTRIBUTE, before)


def observe_step(runner: Any, scheduler_output: SchedulerOutput) -> RunnerCapture | None:
    """Shows a step about to run to the runner's capture, which the first trace request makes.

    Returns:
        The capture, or None while no trace was ever asked of this runner. Never raises.
    """
    capture = existing_capture(runner)
    try:
        if capture is None and _has_trace(scheduler_output):
            capture = capture_of(runner)
    except Exception as error:
        log_unexpected("reading the scheduler's output", error)
    if capture is not None:
        capture.observe(scheduler_output)
    return capture


def _has_trace(scheduler_output: SchedulerOutput) -> bool:
    return any(
        new.sampling_params is not None and sealed_spec(new.sampling_params.extra_args) is not None
        for new in scheduler_output.scheduled_new_reqs
    )


class RunnerCapture:
    """One model runner's traces; none of its methods raises.

    Attributes:
        recorder: The traces.
        log_probs: The requests of which log-probabilities are taken.
        refusal: Why the model cannot be traced, or None.
        records_step: Whether the step that was last observed computes target rows; it must then
            run as code, or by CUDA graphs of trace steps. See `TargetSteps` and `trace_graphs`.
        scheduled: Tokens of each request in that step.
    """

    records_step: bool
    scheduled: Mapping[str, int]
    _finishing: Sequence[str]

    def __init__(self, runner: Any) -> None:
        self.refusal: str | None = None
        self._target_steps = TargetSteps()
        self.forget_step()
        self._model: TracedModel | None = None
        self._config = FlashTraceConfig()
        self._longest = self._places = 0
        self._cache = runner.kv_cache_config
        try:
            additional = runner.vllm_config.additional_config
            self._config = FlashTraceConfig.from_additional_config(additional)
            self._longest = runner.vllm_config.model_config.max_model_len
            self._places = self._config.concurrent_traces(runner.vllm_config)
            self._model = runner_model(runner)
            self._model.cache_groups = cache_groups(runner.kv_cache_config, self._model.layers)
            self._model.slot_of = functools.partial(adapter_slot, runner)
            self._model.take_head_weights(served_heads(self._config.heads, runner.vllm_config))
            _check_proof(runner)
        except Exception as error:
            self._model = None
            self.refusal = error.message if isinstance(error, FlashTraceError) else repr(error)
            if not isinstance(error, _NotProvenError):  # It was said when it was found.
                log_refusal(self.refusal)
        ttl = self._config.result_ttl_seconds
        self.recorder = Recorder(self._model, ttl, refusal=self.refusal)
        self.log_probs = LogProbRecorder(self._model, self.recorder, refusal=self.refusal)
        self._exchange = _totals_exchange(runner)
        # Of several workers vLLM hears one only, and none has the whole result.
        self._alone = runner.vllm_config.parallel_config.world_size == 1
        self._outgoing: Sequence[str] = ()

    def settle_budget(self, activation_bytes: int = 0) -> None:
        """Measures the memory that traces may take and takes that of their results; once.

        Must be called when vLLM has taken its share of the memory, CUDA graphs included, and before
        the first trace.

        Args:
            activation_bytes: See `TracedModel.accumulator_limit_bytes`.
        """
        if self._model is None or self.recorder.budget is not None:
            return
        self._model.take_scratch(activation_bytes)
        limit = self._model.accumulator_limit_bytes(
            self._config.max_accumulator_mib, activation_bytes
        )
        # A worker that is not alone does not know the scores that the next hop begins with.
        row_bytes = self._model.row_bytes() if self._alone else 0
        self.recorder.budget = AccumulatorBudget.of_model(
            limit,
            self._model.shape,
            row_bytes,
            scaled=self._model.scaled,
            with_mass=self._model.measures_mass,
        )
        if self._model.device.type == "cuda":
            shape = self._model.shape
            # One target's; more are traced together where they share rows.
            hops = 1 + self._config.max_hops if row_bytes else 1
            result = host_bytes(self._longest, shape.num_layers, shape.num_heads, hops)
            self.recorder.buffers.reserve(min(self._places, RESERVED_BYTES // result), result)

    def observe(self, scheduler_output: SchedulerOutput) -> None:
        """Learns about new and finished requests and about the step."""
        self.forget_step()
        try:
            # First, and whatever becomes of the recording.
            self.records_step = self._target_steps.includes(scheduler_output)
            self._finishing = self._target_steps.finishing
            self.recorder.drop(scheduler_output.finished_req_ids)
            self.log_probs.drop(scheduler_output.finished_req_ids)
            self.scheduled = scheduler_output.num_scheduled_tokens
        except Exception as error:
            log_unexpected("reading the scheduler's output", error)
            return
        for new in scheduler_output.scheduled_new_reqs:
            try:
                self._register(new)
            except Exception as error:  # The others go on.
                log_unexpected("reading a new request", error)

    def _register(self, new: NewRequestData) -> None:
        params = new.sampling_params
        sealed = sealed_spec(params.extra_args) if params is not None else None
        if sealed is None:
            return
        self.settle_budget()
        lora = new.lora_request
        adapter = lora.lora_int_id if lora is not None else None
        spec = verified_spec(params.extra_args)
        if isinstance(spec, ScoreSpec):
            self.log_probs.register(new.req_id, spec, new.prompt_token_ids or (), adapter)
            return
        tokens = len(new.prompt_token_ids or ())
        if not keeps_blocks(self._cache, tokens):
            refused = f"the KV cache is too small to keep all blocks of {tokens} tokens"
            self.recorder.register(new.req_id, sealed, tokens)
            self.recorder.fail(new.req_id, TraceError("recording_failed", refused))
            return
        self.recorder.register(new.req_id, sealed, tokens, adapter)

    def forget_step(self) -> None:
        """Ends the step: what runs until the next one is not recorded."""
        self.scheduled, self.records_step, self._finishing = {}, False, ()

    def begin_forward(
        self, batch: Callable[[CacheGroups], Iterable[BatchRow]]
    ) -> StepObserver | None:
        """What watches the forward pass about to run, or None.

        Args:
            batch: Gives the step's requests; called only if a trace is among them.
        """
        try:
            log_probs = self.log_probs.takes_part(self.scheduled)
            traces = not self.recorder.active_requests.isdisjoint(self.scheduled)
            if self._model is None or not (log_probs or traces):
                return None
            rows = list(batch(self._model.cache_groups))
            if log_probs:
                self.log_probs.begin_step(rows)
            step = self.recorder.begin_step(rows) if traces else None
            if step is None:
                return None
            return StepObserver(self._model, step, self._fail_scheduled)
        except Exception as error:
            log_unexpected("preparing a step", error)
            self._fail_scheduled(error)
            return None

    def end_forward(self, observer: StepObserver | None) -> None:
        """Finishes traces; called after every forward pass, while the requests' KV blocks are held.

        Args:
            observer: What watched the pass, if anything did.
        """
        finishing, self._finishing = self._finishing, ()
        if observer is None and not finishing:
            return
        try:
            if observer is not None:
                self.recorder.finish_step(observer.step)
        except Exception as error:
            log_unexpected("finishing a step", error)
            self._fail_scheduled(error)
        try:
            self.recorder.score_finished(self._totals_of_all_ranks(finishing))
            if observer is not None:
                observer.model.end_step()
        except Exception as error:
            log_unexpected("finishing a step", error)
            self._fail_scheduled(error)
        if self._alone:
            self._outgoing = finishing

    def take_log_probs(self, runner: Any) -> None:
        """Takes log-probabilities of the step that has run; called before the runner samples.

        Args:
            runner: The V1 or V2 model runner, whose state of the step is about to be used up.
        """
        if not self.log_probs.in_step:
            return
        try:
            state = runner.execute_model_state
            # None on pipeline stages that only hand on what they have computed.
            hidden_states = None if state is None else state.hidden_states
            model = runner.model
            finished = self.log_probs.end_step(hidden_states, model.compute_logits, model)
            if finished and self._alone:
                self._outgoing = [*self._outgoing, *finished]
        except Exception as error:
            log_unexpected("taking log-probabilities", error)

    def with_results(self, output: Any) -> Any:
        """A step's output with the results of the traces that it finishes, if this worker is alone.

        Args:
            output: What the runner's ``sample_tokens`` returned.
        """
        req_ids, self._outgoing = self._outgoing, ()
        if not req_ids or not isinstance(output, (AsyncModelRunnerOutput, ModelRunnerOutput)):
            return output
        outgoing = self.recorder.hand_out(req_ids)
        if outgoing is None:
            return output
        if isinstance(output, AsyncModelRunnerOutput):
            return _OutputWithResults(output, outgoing)
        setattr(output, RESULTS_ATTRIBUTE, outgoing.encode())
        return output

    def _totals_of_all_ranks(self, finishing: Sequence[str]) -> Mapping[str, torch.Tensor] | None:
        """Totals of the traces that the step finishes by the scheduler's word, not by this rank's.

        None where no ranks share the heads.
        """
        if self._exchange is None:
            return None
        if not finishing:
            return {}
        own = [self.recorder.totals(req_id) for req_id in finishing]
        return dict(zip(finishing, self._exchange.add_up(own), strict=True))

    def _fail_scheduled(self, error: BaseException) -> None:
        for req_id in self.recorder.active_requests.intersection(self.scheduled):
            self.recorder.fail(req_id, error)


class _OutputWithResults(AsyncModelRunnerOutput):
    """An output that is waited for in another thread; results are on the host when it is."""

    def __init__(self, output: AsyncModelRunnerOutput, outgoing: HandOut) -> None:
        self._output = output
        self._outgoing = outgoing

    def get_output(self) -> ModelRunnerOutput:
        output = self._output.get_output()
        setattr(output, RESULTS_ATTRIBUTE, self._outgoing.encode())
        return output


class StepObserver:
    """Shows a forward pass to a step's recorder; an exception there becomes failed traces."""

    def __init__(
        self, model: TracedModel, step: StepRecorder, fail: Callable[[BaseException], None]
    ) -> None:
        self.model = model
        self.step = step
        self._fail = fail

    def on_attention(
        self,
        layer_name: str,
        query: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor | None = None,
    ) -> None:
        """See `observer.ForwardObserver`."""
        try:
            layer = self.model.layer_index(layer_name)
            if layer is not None:
                self.step.record_attention(layer, query, lse)
        except Exception as error:
            self._fail(error)

    def on_update(self, update: torch.Tensor, residual: torch.Tensor) -> None:
        """See `observer.ForwardObserver`."""
        try:
            self.step.record_update(update, residual)
        except Exception as error:
            self._fail(error)

    def on_residual(self, residual: torch.Tensor) -> None:
        """See `observer.ForwardObserver`."""
        try:
            self.step.record_residual(residual)
        except Exception as error:
            self._fail(error)

    def on_block(self, output: torch.Tensor) -> None:
        """See `observer.ForwardObserver`."""
        try:
            self.step.record_block(output)
        except Exception as error:
            self._fail(error)

    def on_other_update(self, update: torch.Tensor, residual: torch.Tensor) -> None:
        """See `observer.ForwardObserver`."""
        try:
            self.step.record_other_update(update, residual)
        except Exception as error:
            self._fail(error)

    def on_other_residual(self, residual: torch.Tensor) -> None:
        """See `observer.ForwardObserver`."""
        try:
            self.step.record_other_residual(residual)
        except Exception as error:
            self._fail(error)

    def on_block_input(self, hidden_states: torch.Tensor) -> None:
        """See `observer.ForwardObserver`."""
        try:
            self.step.record_block_input(hidden_states)
        except Exception as error:
            self._fail(error)


def _totals_exchange(runner: Any) -> TotalsExchange | None:
    """None where no ranks share the heads; there is one also on a rank that cannot trace."""
    config = runner.vllm_config
    if config.parallel_config.tensor_parallel_size == 1:
        return None
    return TotalsExchange(
        tensor_model_parallel_all_reduce,
        config.model_config.get_num_layers(config.parallel_config),
        config.scheduler_config.max_num_seqs,
        runner.device,
    )


class _NotProvenError(UnsupportedModelError):
    """The proof at the start has failed."""


def _check_proof(runner: Any) -> None:
    proof = getattr(runner, PROOF_ATTRIBUTE, None)
    if proof is None:
        check_architecture(runner.vllm_config)
    elif proof["refusal"] is not None:
        raise _NotProvenError(proof["refusal"])


def log_refusal(reason: str) -> None:
    """Says in one line that a model is not traced."""
    logger.warning("FlashTrace: this model is served without attribution: %s", reason)


def runner_model(runner: Any) -> TracedModel:
    """The loaded model of a runner.

    Raises:
        UnsupportedModelError: It cannot be traced.
    """
    if runner.device.type == "cpu":
        return CPUTracedModel(runner.get_model(), runner.vllm_config)
    if runner.device.type == "cuda":
        from vllm_flashtrace.worker.gpu_model import GPUTracedModel

        return GPUTracedModel(runner.get_model(), runner.vllm_config, runner.device)
    raise UnsupportedModelError(f"traces are not supported on {runner.device.type}")


def batch_rows_v1(runner: Any, groups: CacheGroups) -> Iterator[BatchRow]:
    """The requests of the step that a V1 runner has prepared, in the order of its tokens.

    The rows are the runner's own: it may compute fewer drafts of a request than were scheduled.

    Args:
        runner: A ``vllm.v1.worker.gpu_model_runner.GPUModelRunner``, or one derived from it.
        groups: The groups of the KV cache that are read.

    Raises:
        UnsupportedModelError: The kernels' blocks cannot be told from the manager's.
    """
    batch = runner.input_batch
    managed = [batch.block_table[number] for number in groups.numbers]
    blocks = [table.get_device_tensor(len(batch.req_ids)) for table in managed]
    tables = _kernel_block_tables(runner, blocks, groups)
    rows = runner.query_start_loc.np[: len(batch.req_ids) + 1].tolist()
    for index, req_id in enumerate(batch.req_ids):
        start = int(batch.num_computed_tokens_cpu[index])
        stop = start + rows[index + 1] - rows[index]
        yield BatchRow(req_id, rows[index], start, stop, [table[index] for table in tables])


def batch_rows_v2(
    runner: Any, input_batch: Any, block_tables: Sequence[torch.Tensor], groups: CacheGroups
) -> Iterator[BatchRow]:
    """The requests of a V2 runner's step, in the order of its tokens, without padding.

    Args:
        runner: A ``vllm.v1.worker.gpu.model_runner.GPUModelRunner``.
        input_batch: Its ``InputBatch`` for the step.
        block_tables: int32 ``[requests with padding, blocks]`` of each KV cache group, as
            ``prepare_attn`` gives them: the manager's blocks, on the runner's device, valid until
            the next step.
        groups: The groups of the KV cache that are read.

    Raises:
        UnsupportedModelError: Tokens are split over ranks.
        TraceError: The batch is not laid out as its own numbers say.
    """
    if runner.pcp_manager is not None:
        raise UnsupportedModelError("traces are not supported with prefill context parallelism")
    blocks = [block_tables[number] for number in groups.numbers]
    tables = _kernel_block_tables(runner, blocks, groups)
    rows = input_batch.query_start_loc_np.tolist()
    computed = input_batch.num_computed_tokens_np.tolist()
    scheduled = input_batch.num_scheduled_tokens.tolist()
    for index, req_id in enumerate(input_batch.req_ids):
        first, count = rows[index], scheduled[index]
        if rows[index + 1] - first != count:
            raise TraceError(
                "recording_failed",
                f"request {req_id} has {rows[index + 1] - first} rows for {count} tokens",
            )
        start = computed[index]
        yield BatchRow(req_id, first, start, start + count, [table[index] for table in tables])


def _kernel_block_tables(
    runner: Any, blocks: Sequence[torch.Tensor], groups: CacheGroups
) -> list[torch.Tensor]:
    """The block tables of the groups; layers that are not traced may have other kernel blocks."""
    traced = [
        [group for group in runner.attn_groups[number] if groups.names & set(group.layer_names)]
        for number in groups.numbers
    ]
    return [kernel_block_table(*each) for each in zip(blocks, traced, strict=True)]


def kernel_block_table(block_table: torch.Tensor, groups: Sequence[Any]) -> torch.Tensor:
    """Ids of kernel blocks, in the order of the tokens they hold.

    vLLM's KV cache manager and its runners count blocks of the cache's block size. A backend whose
    kernels need smaller blocks reads a cache that is viewed in such kernel blocks, through a table
    that its ``AttentionGroup`` derives when metadata is built. This derives the same table. In vLLM
    0.31 groups have no such size: the runners' tables count kernel blocks already.

    Args:
        block_table: int32 ``[..., blocks]``, as the runner has it.
        groups: The ``AttentionGroup`` objects of its KV cache group that hold traced layers.

    Returns:
        ``block_table`` itself where kernels use the manager's blocks, else int32
        ``[..., blocks * kernel blocks per block]`` on the same device.

    Raises:
        UnsupportedModelError: Layers differ in the size of their kernel blocks, or the blocks of
            other layers lie between those of one.
    """
    if not any(hasattr(group, "kernel_block_size") for group in groups):
        return block_table
    if len({group.kernel_block_size for group in groups}) != 1:
        raise UnsupportedModelError(
            "traces are not supported with layers whose kernels use blocks of different sizes"
        )
    group = groups[0]
    if group.kernel_block_size is None:
        return block_table
    if group.kernel_block_stride:
        raise UnsupportedModelError("traces are not supported with packed kernel blocks")
    parts = group.kv_cache_spec.block_size // group.kernel_block_size
    part = torch.arange(parts, dtype=block_table.dtype, device=block_table.device)
    return (block_table.unsqueeze(-1) * parts + part).flatten(-2)


def worker_report(worker: Any) -> dict[str, Any]:
    """Process, device, runner, attention backends, kernels, proof and place in the parallel layout.

    What vLLM does not tell is None.

    Args:
        worker: vLLM's worker.
    """
    parallel = getattr(getattr(worker, "vllm_config", None), "parallel_config", None)
    runner = getattr(worker, "model_runner", None)
    return {
        "pid": os.getpid(),
        "rank": getattr(worker, "rank", None),
        "tensor_parallel_size": getattr(parallel, "tensor_parallel_size", None),
        "pipeline_parallel_size": getattr(parallel, "pipeline_parallel_size", None),
        "data_parallel_rank": getattr(parallel, "data_parallel_index", None),
        "device": str(getattr(runner, "device", None)),
        "runner": _runner_version(runner),
        "attention_backends": _backends(runner),
        "kernels": getattr(runner, KERNELS_ATTRIBUTE, None),
        "proof": getattr(runner, PROOF_ATTRIBUTE, None),
        "processes": lineage(),
    }


def activation_bytes(worker: Any) -> int:
    """What vLLM's GPU worker found to need for activations; 0 if it was not told to find out."""
    peak = getattr(worker, "peak_activation_memory", None)
    if peak is None:
        return 0
    # Its estimate of CUDA graphs is part of it, and those are there by now.
    graphs = getattr(worker, "cudagraph_memory_estimate", 0)
    return max(0, int(peak) - (graphs if envs.VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS else 0))


def _runner_version(runner: Any) -> str | None:
    for kind in type(runner).__mro__:
        if kind.__module__ == "vllm.v1.worker.gpu.model_runner":
            return "V2"
        if kind.__module__ == "vllm.v1.worker.gpu_model_runner":
            return "V1"
    return None


def _backends(runner: Any) -> list[str] | None:
    try:
        groups = [group for per_cache in runner.attn_groups for group in per_cache]
        return sorted({str(group.backend.get_name()) for group in groups})
    except Exception:
        return None
