"""The Ray Data pipelines: for a dataset of the user's own, and for the files of the command.

Rows stream: at no time is the input, or the output, in memory as a whole. A lost replica is
replaced and its batches are done again; a batch is given up after it was there when several were
lost.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from vllm_flashtrace.base.process import is_cpu_build
from vllm_flashtrace.scale.batch.batch_replica import Replica, ReplicaSettings
from vllm_flashtrace.scale.batch.inputs import Defaults, RowError, custom_id_of, plain_record
from vllm_flashtrace.scale.batch.results import Outcome, make_table, table_rows
from vllm_flashtrace.scale.batch.source import FileRows, request_columns, request_table
from vllm_flashtrace.scale.ray_cluster import RayUnavailableError, import_ray

if TYPE_CHECKING:
    import pyarrow as pa

# Batches that a replica works on at once: the next one fills the engine while one ends.
BATCHES_AT_ONCE = 2
# After so many more tries a batch is given up; the command then tries its rows one by one.
BATCH_RETRIES = 2
# Ray's own CPUs for whatever else the pipeline does.
SPARE_CPUS = 1
_READER_CPUS = 0.25
_PARALLEL = (
    ("--tensor-parallel-size", "-tp"),
    ("--pipeline-parallel-size", "-pp"),
    ("--data-parallel-size", "-dp"),
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


@dataclass(frozen=True, slots=True)
class Pool:
    """The replicas of a run: how many, with which resources, and the step of a pipeline they are.

    Attributes:
        settings: How each starts.
        replicas: Fewest and most of them.
        batch_size: Rows in a batch.
        cpus: CPUs that Ray reserves for each.
        gpus: GPUs likewise.
    """

    settings: ReplicaSettings
    replicas: tuple[int, int]
    batch_size: int
    cpus: float
    gpus: int

    @classmethod
    def plan(
        cls, model: str, argv: Sequence[str], replicas: tuple[int, int], batch_size: int
    ) -> Pool:
        """Divides the CPUs of the Ray that is connected, or counts the GPUs of a replica.

        Args:
            model: Model name or folder.
            argv: Options of ``vllm serve``.
            replicas: Fewest and most replicas.
            batch_size: Rows in a batch.

        Raises:
            ValueError: There are not enough CPUs, or a parallel size is bad.
        """
        workers = workers_of(argv)
        on_cpu = is_cpu_build()
        cores = _cores_each(replicas[1], workers) if on_cpu else 0
        settings = ReplicaSettings(
            model, tuple(argv), cores, workers, replicas[1] if on_cpu else 1, uuid4().hex
        )
        return cls(settings, replicas, batch_size, cores or 1, 0 if on_cpu else workers)

    def answer(self, requests: Any, *, one_by_one: bool = False) -> Any:
        """A dataset of ``row`` and ``outcome`` for a dataset of requests.

        Args:
            requests: Columns of :func:`~vllm_flashtrace.scale.batch.source.request_table`.
            one_by_one: Whether a replica is handed a row only when it has no other, so that a row
                that ends its replica takes none with it.
        """
        size, at_once = (1, 1) if one_by_one else (self.batch_size, BATCHES_AT_ONCE)
        ray_data = import_ray("ray.data")
        fewest, most = self.replicas
        return requests.repartition(target_num_rows_per_block=size).map_batches(
            Replica,
            fn_constructor_args=(self.settings,),
            batch_size=size,
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=ray_data.ActorPoolStrategy(
                min_size=fewest,
                max_size=most,
                max_concurrent_calls_per_actor=at_once,
                max_tasks_in_flight_per_actor=1 if one_by_one else at_once + 1,
                enable_true_multi_threading=True,
            ),
            num_cpus=self.cpus,
            num_gpus=self.gpus or None,
            ray_remote_args_fn=_fault_tolerance,
        )


def _fault_tolerance() -> dict[str, Any]:
    return {"max_restarts": -1, "max_task_retries": BATCH_RETRIES}


def _cores_each(replicas: int, workers: int) -> int:
    """CPUs for each replica: an equal share of the cluster's, and no more than a machine has.

    Raises:
        ValueError: There are not enough.
    """
    ray = import_ray()
    machines = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    usable = sum(machines) - SPARE_CPUS
    cores = min(usable // replicas, max(machines))
    if cores < workers:
        raise ValueError(
            f"{replicas} replicas with {workers} workers each need {replicas * workers} CPUs; Ray "
            f"has {max(0, usable)} to give (and {SPARE_CPUS} for itself)"
        )
    return cores


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


def as_argv(engine_args: Mapping[str, Any]) -> tuple[str, ...]:
    """``{"max_model_len": 2048, "enforce_eager": True}`` as options of ``vllm serve``, unchecked.

    Args:
        engine_args: Names with ``_`` or ``-``. True and False switch, None is left out, lists
            become several values, and mappings become JSON.
    """
    argv: list[str] = []
    for name, value in engine_args.items():
        option = name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            argv.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, Mapping):
            argv += [f"--{option}", json.dumps(value)]
        elif isinstance(value, list | tuple):
            argv += [f"--{option}", *map(str, value)]
        else:
            argv += [f"--{option}", str(value)]
    return tuple(argv)


def workers_of(argv: Sequence[str]) -> int:
    """Worker processes, hence GPUs, of one engine: the product of its parallel sizes.

    Raises:
        ValueError: A size is no number of at least 1.
    """
    workers = 1
    for names in _PARALLEL:
        workers *= _size(argv, names)
    return workers


def _size(argv: Sequence[str], names: tuple[str, ...]) -> int:
    size: str | None = None
    for position, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") in names:
            size = value if equals else next(iter(argv[position + 1 : position + 2]), "")
    if size is None:
        return 1
    if not (size.isascii() and size.isdigit() and int(size) > 0):
        raise ValueError(f"engine options: {names[0]} must be a number of at least 1, got {size!r}")
    return int(size)
