"""Which cores the engine of a replica computes on, where vLLM would give all of them the same.

Invariant: two replicas of a machine share no core while there are enough; what the user bound
stands.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

_BIND = "VLLM_CPU_OMP_THREADS_BIND"


def bind_cores(rank: int, cpus: float, workers: int) -> None:
    """Sets vLLM's core binding for the engine of this process, unless the user did.

    Args:
        rank: Of this replica among those of the machine.
        cpus: Cores that a replica may use; less than one where replicas share them.
        workers: Worker processes of the engine.
    """
    if _BIND not in os.environ:
        os.environ[_BIND] = binding(sorted(os.sched_getaffinity(0)), rank, cpus, workers)


def binding(cores: Sequence[int], rank: int, cpus: float, workers: int) -> str:
    """The binding in vLLM's notation: a list of cores per worker, e.g. ``0,1|2,3``.

    >>> binding([0, 1, 2, 3], rank=1, cpus=2, workers=2)
    '2|3'
    """
    share = max(int(cpus), 1)
    first = rank * share
    mine = [cores[(first + i) % len(cores)] for i in range(min(share, len(cores)))]
    per_worker = max(len(mine) // workers, 1)
    parts = []
    for worker in range(workers):
        at = worker * per_worker % len(mine)
        parts.append(",".join(map(str, mine[at : at + per_worker])))
    return "|".join(parts)
