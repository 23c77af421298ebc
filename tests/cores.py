"""Which core the tests of this process compute on, where several processes share the suite."""

from __future__ import annotations

import os

BIND = "VLLM_CPU_OMP_THREADS_BIND"
"""Where vLLM is told; by itself it binds every engine of a small machine to the same core."""


def own_core() -> int:
    """A core for each process of the suite, as far as there are enough."""
    cores = sorted(os.sched_getaffinity(0))
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0")
    return cores[int(worker.removeprefix("gw")) % len(cores)]
