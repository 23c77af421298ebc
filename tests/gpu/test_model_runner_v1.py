"""The V1 runner on CUDA: its block tables and its choice of CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
from vllm.v1.worker.gpu_input_batch import InputBatch
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from tests.gpu.standin import CPU
from tests.gpu.v2_engine import V2Engine, v2_engine
from tests.tiny_models import Family, make_tiny_model
from vllm_flashtrace.patches import model_runner_v1
from vllm_flashtrace.worker.cache_groups import CacheGroups
from vllm_flashtrace.worker.runner import _ATTRIBUTE, batch_rows_v1


@pytest.fixture(scope="module", params=["FLASHINFER", "FLASHMLA"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[V2Engine]:
    """Backends with blocks of 128 tokens, which they read as two of 64."""
    family: Family = "deepseek_v3" if request.param == "FLASHMLA" else "llama"
    folder = make_tiny_model(family, tmp_path_factory.mktemp(family))
    with (
        pytest.MonkeyPatch.context() as patch,
        v2_engine(folder, patch, request.param, block_size=128) as engine,
    ):
        yield engine


def v1_batch(requests: dict[str, tuple[int, list[int]]]) -> InputBatch:
    """vLLM's V1 batch with requests given by tokens computed and blocks."""
    batch = InputBatch(8, 1024, 512, CPU, 512, [128], [8])
    for index, (req_id, (computed, blocks)) in enumerate(requests.items()):
        batch._req_ids.append(req_id)
        batch.block_table.add_row((blocks,), index)
        batch.num_computed_tokens_cpu[index] = computed
    batch.block_table.commit_block_table(len(requests))
    return batch


def test_the_batch_of_a_v1_runner(loaded: V2Engine) -> None:
    """Its block table holds the manager's blocks; kernels get theirs when metadata is built.

    Rows are those that it computes, which are fewer than scheduled where drafts were trimmed.
    """
    batch = v1_batch({"a": (0, [5, 3]), "b": (130, [9, 2])})
    [group] = loaded.runner.attn_groups[0]
    starts = SimpleNamespace(np=np.array([0, 200, 204, 204]))
    runner = SimpleNamespace(
        input_batch=batch, attn_groups=loaded.runner.attn_groups, query_start_loc=starts
    )
    groups = CacheGroups((0,), (0,), frozenset(group.layer_names))
    first, second = batch_rows_v1(runner, groups)
    assert (first.req_id, first.first_row, first.start, first.stop) == ("a", 0, 0, 200)
    assert (second.req_id, second.first_row, second.start, second.stop) == ("b", 200, 130, 134)
    assert first.block_tables[0][:4].tolist() == [10, 11, 6, 7]
    stock = group.map_to_kernel_block_table(batch.block_table[0].get_device_tensor(2))
    assert torch.equal(torch.stack([first.block_tables[0], second.block_tables[0]]), stock)


@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL", "FULL_AND_PIECEWISE"])
@pytest.mark.parametrize(("tokens", "requests"), [(4, 4), (13, 2)])
def test_the_v1_runner_leaves_graphs(
    loaded: V2Engine, mode: str, tokens: int, requests: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own choice of a mode, but for steps that compute target rows."""
    for name in ("execute_model", "_determine_batch_execution_and_padding", "_model_forward"):
        monkeypatch.setattr(GPUModelRunner, name, getattr(GPUModelRunner, name))
    runner = v1_runner(loaded, CUDAGraphMode[mode], monkeypatch)
    counts = np.full(requests, tokens // requests, dtype=np.int32)
    counts[0] += tokens - counts.sum()
    arguments = (tokens, requests, counts, int(counts.max()))
    stock = runner._determine_batch_execution_and_padding(*arguments)
    assert stock[0] != CUDAGraphMode.NONE and stock[1].num_tokens >= tokens
    model_runner_v1.check()
    model_runner_v1.apply()
    assert runner._determine_batch_execution_and_padding(*arguments) == stock
    for records, expected in ((False, stock[0]), (True, CUDAGraphMode.NONE), (False, stock[0])):
        setattr(runner, _ATTRIBUTE, SimpleNamespace(records_step=records))
        found = runner._determine_batch_execution_and_padding(*arguments, force_eager=False)
        assert found[0] == expected
        assert found[1].num_tokens == (tokens if records else stock[1].num_tokens)


def v1_runner(loaded: V2Engine, mode: CUDAGraphMode, patch: pytest.MonkeyPatch) -> Any:
    """vLLM's V1 runner with no more than its choice of a mode needs."""
    compilation = loaded.config.compilation_config
    patch.setattr(compilation, "cudagraph_capture_sizes", [1, 2, 4, 8, 16])
    patch.setattr(compilation, "max_cudagraph_capture_size", 16)
    runner = object.__new__(GPUModelRunner)
    runner.vllm_config, runner.model_config = loaded.config, loaded.config.model_config
    runner.parallel_config = loaded.config.parallel_config
    runner.uniform_decode_query_len = 1
    runner.input_batch = SimpleNamespace(lora_id_to_lora_request={})
    runner.cudagraph_dispatcher = CudagraphDispatcher(loaded.config)
    runner.cudagraph_dispatcher.initialize_cudagraph_keys(mode)
    return runner
