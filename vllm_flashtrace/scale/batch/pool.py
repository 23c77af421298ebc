"""The replicas of a run: how many, with which resources, and the step of the pipeline they are.

Invariant: a lost replica is replaced and its batches are done again; a batch is given up only after
it was there when several were lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from vllm_flashtrace.base.environment import is_cpu_build
from vllm_flashtrace.scale.batch.batch_replica import Replica, ReplicaSettings
from vllm_flashtrace.scale.batch.engine_options import workers_of
from vllm_flashtrace.scale.ray_cluster import import_ray

# Batches that a replica works on at once: the next one fills the engine while one ends.
BATCHES_AT_ONCE = 2
# After so many more tries a batch is given up; the command then tries its rows one by one.
BATCH_RETRIES = 2
# Ray's own CPUs for whatever else the pipeline does.
SPARE_CPUS = 1


@dataclass(frozen=True, slots=True)
class Pool:
    """The replicas of a run.

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
