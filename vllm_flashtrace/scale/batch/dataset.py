"""The Ray Data pipelines, for the command and for datasets of the user's own.

Invariant: rows stream; at no time is the input, or the output, in memory as a whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm_flashtrace.scale.batch.engine_options import as_argv
from vllm_flashtrace.scale.batch.inputs import plain_record
from vllm_flashtrace.scale.batch.outcome import Outcome
from vllm_flashtrace.scale.batch.pool import Pool
from vllm_flashtrace.scale.batch.results import make_table, table_rows
from vllm_flashtrace.scale.batch.rows import Defaults, RowError, custom_id_of
from vllm_flashtrace.scale.batch.source import FileRows, request_columns, request_table
from vllm_flashtrace.scale.ray_cluster import RayUnavailableError, import_ray

if TYPE_CHECKING:
    import pyarrow as pa

_READER_CPUS = 0.25


def read_requests(files: Sequence[FileRows]) -> Any:
    """A dataset of the files' requests, read on this machine a little ahead of the replicas."""
    ray = import_ray()
    ray_data = import_ray("ray.data")

    class _Source(ray_data.Datasource):  # type: ignore[name-defined]
        def get_name(self) -> str:
            return "BatchFiles"

        def estimate_inmemory_data_size(self) -> int:
            return sum(rows.file.path.stat().st_size for rows in files)

        def get_read_tasks(
            self,
            parallelism: int,
            per_task_row_limit: int | None = None,
            data_context: Any = None,
        ) -> list[Any]:
            return [ray_data.ReadTask(rows, _metadata(ray_data, rows)) for rows in files]

    return ray_data.read_datasource(
        _Source(),
        concurrency=1,
        num_cpus=_READER_CPUS,
        label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
    )


def _metadata(ray_data: Any, rows: FileRows) -> Any:
    return ray_data.block.BlockMetadata(
        num_rows=sum(rows.wanted),
        size_bytes=rows.file.path.stat().st_size,
        exec_stats=None,
        task_exec_stats=None,
        input_files=(str(rows.file.path),),
    )


def flashtrace_dataset(
    ds: Any,
    *,
    model: str,
    flashtrace: Mapping[str, Any] | bool = True,
    max_tokens: int | None = None,
    replicas: int | tuple[int, int] = 1,
    batch_size: int = 32,
    engine_args: Mapping[str, Any] | None = None,
) -> Any:
    """Completes and attributes the rows of a Ray dataset.

    Args:
        ds: A ``ray.data.Dataset``. Its rows have ``messages`` or ``prompt``, or ``prompt`` and
            ``completion`` (text to explain), and may have ``custom_id``, ``flashtrace`` and any
            field of an OpenAI request body; a null is an absent field.
        model: Model name or folder.
        flashtrace: The ``flashtrace`` field of rows that have none.
        max_tokens: Most tokens to generate for rows that do not say.
        replicas: Engines, each in an actor of its own; or the fewest and the most of them.
        batch_size: Rows that an actor takes at once.
        engine_args: Options of ``vllm serve``, e.g. ``{"max_model_len": 2048}``.

    Returns:
        A lazy ``ray.data.Dataset`` with the columns of ``result_schema()``, a row for each choice.
        Rows that fail have the status ``error``. A row without ``custom_id`` is known by a digest
        of its content; ``source`` is empty and ``line`` 0.

    Raises:
        RayUnavailableError: Ray is not installed, or not connected.
        ValueError: The replicas do not fit.
    """
    if not import_ray().is_initialized():
        raise RayUnavailableError("the dataset's Ray is gone; connect to it first")
    sizes = (replicas, replicas) if isinstance(replicas, int) else replicas
    pool = Pool.plan(model, as_argv(engine_args or {}), sizes, batch_size)
    defaults = Defaults(flashtrace, max_tokens)
    requests = ds.map_batches(
        _as_requests, fn_args=(defaults,), batch_format="pyarrow", zero_copy_batch=True
    )
    return pool.answer(requests).map_batches(
        _as_results, batch_format="pyarrow", zero_copy_batch=True
    )


def _as_requests(batch: pa.Table, defaults: Defaults) -> pa.Table:
    return request_table([_as_request(record, defaults) for record in batch.to_pylist()])


def _as_request(record: dict[str, Any], defaults: Defaults) -> dict[str, Any]:
    value = plain_record(record)
    error = value if isinstance(value, RowError) else None
    digest = hashlib.sha256(json.dumps(record, default=repr).encode()).hexdigest()
    custom_id = custom_id_of(value) or f"row-{digest[:32]}"
    columns = {"row": 0, "source": "", "line": 0}
    return columns | request_columns(custom_id, value, defaults, error)


def _as_results(batch: pa.Table) -> pa.Table:
    outcomes = map(Outcome.from_json, batch.column("outcome").to_pylist())
    return make_table([row for outcome in outcomes for row in table_rows(outcome)])
