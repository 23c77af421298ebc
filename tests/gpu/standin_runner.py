"""vLLM's V2 runner on CPU tensors.

Its ``execute_model``, ``prepare_attn``, CUDA graph manager and batch classes are vLLM's own. What
only a GPU can run is replaced by the plainest torch form: the kernels that gather block tables and
slots, and what stages the states of requests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import get_forward_context
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from tests.gpu.standin import CPU


@dataclass
class StandInRequest:
    """What the runner's request states hold of one request."""

    index: int
    token_ids: list[int]
    block_ids: list[int]
    computed: int


class TorchBlockTables:
    """``vllm.v1.worker.gpu.block_table.BlockTables`` without Triton; one KV cache group."""

    def __init__(self, block_size: int, max_num_reqs: int, width: int) -> None:
        self.block_size = block_size
        self.rows = torch.zeros(max_num_reqs, width, dtype=torch.int32)
        self.input_rows = torch.full((max_num_reqs, width), 7, dtype=torch.int32)

    def apply_staged_writes(self) -> None:
        pass

    def gather_block_tables(self, idx_mapping: Tensor, num_reqs_padded: int) -> tuple[Tensor, ...]:
        self.input_rows[: len(idx_mapping)] = self.rows[idx_mapping]
        self.input_rows[len(idx_mapping) : num_reqs_padded] = 0
        return (self.input_rows[:num_reqs_padded],)

    def compute_slot_mappings(
        self,
        idx_mapping: Tensor,
        query_start_loc: Tensor,
        positions: Tensor,
        num_tokens_padded: int,
    ) -> Tensor:
        slots = torch.full((1, num_tokens_padded), -1, dtype=torch.int64)
        starts = query_start_loc.tolist()
        for request, index in enumerate(idx_mapping.tolist()):
            own = slice(starts[request], starts[request + 1])
            blocks = self.rows[index, positions[own] // self.block_size].long()
            slots[0, own] = blocks * self.block_size + positions[own] % self.block_size
        return slots


class StandInRunner(GPUModelRunner):
    """The V2 runner with its own ``execute_model`` and ``prepare_attn``, on the CPU.

    Overridden is what stages request states through the GPU. ``seen`` notes the CUDA graph mode of
    every forward pass.
    """

    def __init__(self, model: Any, config: VllmConfig, cache: Any) -> None:
        from vllm.v1.worker.block_table import get_block_table_width
        from vllm.v1.worker.gpu.async_utils import StepTimingCollector
        from vllm.v1.worker.gpu.ec_connector import NO_OP_EC_CONNECTOR
        from vllm.v1.worker.gpu.eplb_utils import EPLBController
        from vllm.v1.worker.gpu.kv_connector import NO_OP_KV_CONNECTOR
        from vllm.v1.worker.gpu.model_states.default import DefaultModelState

        self.vllm_config = config
        self.model_config, self.cache_config = config.model_config, config.cache_config
        self.compilation_config = config.compilation_config
        self.parallel_config, self.scheduler_config = (
            config.parallel_config,
            config.scheduler_config,
        )
        self.observability_config = config.observability_config
        self.speculative_config = self.lora_config = None
        self.device, self.model = CPU, model
        self.max_num_reqs = config.scheduler_config.max_num_seqs
        self.is_encoder_decoder = self.uses_inputs_embeds = self.use_pp = False
        self.is_first_pp_rank = self.is_last_pp_rank = True
        self.use_aux_hidden_state_outputs = False
        self.dcp_size, self.decode_query_len = 1, 1
        self.pp_handler = self.pcp_manager = self.ubatch_runner = None
        self.pooling_runner = self.encoder_cache = None
        self.adaptive_verification = self.aux_output_connector = self.fast_prefill = None
        self.kv_connector, self.ec_connector = NO_OP_KV_CONNECTOR, NO_OP_EC_CONNECTOR
        self.eplb = EPLBController(config.parallel_config, CPU)
        self.step_timing = StepTimingCollector()
        self.execute_model_state = None
        self.kv_cache_config, self.attn_groups = cache.kv_cache_config, cache.attn_groups
        with set_current_vllm_config(config):
            self.model_state = DefaultModelState(config, model, None, CPU)
        self.input_buffers = InputBuffers(
            self.max_num_reqs, config.scheduler_config.max_num_batched_tokens, CPU
        )
        spec = cache.kv_cache_config.kv_cache_groups[0].kv_cache_spec
        self.block_tables = TorchBlockTables(
            spec.block_size,
            self.max_num_reqs,
            get_block_table_width(
                spec.max_num_blocks_per_req(config, config.model_config.max_model_len),
                spec.block_size,
                token_alignment=spec.block_table_token_alignment,
            ),
        )
        self.cudagraph_manager = None
        self.requests: dict[str, StandInRequest] = {}
        zeros = np.zeros(self.max_num_reqs, dtype=np.int32)
        self.req_states = SimpleNamespace(
            req_id_to_index={},
            prefill_len=SimpleNamespace(np=zeros.copy()),
            num_computed_prefill_tokens=zeros.copy(),
            num_computed_tokens_np=zeros.copy(),
            num_computed_tokens=SimpleNamespace(gpu=None),
        )
        self.seen: list[CUDAGraphMode] = []
        self.skipped_compiled: list[bool] = []
        model.register_forward_pre_hook(self._note)

    def _note(self, *_: Any) -> None:
        self.seen.append(get_forward_context().cudagraph_runtime_mode)
        self.skipped_compiled.append(get_forward_context().skip_compiled)

    def _remove_request(self, req_id: str) -> bool:
        self.req_states.req_id_to_index.pop(req_id, None)
        return self.requests.pop(req_id, None) is not None

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        states = self.req_states
        for new in scheduler_output.scheduled_new_reqs:
            free = set(range(self.max_num_reqs)) - set(states.req_id_to_index.values())
            # From the end, so that a request's index is not its place in the batch.
            index = states.req_id_to_index.setdefault(new.req_id, max(free))
            self.requests[new.req_id] = StandInRequest(
                index, list(new.prompt_token_ids), list(new.block_ids[0]), new.num_computed_tokens
            )
            states.prefill_len.np[index] = len(new.prompt_token_ids)
            states.num_computed_tokens_np[index] = new.num_computed_tokens
            states.num_computed_prefill_tokens[index] = new.num_computed_tokens
            ids = torch.tensor(new.block_ids[0], dtype=torch.int32)
            self.block_tables.rows[index, : len(ids)] = ids

    def update_requests(self, scheduler_output: SchedulerOutput) -> None:
        cached, states = scheduler_output.scheduled_cached_reqs, self.req_states
        for req_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            states.num_computed_tokens_np[states.req_id_to_index[req_id]] = computed
        np.minimum(
            states.num_computed_tokens_np,
            states.prefill_len.np,
            out=states.num_computed_prefill_tokens,
        )

    def prepare_inputs(
        self, scheduler_output: Any, batch_state: Any, batch_desc: Any, num_active_loras: int
    ) -> InputBatch:
        return make_batch(
            self.input_buffers,
            [self.requests[req_id] for req_id in batch_state.req_ids],
            batch_state.req_ids,
            batch_state.num_scheduled_tokens,
            self.req_states.num_computed_tokens_np[batch_state.idx_mapping_np],
            max(batch_state.num_tokens, batch_desc.num_tokens),
            batch_desc.num_reqs,
        )


def make_batch(
    buffers: InputBuffers,
    requests: Sequence[StandInRequest],
    req_ids: Sequence[str],
    scheduled: np.ndarray,
    computed: np.ndarray,
    padded_tokens: int,
    padded_reqs: int | None = None,
) -> InputBatch:
    """vLLM's own ``InputBatch.make_dummy`` with the numbers of real requests."""
    num_reqs, num_tokens = len(requests), int(scheduled.sum())
    dummy = InputBatch.make_dummy(num_reqs, num_tokens, buffers)
    starts = np.full((padded_reqs or num_reqs) + 1, num_tokens, dtype=np.int32)
    starts[0] = 0
    np.cumsum(scheduled, out=starts[1 : num_reqs + 1])
    input_ids, positions = buffers.input_ids[:padded_tokens], buffers.positions[:padded_tokens]
    input_ids.zero_(), positions.zero_()
    for request, first, start, count in zip(requests, starts, computed, scheduled, strict=False):
        own = torch.tensor(request.token_ids[start : start + count], dtype=torch.int32)
        input_ids[first : first + count] = own
        positions[first : first + count] = torch.arange(start, start + count)
    seq_lens = torch.zeros(len(starts) - 1, dtype=torch.int32)
    seq_lens[:num_reqs] = torch.from_numpy((computed + scheduled).astype(np.int32))
    index = np.array([request.index for request in requests], dtype=np.intp)
    return dataclasses.replace(
        dummy,
        req_ids=list(req_ids),
        num_reqs_after_padding=len(starts) - 1,
        idx_mapping=torch.from_numpy(index),
        idx_mapping_np=index,
        num_scheduled_tokens=scheduled,
        num_tokens_after_padding=padded_tokens,
        query_start_loc=torch.from_numpy(starts),
        query_start_loc_np=starts,
        seq_lens=seq_lens,
        seq_lens_cpu_upper_bound=seq_lens,
        num_computed_tokens_np=computed.copy(),
        input_ids=input_ids,
        positions=positions,
        is_padding=buffers.is_padding[:padded_tokens],
    )


def graph_manager(
    config: VllmConfig, mode: CUDAGraphMode, sizes: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> Any:
    """vLLM's CUDA graph manager as it is after capture, without graphs."""
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager

    monkeypatch.setattr(
        type(current_platform), "get_global_graph_pool", lambda self: None, raising=False
    )
    compilation = config.compilation_config
    monkeypatch.setattr(compilation, "cudagraph_capture_sizes", list(sizes))
    monkeypatch.setattr(compilation, "max_cudagraph_capture_size", max(sizes))
    manager = ModelCudaGraphManager(config, CPU, mode, decode_query_len=1)
    manager._graphs_captured = True
    return manager
