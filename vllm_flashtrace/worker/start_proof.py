"""Proves, before a worker serves, that its model is traced exactly.

A probe of up to 64 random tokens goes through the worker's own `execute_model` like a request, with
KV blocks that nobody holds yet, and is recorded by the code that records traces. Then every layer
is measured by `core.identity`: the recomputed attention weights against the layer's own attention
output, and what the heads contribute, through ``M_h``, against what the block added to the stream.
Where a norm lies between the block and the stream, what was added is not in memory: the decoder
layer's own code then runs again on the rows' stream and block outputs, up to the addition.
Where ``W_O`` is quantised, the matrix that was read of it is measured too, against the layer. A
model within the limit is traced whatever its name; else it is refused with layer and error.

Nothing of the probe stays: its request is removed, and its KV blocks are as they were. It is greedy
and draws no random number.

Every worker of an engine runs the probe at the same time, since the forward pass has collectives,
and only if the model can be read on all of them. Tensor-parallel ranks add up what their heads
contribute; a pipeline stage proves its own layers.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from vllm import SamplingParams
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.parallel_state import get_pp_group, get_tp_group, get_world_group
from vllm.model_executor.layers.attention import MLAAttention
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

from vllm_flashtrace.base.errors import FlashTraceError, in_one_line
from vllm_flashtrace.base.logs import log_unexpected, logger
from vllm_flashtrace.core.identity import attention_error, contribution, identity_error
from vllm_flashtrace.core.weights import TargetWeights
from vllm_flashtrace.trace.config import FlashTraceConfig
from vllm_flashtrace.trace.wire import TraceSpec
from vllm_flashtrace.worker.cache_groups import cache_groups
from vllm_flashtrace.worker.cpu_model import CPU_BACKEND
from vllm_flashtrace.worker.decoder_stream import MLP, argument, argument_names
from vllm_flashtrace.worker.layers import TracedLayer
from vllm_flashtrace.worker.quantized import applied_bias, product_error
from vllm_flashtrace.worker.recorded_trace import Trace
from vllm_flashtrace.worker.runner import (
    PROOF_ATTRIBUTE,
    StepObserver,
    capturing,
    log_refusal,
    runner_model,
)
from vllm_flashtrace.worker.step import StepRecorder
from vllm_flashtrace.worker.traced_model import TracedModel

PROBE_TOKENS = 64
"""Most tokens of a probe."""

_POSITIONS = "positions"
_ROWS = 8
_SEED = 2602
_REQUEST = "flashtrace-probe"

_LIMITS = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
_TF32_LIMIT = 1e-2
_FP8_CACHE_LIMIT = 0.1
_EIGHT_BITS_LIMIT = 0.1

# What is measured, in the order of computation, and what a failure means.
_MEASURES = {
    "attention": "the recomputed attention weights do not give the layer's attention output",
    "identity": "the heads' contributions do not add up to what the attention block adds",
    "projection": "the matrix read of the quantized output projection does not give its products",
}


def prove(worker: Any) -> None:
    """Runs the proof and leaves its report on the runner; never raises.

    Does nothing where the option ``probe`` is off, or the model is refused by its structure.

    Args:
        worker: vLLM's worker, its model loaded and its KV cache bound.
    """
    began = time.perf_counter()
    runner = worker.model_runner
    try:
        config = FlashTraceConfig.from_additional_config(runner.vllm_config.additional_config)
    except ValueError:
        return  # Said where the first trace is refused.
    if not config.probe:
        return
    proof = _prepared(runner, config.probe_limit)
    if not _on_all_workers(proof is not None) or proof is None:
        return
    proof.run(worker)
    report = proof.report()
    report["seconds"] = round(time.perf_counter() - began, 3)
    setattr(runner, PROOF_ATTRIBUTE, report)
    if get_tp_group().rank_in_group > 0:  # The first rank says the same.
        return
    if report["refusal"] is not None:
        log_refusal(report["refusal"])
    else:
        untraced = report["found"]["untraced_layers"]
        logger.info(
            "FlashTrace: the layers %s were proven to be traced exactly in %.1f s: "
            "largest error %.1e, limit %.1e",
            "{} to {}".format(*report["found"]["layers"])
            + (f" without {', '.join(map(str, untraced))}" if untraced else ""),
            report["seconds"],
            report["largest_error"],
            report["limit"],
        )


def _prepared(runner: Any, limit: float | None) -> Proof | None:
    """None where the model cannot be read; the first trace is refused with the reason."""
    try:
        model = runner_model(runner)
        model.cache_groups = cache_groups(runner.kv_cache_config, model.layers)
        return Proof(model, limit, runner)
    except FlashTraceError as error:
        logger.debug("FlashTrace: there is nothing to prove: %s", error.message)
    except Exception as error:
        log_unexpected("preparing the proof at the start", error)
    return None


def default_limit(model: TracedModel, config: Any) -> float:
    """The largest error with which a model is traced, by the coarsest numbers it computes with.

    Not counted are the inputs of a quantised output projection, see `_limits`.

    Five to fifty times what a model shows that is traced correctly. A kernel rounds each attention
    weight, the attention output and the block's output to the model's type, by up to half a unit in
    the last place (2^-9 in bfloat16, 2^-12 in float16); with an fp8 cache it may round the weights
    to fp8. In float32 on a GPU, vLLM's Triton kernels round what they multiply to TF32, whose
    fractions are those of float16.
    """
    if any(
        layer.attention.kv_cache_dtype.startswith("fp8")
        and layer.attention.attn_backend.get_name() != CPU_BACKEND  # It computes in floats.
        for layer in model.layers
    ):
        return _FP8_CACHE_LIMIT
    if config.model_config.dtype == torch.float32 and model.device.type == "cuda":
        return _TF32_LIMIT
    return _LIMITS.get(config.model_config.dtype, _LIMITS[torch.bfloat16])


def _limits(model: TracedModel, config: Any, configured: float | None) -> Tensor:
    """The limit on each error of each layer, as `Proof.errors`.

    A projection that rounds its inputs to eight bits adds something else than what the heads
    contribute: 2 to 3 % in an eight-bit float, 1 % in int8. So the identity has another limit
    there, and what it can no longer see, such as the scale of one channel, the error of the
    projection does.
    """
    limits = torch.full((len(model.layers), len(_MEASURES)), default_limit(model, config))
    for index, layer in enumerate(model.layers):
        if layer.quantization is not None and layer.quantization.rounds_inputs:
            limits[index, 1].clamp_(min=_EIGHT_BITS_LIMIT)
    return (limits if configured is None else torch.full_like(limits, configured)).double()


class Proof:
    """One run of the probe, and what it showed.

    It stands in the place of the runner's `RunnerCapture` while the probe runs.

    Attributes:
        errors: Relative errors of the layers, float64 ``[L, 3]``, columns as `_MEASURES`.
        records_step: See `RunnerCapture`.
    """

    records_step = True

    def __init__(self, model: TracedModel, limit: float | None, runner: Any) -> None:
        """Chooses tokens and target rows.

        Args:
            model: The runner's model.
            limit: Largest error with which the model is traced; None for `_limits`.
            runner: The runner; idle.
        """
        config, cache = runner.vllm_config, runner.kv_cache_config
        self._limits = _limits(model, config, limit)
        self.errors = torch.full_like(self._limits, math.inf)
        self._model, self._runner = model, runner
        self._dtype = config.model_config.dtype
        sizes = [group.kv_cache_spec.block_size for group in cache.kv_cache_groups]
        length = min(
            PROBE_TOKENS,
            config.scheduler_config.max_num_batched_tokens,
            config.model_config.max_model_len - 1,
            (cache.num_blocks - 1) // len(sizes) * min(sizes) - config.num_lookahead_tokens,
        )
        # Groups share the memory. Block 0 stays empty in vLLM; a model that drafts writes behind
        # the last token.
        written = length + config.num_lookahead_tokens
        self._blocks, first = [], 1
        for size in sizes:
            stop = first - (-written // size)
            self._blocks.append(list(range(first, stop)))
            first = stop
        ids = torch.Generator().manual_seed(_SEED)
        vocabulary = config.model_config.get_vocab_size()
        self._token_ids = torch.randint(vocabulary, (length,), generator=ids).tolist()
        rows = min(_ROWS, length)
        self._positions = [length * (row + 1) // rows - 1 for row in range(rows)]
        self._failure: str | None = None
        self._outputs: dict[int, Tensor] = {}
        self._block_outputs: list[Tensor] = []
        self._gates: list[Tensor] = []
        self._traces: dict[str, Trace] = {}
        self._contributed = torch.full(
            (model.shape.num_layers, rows, model.shape.hidden_size), math.nan, dtype=torch.float64
        )
        self._added = self._contributed.clone()
        self._scales = torch.ones(model.shape.num_layers, rows)
        self._rounded: Tensor | None = None
        self._tables: Sequence[Tensor] = ()

    def run(self, worker: Any) -> None:
        """Runs the probe; all workers must. Never raises."""
        try:
            with (
                torch.inference_mode(),
                capturing(self._runner, self),
                self._blocks_kept(),
                _without_connector(self._runner),
            ):
                _execute(worker, self._token_ids, self._blocks)
            if not self._traces:
                raise RuntimeError("the forward pass was not seen")
        except Exception as error:
            log_unexpected("the proof at the start", error)
            self.fail(error)
        self._compare()

    def fail(self, error: BaseException) -> None:
        """Notes why the probe failed; the first reason counts."""
        self._failure = self._failure or in_one_line(error)

    def report(self) -> dict[str, Any]:
        """What the status report shows; ``refusal`` is None where the model is traced."""
        measures = list(_MEASURES)
        layer, measure = divmod(int((self.errors / self._limits).argmax()), len(measures))
        largest = float(self.errors[layer, measure])
        return {
            "refusal": self._refusal(),
            "tokens": len(self._token_ids),
            "rows": len(self._positions),
            "limit": _short(self._limits[layer, measure]),
            "largest_error": largest if math.isfinite(largest) else None,
            "largest_error_in": f"{measures[measure]} of layer {self._model.layers[layer].index}",
            "found": self._found(),
        }

    def _refusal(self) -> str | None:
        if self._failure is not None:
            return (
                f"the proof at the start could not be run: {self._failure} (the option 'probe' set "
                "to false starts without it)"
            )
        wrong = (self.errors > self._limits).nonzero()
        if not len(wrong):
            return None
        layer, measure = wrong[0].tolist()
        traced = self._model.layers[layer]
        return (
            f"the proof at the start failed in layer {traced.index} ({traced.name}): "
            f"{list(_MEASURES.values())[measure]}: "
            f"relative error {float(self.errors[layer, measure]):.2g}, "
            f"limit {_short(self._limits[layer, measure]):g}"
        )

    def _found(self) -> dict[str, Any]:
        """What was read of the model's structure."""
        layers, part = self._model.layers, self._model.part
        forms = [self._model.attention_form(layer) for layer in range(len(layers))]
        return {
            "layers": [layers[0].index, layers[-1].index],
            "untraced_layers": sorted(
                set(range(part.first_layer, part.first_layer + part.num_layers))
                - set(part.traced_layers)
            ),
            "norms": _distinct(
                type(layer.behind).__name__
                for layer in layers
                if layer.behind is not getattr(layer.decoder, MLP, None)
            ),
            "block_norms": _distinct(
                type(layer.block_norm.module).__name__ for layer in layers if layer.block_norm
            ),
            "query_key_norms": any(
                isinstance(getattr(layer.block, name, None), nn.Module)
                for layer in layers
                for name in ("q_norm", "k_norm", "qk_norm")
            ),
            "latent_attention": any(isinstance(layer.attention, MLAAttention) for layer in layers),
            "output_bias": any(layer.out_proj.bias is not None for layer in layers),
            "residual_multipliers": _distinct(layer.multiplier for layer in layers),
            "output_gates": self._model.gate_width > 0,
            "windows": _distinct(form.sliding_window for form in forms),
            "chunks": _distinct(form.chunk_size for form in forms),
            "soft_caps": _distinct(form.soft_cap for form in forms if form.soft_cap),
            "sinks": any(form.sinks is not None for form in forms),
            "alibi": any(form.alibi_slopes is not None for form in forms),
            "quantization": _distinct(
                None if layer.quantization is None else layer.quantization.name for layer in layers
            ),
            "up_projection_quantization": _distinct(
                layer.up_quantization.name for layer in layers if layer.up_quantization is not None
            ),
            "kv_cache": _distinct(layer.attention.kv_cache_dtype for layer in layers),
        }

    @contextmanager
    def _blocks_kept(self) -> Iterator[None]:
        """Leaves the probe's KV blocks as they were."""
        context = self._runner.vllm_config.compilation_config.static_forward_context
        config = self._runner.kv_cache_config
        bits, places = [], []
        # Also layers of a model that drafts, and those that are not traced: states are two caches.
        for group, blocks in zip(config.kv_cache_groups, self._blocks, strict=True):
            for name in group.layer_names:
                held = context[name].kv_cache
                for cache in [held] if isinstance(held, Tensor) else held:
                    bits.append(cache.view(torch.uint8) if cache.itemsize == 1 else cache)
                    # Kernels may see each block as several.
                    places.append(_parts(blocks, len(cache) // config.num_blocks, cache.device))
        kept = [cache[where] for cache, where in zip(bits, places, strict=True)]
        try:
            yield
        finally:
            for cache, where, before in zip(bits, places, kept, strict=True):
                cache[where] = before

    # --- in the place of a `RunnerCapture` ---

    @property
    def scheduled(self) -> Mapping[str, int]:
        """Tokens of each request in the step."""
        return {_REQUEST: len(self._token_ids)}

    def observe(self, _: SchedulerOutput) -> None:
        """Nothing: the step is known."""

    def forget_step(self) -> None:
        """Nothing: there are no others."""

    def begin_forward(self, batch: Any) -> StepObserver | None:
        """Records every target row as a trace of its own; see `RunnerCapture`."""
        try:
            [row] = list(batch(self._model.cache_groups))
            for position in self._positions:
                weights = TargetWeights.from_mapping({position: 1.0})
                spec = TraceSpec.create(weights, len(self._token_ids), exact_fraction=1.0)
                self._traces[str(position)] = Trace(spec, self._model)
            rows = [dataclasses.replace(row, req_id=req_id) for req_id in self._traces]
            step = StepRecorder(rows, self._traces, self._model, self._fail_trace)
            self._tables = row.block_tables
            places = [row.first_row + position for position in self._positions]
            kept = self._outputs, self._block_outputs, self._gates
            return _ProbeObserver(self._model, step, self.fail, places, *kept)
        except Exception as error:
            log_unexpected("preparing the proof at the start", error)
            self.fail(error)
            return None

    def end_forward(self, observer: StepObserver | None) -> None:
        """Measures all layers while the blocks are held."""
        if observer is None:
            return
        try:
            observer.step.flush()
            observer.step.check_complete()
            if self._failure is None:
                self._measure(observer.step)
        except Exception as error:
            log_unexpected("measuring the probe", error)
            self.fail(error)

    def take_log_probs(self, _: Any) -> None:
        """None are asked of the probe."""

    def with_results(self, output: Any) -> Any:
        """The output as it is."""
        return output

    def _fail_trace(self, _: str, error: BaseException) -> None:
        self.fail(error)

    def _measure(self, step: StepRecorder) -> None:
        """This rank's attention errors and contributions, and what the blocks have added."""
        model, length = self._model, len(self._token_ids)
        traces = list(self._traces.values())
        seen_as_update = traces[0].stream_lacks_residual
        residual, stream = (
            torch.stack([getattr(trace.sums, name) for trace in traces], dim=1).cpu()
            for name in ("residual", "stream")
        )
        if model.normed:
            self._added = self._added_by_layers(residual)
            carried = all(layer.in_front is None for layer in model.layers)
            self._rounded = None if carried else self._added + residual
            self._scales = self._scales_of(step)
        else:
            # A block's output has the model's type, the difference of two rounded streams has not.
            self._added = stream.to(self._dtype) if seen_as_update else stream - residual
            self._rounded = None if seen_as_update else stream
        for index, layer in enumerate(model.layers):
            weights = torch.stack(
                [_padded(trace.sums.column_sums[index], length) for trace in traces]
            )
            if model.shape.sums_per_head > 1:
                weights = weights.unflatten(1, (model.shape.num_heads, -1))
            values = model.read_values(index, self._tables, length)
            output = self._outputs[index].unflatten(-1, (model.shape.num_heads, -1))
            output = output[..., : layer.heads.values]
            if model.gate_width:  # On both sides: a gate may be too small to divide by.
                gates = self._gates[index]
                output = output.float() * (gates[..., None] if gates.dim() == 2 else gates)
            scales = self._scales[index].to(model.device).view(-1, *[1] * (weights.dim() - 1))
            self.errors[index, 0] = attention_error(weights / scales, values, output)
            projection = model.output_projection(index).weight
            self.errors[index, 2] = (
                0.0
                if layer.quantization is None
                else product_error(
                    layer.out_proj, layer.quantization, projection, model.gain(index)
                )
            )
            contributed = contribution(weights, values, projection).cpu()
            self._contributed[index] = contributed * layer.multiplier

    def _added_by_layers(self, residual: Tensor) -> Tensor:
        """What the layers add for the rows' stream and block outputs, ``[L, R, D]``."""
        device = self._model.device
        added = [
            _added_by(layer, output, before.to(device, self._dtype))
            for layer, output, before in zip(
                self._model.layers, self._block_outputs, residual, strict=True
            )
        ]
        return torch.stack(added).cpu()

    def _scales_of(self, step: StepRecorder) -> Tensor:
        """The factors with which the rows were recorded, ``[L, R]``."""
        rows = list(self._traces)
        scales = torch.full_like(self._scales, math.nan)
        for group in step.groups:
            for index, segment in enumerate(group.segments):
                if group.scales is not None:
                    row = rows.index(segment.batch_row.req_id)
                    scales[:, row] = group.rows.of_segment(group.scales, index)[:, 0].cpu()
        return scales

    # --- what all ranks have ---

    def _compare(self) -> None:
        """Compares what the heads of all ranks contribute with what the blocks have added."""
        failed = torch.tensor([0.0 if self._failure is None else 1.0])
        tp = get_tp_group()
        if tp.world_size > 1:
            torch.distributed.all_reduce(self._contributed, group=tp.cpu_group)
        for index, layer in enumerate(self._model.layers):
            contributed = self._contributed[index]
            if layer.out_proj.bias is not None:
                bias = _bias(layer).double() * layer.multiplier
                gain = self._model.gain(index)
                if gain is not None:
                    bias = bias * gain
                contributed = contributed + self._scales[index][:, None] * bias.cpu()
            rounded = None if self._rounded is None else self._rounded[index]
            self.errors[index, 1] = identity_error(contributed, self._added[index], rounded)
        if tp.world_size > 1:
            for of_all in (self.errors, failed):
                torch.distributed.all_reduce(
                    of_all, torch.distributed.ReduceOp.MAX, group=tp.cpu_group
                )
        if failed.item() and self._failure is None:
            self._failure = "another rank could not record the probe"


class _ProbeObserver(StepObserver):
    """Also keeps of the target rows the attention output, what goes to norms, and gates."""

    def __init__(
        self,
        model: TracedModel,
        step: StepRecorder,
        fail: Any,
        rows: Sequence[int],
        outputs: dict[int, Tensor],
        block_outputs: list[Tensor],
        gates: list[Tensor],
    ) -> None:
        super().__init__(model, step, fail)
        self._rows = torch.tensor(rows, device=model.device)
        self._outputs = outputs
        self._block_outputs = block_outputs
        self._gates = gates

    def on_attention(
        self, layer_name: str, query: Tensor, output: Tensor, lse: Tensor | None = None
    ) -> None:
        """See `observer.ForwardObserver`."""
        super().on_attention(layer_name, query, output, lse)
        try:
            layer = self.model.layer_index(layer_name)
            if layer is not None:
                self._outputs[layer] = output[self._rows].flatten(1)
        except Exception as error:
            self._fail(error)

    def on_block(self, output: Tensor) -> None:
        """See `observer.ForwardObserver`."""
        super().on_block(output)
        try:
            self._block_outputs.append(output[self._rows])
        except Exception as error:
            self._fail(error)

    def on_block_input(self, hidden_states: Tensor) -> None:
        """See `observer.ForwardObserver`; ``[R, H]`` or ``[R, H, d]`` of each layer are kept."""
        super().on_block_input(hidden_states)
        try:
            taken = [group.gates for group in self.step.groups if group.gates is not None]
            self._gates.append(torch.cat(taken, dim=-1).movedim(-1, 0))
        except Exception as error:
            self._fail(error)


class _BlockAddedError(Exception):
    """Ends a decoder layer's forward pass where its attention block has been added."""


def _added_by(layer: TracedLayer, output: Tensor, residual: Tensor) -> Tensor:
    """What a decoder layer's own code adds to the stream for an output of its attention block.

    Args:
        layer: The layer; its code runs up to what takes the stream behind the block.
        output: ``[R, D]``, the block's output.
        residual: ``[R, D]``, the stream in front of the block.

    Returns:
        float64 ``[R, D]``; where the layer does not carry the stream, to the stream's rounding.
    """
    seen: list[Tensor] = []
    carried = layer.in_front is None

    def end(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream = sum(argument(names, i, args, kwargs).double() for i in range(1 + carried))
        seen.append(stream.reshape(residual.shape) - residual.double())
        raise _BlockAddedError

    block, stock = layer.block, vars(layer.block).get("forward")
    arguments: dict[str, Any] = dict.fromkeys(_required(layer.decoder.forward))
    names = argument_names(layer.behind)
    hook = layer.behind.register_forward_pre_hook(end, prepend=True, with_kwargs=True)
    try:
        if _POSITIONS in arguments:
            block.forward = lambda *_, **__: output.clone()
            stream = residual.clone()
            arguments[_POSITIONS] = torch.zeros(
                len(output), dtype=torch.int64, device=output.device
            )
            arguments["hidden_states"] = torch.zeros_like(stream) if carried else stream
            if carried:
                arguments["residual"] = stream
        else:  # Transformers' code: sequences, and what attention weights would be.
            block.forward = lambda *_, **__: (output[None].clone(), None)
            arguments["hidden_states"] = residual[None].clone()
        layer.decoder(**arguments)
    except _BlockAddedError:
        return seen[0]
    finally:
        hook.remove()
        vars(block).pop("forward", None)
        if stock is not None:
            block.forward = stock
    raise RuntimeError(f"what is behind the attention block of layer {layer.index} is not called")


def _required(function: Any) -> list[str]:
    """Names of the parameters that must be given."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variable]


def _execute(worker: Any, token_ids: list[int], blocks: Sequence[list[int]]) -> None:
    """Runs one request through a worker, as vLLM's own warm-up does, and removes it."""
    groups = len(blocks)
    step = SchedulerOutput.make_empty()
    step.num_common_prefix_blocks = [0] * groups
    step.num_spec_tokens_to_schedule = worker.vllm_config.num_speculative_tokens
    step.scheduled_new_reqs = [
        NewRequestData(
            req_id=_REQUEST,
            prompt_token_ids=token_ids,
            mm_features=[],
            sampling_params=SamplingParams(max_tokens=1, temperature=0.0),
            pooling_params=None,
            block_ids=tuple(blocks),
            num_computed_tokens=0,
            lora_request=None,
            prefill_token_ids=token_ids,
        )
    ]
    step.num_scheduled_tokens = {_REQUEST: len(token_ids)}
    step.total_num_scheduled_tokens = len(token_ids)
    removal = SchedulerOutput.make_empty()
    removal.num_common_prefix_blocks = [0] * groups
    removal.finished_req_ids = {_REQUEST}
    runner = worker.model_runner
    if not get_pp_group().is_first_rank and getattr(runner, "intermediate_tensors", 0) is None:
        # A V1 runner makes it when it profiles, which vLLM's CPU worker in eager mode does not.
        runner.intermediate_tensors = runner.get_model().make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
        )
    try:
        if worker.execute_model(step) is None:
            worker.sample_tokens(None)
    finally:
        worker.model_runner.execute_model_state = None
        worker.execute_model(removal)


@contextmanager
def _without_connector(runner: Any) -> Iterator[None]:
    """Keeps the probe from a KV connector, which knows no such request; as vLLM's dummy runs do."""
    connector = getattr(runner, "kv_connector", None)
    if connector is not None:  # Of a V2 runner.
        connector.set_disabled(True)
        try:
            yield
        finally:
            connector.set_disabled(False)
        return
    connector = kv_transfer_state._KV_CONNECTOR_AGENT
    kv_transfer_state._KV_CONNECTOR_AGENT = None
    try:
        yield
    finally:
        kv_transfer_state._KV_CONNECTOR_AGENT = connector


def _on_all_workers(ready: bool) -> bool:
    """Whether all workers of the engine are ready."""
    world = get_world_group()
    if world.world_size == 1:
        return ready
    flag = torch.tensor([int(ready)])
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN, group=world.cpu_group)
    return bool(flag)


def _parts(blocks: Sequence[int], parts: int, device: torch.device) -> Tensor:
    """Ids of the equal parts of blocks, int64."""
    ids = torch.tensor(blocks, device=device)[:, None] * parts
    return (ids + torch.arange(parts, device=device)).flatten()


def _bias(layer: TracedLayer) -> Tensor:
    if layer.quantization is None:
        bias: Tensor = layer.out_proj.bias
        return bias
    with torch.inference_mode():
        return applied_bias(layer.out_proj, layer.quantization)


def _short(limit: Tensor) -> float:
    """A limit as it was written."""
    return float(f"{float(limit):.6g}")


def _padded(sums: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(sums, (0, length - sums.shape[1]))


def _distinct(values: Any) -> list[Any]:
    return sorted(set(values), key=lambda value: (value is not None, value))
