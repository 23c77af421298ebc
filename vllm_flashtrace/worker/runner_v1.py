"""The batch of a V1 model runner.

Invariant: rows are in the order of the runner's flattened tokens, and block tables are those of
the step, as the attention kernel reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vllm_flashtrace.worker.kernel_blocks import kernel_block_table
from vllm_flashtrace.worker.step import BatchRow


def batch_rows(runner: Any, scheduled: Mapping[str, int]) -> Iterator[BatchRow]:
    """The requests of the step that a V1 runner has prepared.

    Args:
        runner: A ``vllm.v1.worker.gpu_model_runner.GPUModelRunner``, or one derived from it.
        scheduled: Number of tokens of each request in this step.

    Raises:
        UnsupportedModelError: The kernels' blocks cannot be told from the manager's.
    """
    batch = runner.input_batch
    blocks = batch.block_table[0].get_device_tensor(len(batch.req_ids))
    tables = kernel_block_table(blocks, runner.attn_groups[0])
    first_row = 0
    for index, req_id in enumerate(batch.req_ids):
        count = scheduled[req_id]
        start = int(batch.num_computed_tokens_cpu[index])
        yield BatchRow(req_id, first_row, start, start + count, tables[index])
        first_row += count
