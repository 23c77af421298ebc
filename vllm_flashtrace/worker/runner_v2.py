"""The batch of a V2 model runner.

Invariant: rows are in the order of the runner's flattened tokens, and block tables are those of
the step, as the attention kernel reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from vllm_flashtrace.base.errors import TraceError, UnsupportedModelError
from vllm_flashtrace.worker.kernel_blocks import kernel_block_table
from vllm_flashtrace.worker.step import BatchRow


def batch_rows(
    runner: Any, input_batch: Any, block_tables: Sequence[torch.Tensor]
) -> Iterator[BatchRow]:
    """The requests of a step, without the rows that pad it for CUDA graphs.

    Args:
        runner: A ``vllm.v1.worker.gpu.model_runner.GPUModelRunner``.
        input_batch: Its ``InputBatch`` for the step.
        block_tables: int32 ``[requests with padding, blocks]`` of each KV cache group, as
            ``prepare_attn`` gives them: the manager's blocks, on the runner's device, valid until
            the next step.

    Raises:
        UnsupportedModelError: There are several KV cache groups, or tokens are split over ranks.
        TraceError: The batch is not laid out as its own numbers say.
    """
    if len(block_tables) != 1:
        raise UnsupportedModelError(
            f"traces are not supported with {len(block_tables)} KV cache groups"
        )
    if runner.pcp_manager is not None:
        raise UnsupportedModelError("traces are not supported with prefill context parallelism")
    tables = kernel_block_table(block_tables[0], runner.attn_groups[0])
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
        yield BatchRow(req_id, first, start, start + count, tables[index])
